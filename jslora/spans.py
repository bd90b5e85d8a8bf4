"""LoRA work for the GPU kernels: segments cut into spans of tokens, addresses per layer and module.

Tokens without an adapter are in spans too, of rank 0: they have no delta, but what follows the sum
(`pallas_kernels.lora.finish`) is done for them all the same.

Small enough to be sent whenever rows or adapters of a step change: about 8 KB a layer for 64 rows,
whatever the ranks. Host only: no jax.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

from jslora.batch import Bucket, Geometry, Placement, Segment, list_pages
from jslora.model.config import MODULES
from pallas_kernels.lora.pieces import STORAGES, row_piece


class SpanShape(Protocol):
    """How work is cut into spans (`pallas_kernels.lora.segments.SegmentShape`)."""

    @property
    def span(self) -> int: ...
    @property
    def low(self) -> int: ...
    @property
    def peers(self) -> int: ...


class SpanArrays(NamedTuple):
    """The lists of one composition of a step (`pallas_kernels.lora.segments.SegmentWork`)."""

    pairs: np.ndarray  # int32 [I, 8]
    total: np.ndarray  # int32 [1]
    table: np.ndarray  # int32 [L, 7, I, 3]
    scale: np.ndarray  # float32 [L, 7, I]
    page_list: np.ndarray  # int32 [P]


def span_pairs(bucket: Bucket, shape: SpanShape, max_composed: int) -> int:
    """Most pairs of a step: the rows, in whole spans and one more, for all adapters; padding."""
    return (bucket.rows + bucket.tokens // shape.span) * max_composed + 1


def pack_spans(
    parts: Seq[Segment], bucket: Bucket, geometry: Geometry, shape: SpanShape
) -> SpanArrays:
    """Cut all tokens of a step into spans; each has a pair for each adapter, in their order."""
    capacity, filled, low = span_pairs(bucket, shape, geometry.max_composed), 0, 0
    pairs = np.zeros((capacity, 8), np.int32)
    table = np.zeros((geometry.layers, len(MODULES), capacity, 3), np.int32)
    scale = np.zeros((geometry.layers, len(MODULES), capacity), np.float32)
    page_list, listed = list_pages(parts, geometry)
    for start, end, chain in _cover(parts, bucket.tokens):
        first, each = filled, max(1, len(chain))
        strides = [_stride(part.placement, geometry, shape) for part in chain] or [0]
        for at in range(start, end, shape.span):
            n = min(shape.span, end - at)
            for place, stride in enumerate(strides):
                pairs[filled, :5] = at, n, 0 if place else each, low, stride
                low += n * stride
                filled += 1
        for place, part in enumerate(chain, first):
            placement, own = part.placement, slice(place, filled, each)
            pairs[own, 5] = listed[placement.digest]
            pairs[own, 6] = not placement.is_run
            pairs[own, 7] = STORAGES.index(placement.storage)
            table[:, :, own] = _addresses(placement, geometry)[:, :, None]
            scale[:, :, own] = (placement.scale * np.float32(part.scale))[..., None]
    assert low <= shape.low, f"{low} numbers of low-rank products, room for {shape.low}"
    return SpanArrays(pairs, np.array([filled], np.int32), table, scale, page_list)


def _stride(placement: Placement, geometry: Geometry, shape: SpanShape) -> int:
    """An adapter's highest rank, rounded up so that devices that share ranks have as many each."""
    highest = int((placement.rank.max(axis=0) * geometry.peers).max())
    return -(-highest // shape.peers) * shape.peers


def _cover(parts: Seq[Segment], tokens: int) -> Iterator[tuple[int, int, list[Segment]]]:
    """(start, end, their segments) of all tokens, in order."""
    at = 0
    for (start, end), chain in groupby(parts, lambda part: (part.start, part.end)):
        assert start >= at, f"segments overlap at token {start}"
        if at < start:
            yield at, start, []
        yield start, end, [*chain]
        at = end
    assert at <= tokens, f"a segment ends at token {at} of {tokens}"
    if at < tokens:
        yield at, tokens, []


def _addresses(placement: Placement, geometry: Geometry) -> np.ndarray:
    """First piece of A, first piece of B, and rank, int32 [L, 7, 3]."""
    storage, bits = placement.storage, geometry.word_bits
    page, rows = geometry.page_numbers, geometry.row_lengths
    widths = np.array([[row_piece(row, storage, bits, page) for row in pair] for pair in rows])
    first = placement.pages[0] * (geometry.page_numbers // widths) if placement.is_run else 0
    offsets = np.stack([placement.a_offset, placement.b_offset], axis=-1)  # [L, 7, 2]
    pieces = offsets // widths + first
    return np.concatenate([pieces, placement.rank[..., None]], axis=-1).astype(np.int32)
