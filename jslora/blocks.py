"""LoRA work for the reference kernel: segments cut into blocks of ranks, batched into items.

Everything is resolved on the host, for every layer and module at once, and kept until rows or
adapters of a step change. Host only: no jax.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np

from jslora.batch import Bucket, Geometry, Placement, Segment, list_pages
from jslora.model.config import MODULES


class BlockShape(Protocol):
    """How work is cut into blocks (`pallas_kernels.lora.reference.BlockShape`)."""

    @property
    def tile(self) -> int: ...
    @property
    def blocks(self) -> int: ...


class BlockArrays(NamedTuple):
    """The lists of one composition of a step (`pallas_kernels.lora.reference.BlockWork`)."""

    blocks: np.ndarray  # int32 [L, 7, I * blocks, 7]
    scale: np.ndarray  # float32 [L, 7, I * blocks]
    items: np.ndarray  # int32 [L, 7]
    split: np.ndarray  # int32 []
    page_list: np.ndarray  # int32 [P]


def block_items(bucket: Bucket, geometry: Geometry, cut: BlockShape) -> int:
    """Most items one module can have: every row its own adapter of the highest rank."""
    tiles = bucket.tokens // cut.tile
    blocks = (bucket.rows + tiles) * -(-geometry.max_rank // geometry.rank_block)
    return tiles + -(-blocks // cut.blocks)


def pack_blocks(
    parts: Seq[Segment], bucket: Bucket, geometry: Geometry, cut: BlockShape
) -> BlockArrays:
    """Cut the segments into tiles and items, for every layer and module at once."""
    L, M = geometry.layers, len(MODULES)
    capacity = block_items(bucket, geometry, cut) * cut.blocks
    # Zeroed memory that is never touched is never paid for: the capacity is the worst case.
    blocks = np.zeros((L, M, capacity, 7), np.int32)
    scale = np.zeros((L, M, capacity), np.float32)
    count = np.zeros((L, M), np.int32)
    page_list, listed = list_pages(parts, geometry)
    split = not all(part.placement.is_run for part in parts)
    for tile in range(0, bucket.tokens, cut.tile):
        inside = [part for part in parts if part.start < tile + cut.tile and part.end > tile]
        if inside:
            span = range(tile, tile + cut.tile)
            found = [_blocks(part, span, listed[part.placement.digest], split, geometry)
                     for part in inside]  # fmt: skip
            _append_tile(blocks, scale, count, found, cut.blocks)
    return BlockArrays(blocks, scale, count, np.asarray(split, np.int32), page_list)


def _blocks(
    part: Segment, tile: range, listed: int, split: bool, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """All blocks of a segment's adapter, int32 [L, 7, n, 7] and scales [L, 7, n]; ranks 0 pads.

    Args:
        tile: tokens of a tile that has some of the segment's.
    """
    placement = part.placement
    a, b, ranks = _cut(placement, geometry)
    rows = np.asarray(geometry.row_lengths, np.int64)
    widths = np.gcd(rows, geometry.page_numbers)  # [7, 2]
    per_page = geometry.page_numbers // widths
    first = 0 if split else placement.pages[0]
    found = np.empty((*ranks.shape, 7), np.int32)
    found[..., 0] = a + first * per_page[:, 0, None]
    found[..., 1] = b + first * per_page[:, 1, None]
    found[..., 2], found[..., 3] = max(part.start, tile.start), min(part.end, tile.stop)
    found[..., 4], found[..., 5] = ranks, listed
    found[..., 6] = (placement.rank * (rows // widths)[:, 1])[..., None]
    return found, np.broadcast_to(placement.scale[..., None], ranks.shape)


def _cut(placement: Placement, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of every layer and module, [L, 7, n]: first piece of A and of B, ranks."""
    rows = np.asarray(geometry.row_lengths, np.int64)
    widths = np.gcd(rows, geometry.page_numbers)
    first = np.arange(0, int(placement.rank.max()), geometry.rank_block)
    a = (placement.a_offset[..., None] + first * rows[:, :1]) // widths[:, :1]
    b = (placement.b_offset[..., None] + first * rows[:, 1:]) // widths[:, 1:]
    ranks = np.clip(placement.rank[..., None] - first, 0, geometry.rank_block)
    return a, b, ranks


def _append_tile(
    blocks: np.ndarray, scale: np.ndarray, count: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]], per_item: int,
) -> None:  # fmt: skip
    """Put one tile's blocks behind the others of each layer and module, whole items at a time."""
    new = np.concatenate([block for block, _ in found], axis=2)
    scales = np.concatenate([scale for _, scale in found], axis=2)
    real = new[..., 4] > 0
    order = np.argsort(~real, axis=2, kind="stable")  # the real ones first
    new = np.take_along_axis(new, order[..., None], axis=2)
    scales = np.take_along_axis(scales, order, axis=2)
    counts = real.sum(axis=2)
    room = min(-(-int(counts.max()) // per_item) * per_item, new.shape[2])
    ls, ms, at = np.nonzero(np.arange(room) < -(-counts // per_item)[..., None] * per_item)
    to = count[ls, ms] * per_item + at
    assert to.max(initial=0) < blocks.shape[2], f"{to.max()} LoRA blocks, room {blocks.shape[2]}"
    blocks[ls, ms, to] = new[ls, ms, at]
    scale[ls, ms, to] = scales[ls, ms, at]
    count += -(-counts // per_item).astype(np.int32)
