"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

The reference in plain jax.numpy: the contract of every other implementation, and what runs on CPU.
It walks a host-built work list. A block is up to RANK_BLOCK ranks of one adapter for a span of
tokens; an item is up to `shape.blocks` blocks, of any adapters, whose tokens lie in one tile of
the step. So time and bytes follow the true ranks present, and rows without an adapter are in no
block. An item costs two gathers of whole block rows and two products, with the blocks of other
tokens masked between them: on a CPU that is several times faster than one small product a block.

Invariant: numbers outside a block's tokens or ranks may be read but are selected away on the
low-rank product and on B, so neither a neighbour's weights nor a NaN among them reaches y.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

RANK_BLOCK = 8


class Shape(NamedTuple):
    """How a step's work is cut: tokens in a tile, blocks in an item."""

    tile: int
    blocks: int


def work_shape(tokens: int, *, prefill: bool) -> Shape:
    """Decode batches mix many adapters in a tile; a prefill tile mostly belongs to one."""
    return Shape(min(tokens, 32), 4 if prefill else 16)


class Block(NamedTuple):
    """The integer fields of a block, in the order they are packed.

    `a` and `b` are where the block's rows start, in pieces of the factor's width (`piece_width`):
    counted from the layer's page 0, or, when the work is `split`, from the adapter's own start,
    whose pages are `page_list[pages:]`. A block of no ranks pads an item.
    """

    a: Int32[Array, " blocks"]
    b: Int32[Array, " blocks"]
    start: Int32[Array, " blocks"]
    end: Int32[Array, " blocks"]
    ranks: Int32[Array, " blocks"]
    pages: Int32[Array, " blocks"]
    tile: Int32[Array, " blocks"]  # first token of the item's tile, the same in all its blocks


class Work(NamedTuple):
    """The work lists of one step, for every layer and each of its linear modules.

    A list holds its blocks item after item; only as many items as `items` says count.
    """

    blocks: Int32[Array, "L modules I*blocks 7"]
    scale: Float[Array, "L modules I*blocks"]
    items: Int32[Array, "L modules"]
    split: Int32[Array, ""]  # 1 when some adapter's pages do not follow each other
    page_list: Int32[Array, " P"]


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie in pages of `page` numbers."""
    return math.gcd(row, page)


def slack_pages(longest_row: int, page: int) -> int:
    """Pages that must follow the last layer so that no block's slice is moved back by clamping."""
    return -(-RANK_BLOCK * longest_row // page)


def add_lora(
    y: Float[Array, "T out_all"],
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    work: Work,
    layer: Int32[Array, ""],
    *,
    modules: tuple[int, ...],
    columns: tuple[int, ...],
    width: int,
    shape: Shape,
) -> Float[Array, "T out_all"]:
    """Add the deltas of modules of one width, each to its own columns of the base output.

    Args:
        y: base output in float32, of several modules side by side.
        x: the modules' common input.
        pages: the pool, slack pages behind the last layer included.
        first_page: row of the pool that is this layer's page 0.
        layer, modules: whose lists of `work` to walk, one after the other in a single loop.
        columns: where in y each module's `width` columns begin.
    """
    T, n = x.shape[0], shape.blocks
    assert T % shape.tile == 0, f"{T} tokens are not whole tiles of {shape.tile}"
    counts = work.items[layer, jnp.asarray(modules)]
    ends = jnp.cumsum(counts)

    def item(i: Int32[Array, ""], y: Float[Array, "T out_all"]) -> Float[Array, "T out_all"]:
        which = jnp.sum(i >= ends)
        module, column = jnp.asarray(modules)[which], jnp.asarray(columns)[which]
        first = (i - (ends - counts)[which]) * n
        fields = lax.dynamic_slice(work.blocks, (layer, module, first, 0), (1, 1, n, 7))
        scale = lax.dynamic_slice(work.scale, (layer, module, first), (1, 1, n)).reshape(n)
        block = Block(*fields.reshape(n, 7).T)
        tile = block.tile[0]
        a = _read(pages, first_page, block.a, block, work, x.shape[1])
        b = _read(pages, first_page, block.b, block, work, width)
        xs = lax.dynamic_slice(x, (tile, 0), (shape.tile, x.shape[1]))
        before = lax.dynamic_slice(y, (tile, column), (shape.tile, width))
        after = before + _delta(xs, a, b, block, scale)
        return lax.dynamic_update_slice(y, after, (tile, column))

    return lax.fori_loop(0, ends[-1], item, y)


def _delta(
    x: Float[Array, "t in"],
    a: Float[Array, "r in"],
    b: Float[Array, "r out"],
    block: Block,
    scale: Float[Array, " blocks"],
) -> Float[Array, "t out"]:
    """Both products of an item; r runs over the ranks of all its blocks."""
    rank = jnp.arange(RANK_BLOCK)[None] < block.ranks[:, None]  # [blocks, RANK_BLOCK]
    token = (block.tile[0] + jnp.arange(x.shape[0]))[:, None]
    ours = (token >= block.start) & (token < block.end)  # [t, blocks]
    low = jnp.einsum("rh,th->tr", a, x, preferred_element_type=jnp.float32)
    low = low.reshape(x.shape[0], -1, RANK_BLOCK) * scale[:, None]
    low = jnp.where(ours[:, :, None] & rank, low, 0).reshape(x.shape[0], -1)
    b = jnp.where(rank.reshape(-1, 1), b, 0)
    return jnp.einsum("tr,ro->to", low.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _read(
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    start: Int32[Array, " blocks"],
    block: Block,
    work: Work,
    row: int,
) -> Float[Array, "r row"]:
    """RANK_BLOCK rows from each start on: whole slices of a run of pages, else piece by piece."""
    page = math.prod(pages.shape[1:])
    W = piece_width(row, page)
    per_page, count = page // W, RANK_BLOCK * row // W
    pieces = pages.reshape(-1, W)
    layer = first_page * per_page

    def runs() -> Float[Array, "blocks n W"]:
        whole = lax.GatherDimensionNumbers(
            offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
        )
        return lax.gather(pieces, (layer + start)[:, None], whole, (count, W), mode="clip")

    def scattered() -> Float[Array, "blocks n W"]:
        at = start[:, None] + jnp.arange(count)
        page_id = work.page_list.at[block.pages[:, None] + at // per_page].get(mode="clip")
        return pieces.at[layer + page_id * per_page + at % per_page].get(mode="clip")

    return lax.cond(work.split == 1, scattered, runs).reshape(-1, row)
