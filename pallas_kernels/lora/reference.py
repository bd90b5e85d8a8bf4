"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

The reference in plain jax.numpy: the contract of every other implementation, and what runs on CPU.
It walks a host-built work list. A block is up to RANK_BLOCK ranks of one adapter for a span of
tokens; an item is up to `shape.blocks` blocks, of any adapters, whose tokens lie in one tile of
the step. So time and bytes follow the true ranks present, and rows without an adapter are in no
block. An item costs two gathers of whole block rows and two products, with the blocks of other
tokens masked between them: on a CPU that is several times faster than one small product a block.

Invariant: numbers outside a block's ranks are selected away as A and B are read, and tokens outside
it in the low-rank product; a weight of a block that is not finite reaches that block's tokens only.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.lora.pieces import RANK_BLOCK, piece_width


class BlockShape(NamedTuple):
    """How a step's work is cut: tokens in a tile, blocks in an item."""

    tile: int
    blocks: int


def block_shape(tokens: int, *, prefill: bool) -> BlockShape:
    """Decode batches mix many adapters in a tile; a prefill tile mostly belongs to one."""
    return BlockShape(min(tokens, 32), 8 if prefill else 16)


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


class BlockWork(NamedTuple):
    """The work lists of one step, for every layer and each of its linear modules.

    A list holds its blocks item after item; only as many items as `items` says count.
    """

    blocks: Int32[Array, "L modules I*blocks 7"]
    scale: Float[Array, "L modules I*blocks"]
    items: Int32[Array, "L modules"]
    split: Int32[Array, ""]  # 1 when some adapter's pages do not follow each other
    page_list: Int32[Array, " P"]


def add_lora(
    y: Float[Array, "T out_all"],
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: BlockWork,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: BlockShape,
) -> Float[Array, "T out_all"]:
    """As `pallas_kernels.lora.api.add_lora`; modules of one width share a loop."""
    for width in dict.fromkeys(widths):
        same = [i for i, other in enumerate(widths) if other == width]
        y = _add(
            y, x, pages, first_page, work, layer,
            modules=tuple(modules[i] for i in same),
            columns=tuple(sum(widths[:i]) for i in same),
            width=width, shape=shape,
        )  # fmt: skip
    return y


def _add(
    y: Float[Array, "T out_all"],
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    work: BlockWork,
    layer: Int32[Array, ""],
    *,
    modules: tuple[int, ...],
    columns: tuple[int, ...],
    width: int,
    shape: BlockShape,
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
    token = (block.tile[0] + jnp.arange(x.shape[0]))[:, None]
    ours = (token >= block.start) & (token < block.end)  # [t, blocks]
    low = jnp.einsum("rh,th->rt", a, x, preferred_element_type=jnp.float32).T
    low = low.reshape(x.shape[0], -1, RANK_BLOCK) * scale[:, None]
    low = jnp.where(ours[:, :, None], low, 0).reshape(x.shape[0], -1).astype(b.dtype)
    delta = jnp.einsum("tr,ro->to", low, b, preferred_element_type=jnp.float32)

    def isolated() -> Float[Array, "t out"]:
        """A weight that is not finite must spoil its own tokens, and no others (0 * NaN)."""
        sound = jnp.isfinite(b)
        clean = jnp.einsum(
            "tr,ro->to", low, jnp.where(sound, b, 0), preferred_element_type=jnp.float32
        )
        spoilt = ~jnp.all(sound.reshape(len(scale), -1), axis=1)  # [blocks]
        return jnp.where(jnp.any(ours & spoilt, axis=1)[:, None], jnp.nan, clean)

    return lax.cond(jnp.all(jnp.isfinite(delta)), lambda: delta, isolated)


def _read(
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    start: Int32[Array, " blocks"],
    block: Block,
    work: BlockWork,
    row: int,
) -> Float[Array, "r row"]:
    """RANK_BLOCK rows from each start on, zero where the block has fewer ranks.

    Runs of pages are read in whole slices, other adapters piece by piece.
    """
    page = math.prod(pages.shape[1:])
    W = piece_width(row, page)
    per_page, count = page // W, RANK_BLOCK * row // W
    pieces = pages.reshape(-1, W)
    layer = first_page * per_page
    rank = jnp.arange(count) // (row // W)
    true = (rank < block.ranks[:, None])[:, :, None]

    def runs() -> Float[Array, "blocks n W"]:
        whole = lax.GatherDimensionNumbers(
            offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
        )
        at = (layer + start)[:, None]
        return jnp.where(true, lax.gather(pieces, at, whole, (count, W), mode="clip"), 0)

    def scattered() -> Float[Array, "blocks n W"]:
        at = start[:, None] + jnp.arange(count)
        page_id = work.page_list.at[block.pages[:, None] + at // per_page].get(mode="clip")
        at = layer + page_id * per_page + at % per_page
        return jnp.where(true, pieces.at[at].get(mode="clip"), 0)

    return lax.cond(work.split == 1, scattered, runs).reshape(-1, row)
