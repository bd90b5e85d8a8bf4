"""LoRA work for the GPU kernels: segments cut into spans of tokens, addresses per layer and module.

Tokens without an adapter are in spans too, of rank 0: they have no delta, but what follows the sum
(`pallas_kernels.lora.finish`) is done for them all the same.

Small enough to be sent whenever rows or adapters of a step change: about 8 KB a layer for 64 rows,
whatever the ranks. Host only: no jax.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np

from jslora.batch import Bucket, Geometry, Placement, Segment, list_pages
from jslora.model.config import MODULES


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


def span_pairs(bucket: Bucket, shape: SpanShape) -> int:
    """Most pairs of a step: the rows and the padding, each in whole spans and one more."""
    return bucket.rows + 1 + bucket.tokens // shape.span


def pack_spans(
    parts: Seq[Segment], bucket: Bucket, geometry: Geometry, shape: SpanShape
) -> SpanArrays:
    """Cut all tokens of a step into spans, each a pair: no two adapters share tokens."""
    capacity, filled, low = span_pairs(bucket, shape), 0, 0
    pairs = np.zeros((capacity, 8), np.int32)
    table = np.zeros((geometry.layers, len(MODULES), capacity, 3), np.int32)
    scale = np.zeros((geometry.layers, len(MODULES), capacity), np.float32)
    page_list, listed = list_pages(parts, geometry)
    for start, end, placement in _cover(parts, bucket.tokens):
        first = filled
        stride = _stride(placement, geometry, shape) if placement else 0
        for at in range(start, end, shape.span):
            n = min(shape.span, end - at)
            pairs[filled, :5] = at, n, 1, low, stride
            low += n * stride
            filled += 1
        if placement is not None:
            pairs[first:filled, 5] = listed[placement.digest]
            pairs[first:filled, 6] = not placement.is_run
            table[:, :, first:filled] = _addresses(placement, geometry)[:, :, None]
            scale[:, :, first:filled] = placement.scale[..., None]
    assert low <= shape.low, f"{low} numbers of low-rank products, room for {shape.low}"
    return SpanArrays(pairs, np.array([filled], np.int32), table, scale, page_list)


def _stride(placement: Placement, geometry: Geometry, shape: SpanShape) -> int:
    """An adapter's highest rank, rounded up so that devices that share ranks have as many each."""
    highest = int((placement.rank.max(axis=0) * geometry.peers).max())
    return -(-highest // shape.peers) * shape.peers


def _cover(parts: Seq[Segment], tokens: int) -> Iterator[tuple[int, int, Placement | None]]:
    """(start, end, adapter) of all tokens, in order."""
    at = 0
    for part in parts:
        if at < part.start:
            yield at, part.start, None
        yield part.start, part.end, part.placement
        at = part.end
    assert at <= tokens, f"a segment ends at token {at} of {tokens}"
    if at < tokens:
        yield at, tokens, None


def _addresses(placement: Placement, geometry: Geometry) -> np.ndarray:
    """First piece of A, first piece of B, and rank, int32 [L, 7, 3]."""
    rows = np.asarray(geometry.row_lengths, np.int64)
    widths = np.gcd(rows, geometry.page_numbers)  # [7, 2]
    first = placement.pages[0] * (geometry.page_numbers // widths) if placement.is_run else 0
    offsets = np.stack([placement.a_offset, placement.b_offset], axis=-1)  # [L, 7, 2]
    pieces = offsets // widths + first
    return np.concatenate([pieces, placement.rank[..., None]], axis=-1).astype(np.int32)
