"""LoRA work for the reference kernel: segments cut into blocks of ranks, batched into items.

Everything is resolved on the host, for every layer and module at once, and kept until rows or
adapters of a step change. Host only: no jax.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int32

from jslora.batch import Bucket, Geometry, Placement, Segment, list_pages
from jslora.model.config import MODULES
from pallas_kernels.lora.pieces import first_scale, row_piece, row_words, scale_groups

Pairs = Seq[Seq[int]]
"""Of each module, a number for A and one for B."""


class BlockShape(Protocol):
    """How work is cut into blocks (`pallas_kernels.lora.reference.BlockShape`)."""

    @property
    def tile(self) -> int: ...
    @property
    def blocks(self) -> int: ...


class BlockArrays(NamedTuple):
    """The lists of one composition of a step (`pallas_kernels.lora.reference.BlockWork`)."""

    blocks: np.ndarray  # int32 [L, 7, I * blocks, fields]
    scale: np.ndarray  # float32 [L, 7, I * blocks]
    items: np.ndarray  # int32 [L, 7]
    split: np.ndarray  # int32 []
    page_list: np.ndarray  # int32 [P]


def block_fields(geometry: Geometry) -> int:
    """Numbers of a block (`reference.Block`): the last four only if weights may be integers."""
    return 7 if geometry.storages == ("full",) else 11


def block_items(bucket: Bucket, geometry: Geometry, cut: BlockShape) -> int:
    """Most items one module can have: every row its own adapters of the highest ranks."""
    tiles = bucket.tokens // cut.tile
    each = -(-geometry.max_rank // geometry.rank_block) + geometry.max_composed - 1
    blocks = (bucket.rows + tiles) * each
    return tiles * len(geometry.storages) + -(-blocks // cut.blocks)


def pack_blocks(
    parts: Seq[Segment], bucket: Bucket, geometry: Geometry, cut: BlockShape
) -> BlockArrays:
    """Cut the segments into tiles and items, for every layer and module at once."""
    L, M = geometry.layers, len(MODULES)
    capacity = block_items(bucket, geometry, cut) * cut.blocks
    # Zeroed memory that is never touched is never paid for: the capacity is the worst case.
    blocks = np.zeros((L, M, capacity, block_fields(geometry)), np.int32)
    scale = np.zeros((L, M, capacity), np.float32)
    count = np.zeros((L, M), np.int32)
    page_list, listed = list_pages(parts, geometry)
    split = not all(part.placement.is_run for part in parts)
    for tile in range(0, bucket.tokens, cut.tile):
        inside = [part for part in parts if part.start < tile + cut.tile and part.end > tile]
        span = range(tile, tile + cut.tile)
        for storage in geometry.storages:  # an item has blocks of one only
            found = [_blocks(part, span, listed[part.placement.digest], split, geometry)
                     for part in inside if part.placement.storage == storage]  # fmt: skip
            if found:
                _append_tile(blocks, scale, count, found, cut.blocks)
    return BlockArrays(blocks, scale, count, np.asarray(split, np.int32), page_list)


def _blocks(
    part: Segment, tile: range, listed: int, split: bool, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """All blocks of a segment's adapter, [L, 7, n, fields] and scales [L, 7, n]; ranks 0 pads.

    Args:
        tile: tokens of a tile that has some of the segment's.
    """
    placement, storage = part.placement, part.placement.storage
    rank = np.arange(0, int(placement.rank.max()), geometry.rank_block)
    ranks = np.clip(placement.rank[..., None] - rank, 0, geometry.rank_block)
    page = 0 if split else placement.pages[0]
    found = np.zeros((*ranks.shape, block_fields(geometry)), np.int32)
    bits, pairs = geometry.word_bits, geometry.row_lengths
    words = [[row_words(row, storage, bits) for row in pair] for pair in pairs]
    widths = [[row_piece(row, storage, bits, geometry.page_numbers) for row in pair]
              for pair in pairs]  # fmt: skip
    offsets = np.stack([placement.a_offset, placement.b_offset], axis=-1)
    found[..., :2], shares = _pieces(offsets, placement, words, widths, rank, page, geometry)
    found[..., 2], found[..., 3] = max(part.start, tile.start), min(part.end, tile.stop)
    found[..., 4], found[..., 5], found[..., 6] = ranks, listed, shares[..., None]
    if storage != "full":
        groups = [[scale_groups(row, storage) for row in pair] for pair in pairs]
        widths = np.gcd(np.array(groups), geometry.page_numbers).tolist()
        offsets = _scale_offsets(offsets, placement, geometry)
        found[..., 7:9], shares = _pieces(offsets, placement, groups, widths, rank, page, geometry)
        found[..., 9] = shares[..., None]
        found[..., 10] = geometry.storages.index(storage)
    scale = placement.scale * np.float32(part.scale)
    return found, np.broadcast_to(scale[..., None], ranks.shape)


def _pieces(
    offsets: Int32[np.ndarray, "L 7 2"], placement: Placement, rows: Pairs, pieces: Pairs,
    rank: Int[np.ndarray, " n"], page: int, geometry: Geometry,
) -> tuple[Int[np.ndarray, "L 7 n 2"], Int[np.ndarray, "L 7"]]:  # fmt: skip
    """First pieces of A and of B from each of some ranks on, and pieces of B for one's ranks.

    Args:
        offsets: of the factors, in words.
        rows, pieces: words of their rows, and of the pieces these lie in.
        page: from whose beginning on pieces are counted.
    """
    length, widths = np.array(rows, np.int64), np.array(pieces, np.int64)  # [7, 2]
    first = (offsets[:, :, None] + rank[:, None] * length[:, None]) // widths[:, None]
    shares = placement.rank * (length // widths)[:, 1]
    return first + page * (geometry.page_numbers // widths)[:, None], shares


def _scale_offsets(
    offsets: Int32[np.ndarray, "L 7 2"], placement: Placement, geometry: Geometry
) -> Int32[np.ndarray, "L 7 2"]:
    """Where the scales of every factor begin, in words; anywhere where there are none."""
    found = np.empty_like(offsets)
    for column, pair in enumerate(geometry.row_lengths):
        counts = placement.rank[:, column], placement.rank[:, column] * geometry.peers[column]
        for side, (row, count) in enumerate(zip(pair, counts, strict=True)):
            found[:, column, side] = first_scale(
                offsets[:, column, side], count, row, placement.storage, geometry.word_bits,
                geometry.page_numbers,
            )  # fmt: skip
    return found


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
