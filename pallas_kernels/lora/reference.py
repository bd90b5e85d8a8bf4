"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

The reference in plain jax.numpy: the contract of every other implementation, and what runs on CPU.
It walks a host-built work list. A block is up to RANK_BLOCK ranks of one adapter for a span of
tokens; an item is up to `shape.blocks` blocks, of any adapters, whose tokens lie in one tile of
the step. So time and bytes follow the true ranks present, and rows without an adapter are in no
block. An item costs two gathers of whole block rows and two products, with the blocks of other
tokens masked between them: on a CPU that is several times faster than one small product a block.
Where devices' products meet before B, all items are walked once for A and once more for B.

Invariant: numbers outside a block's ranks are selected away as A and B are read, and tokens outside
it in the low-rank product; a weight of a block that is not finite reaches that block's tokens only.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.lora.finish import Finish, finish_sum
from pallas_kernels.lora.pieces import RANK_BLOCK, piece_width

Scalar = Int32[Array, ""]


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
    whose pages are `page_list[pages:]`. Where devices share the ranks, `share` pieces lie between
    B's rows for the ranks of one and those of the next. [start, end) are tokens of the item's tile.
    A block of no ranks pads an item, and is never its first.
    """

    a: Int32[Array, " blocks"]
    b: Int32[Array, " blocks"]
    start: Int32[Array, " blocks"]
    end: Int32[Array, " blocks"]
    ranks: Int32[Array, " blocks"]
    pages: Int32[Array, " blocks"]
    share: Int32[Array, " blocks"]


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
    first_page: Scalar,
    layer: Scalar,
    work: BlockWork,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: BlockShape,
    finish: Finish,
    stream: Float[Array, "T out"] | None,
    dtype: np.dtype,
) -> Float[Array, "T out"]:
    """As `pallas_kernels.lora.api.add_lora` on one device, with one walk over the items."""
    lists = _Lists(pages, first_page, layer, work, shape)
    made: Products = lambda which, n, block: lists.products(x, block)  # noqa: E731
    return finish_sum(_add(y, lists, made, 1, modules, widths), finish, stream, dtype)


def shrink(
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Scalar,
    layer: Scalar,
    work: BlockWork,
    *,
    modules: tuple[int, ...],
    shape: BlockShape,
) -> Float[Array, "modules I t r"]:
    """The low-rank products of every item of some modules, with room for the most there can be."""
    lists = _Lists(pages, first_page, layer, work, shape)

    def item(which: Scalar, n: Scalar, low: Array) -> Array:
        block, _ = lists.take(jnp.asarray(modules)[which], n)
        made = lists.products(x, block)
        return lax.dynamic_update_slice(low, made[None, None], (which, n, 0, 0))

    most = work.blocks.shape[2] // shape.blocks
    room = (len(modules), most, shape.tile, shape.blocks * RANK_BLOCK)
    return lists.walk(modules, item, jnp.zeros(room, jnp.float32))


def expand(
    y: Float[Array, "T out_all"],
    low: Float[Array, "peers modules I t r"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Scalar,
    layer: Scalar,
    work: BlockWork,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: BlockShape,
    finish: Finish,
    stream: Float[Array, "T out"] | None,
    dtype: np.dtype,
    first: Scalar | None,
) -> Float[Array, "T out"]:
    """Add what B makes of the products of all peers, who have a share of the ranks each.

    Args:
        first: where the modules' columns begin in a y that is wider.
    """
    peers, *_, t, r = low.shape

    def made(which: Scalar, n: Scalar, block: Block) -> Float[Array, "t peers*r"]:
        item = lax.dynamic_slice(low, (0, which, n, 0, 0), (peers, 1, 1, t, r))
        return item.reshape(peers, t, r).swapaxes(0, 1).reshape(t, peers * r)

    lists = _Lists(pages, first_page, layer, work, shape)
    y = _add(y, lists, made, peers, modules, widths, first)
    return finish_sum(y, finish, stream, dtype)


Products = Callable[[Scalar, Scalar, Block], Float[Array, "t peers*r"]]
"""(place in the modules, number of the item, its blocks) to the item's low-rank products."""


class _Lists(NamedTuple):
    """The lists of a layer, and the pool into which they point."""

    pages: Float[Array, "pages S 2 K D"]
    first_page: Scalar
    layer: Scalar
    work: BlockWork
    shape: BlockShape

    def walk(
        self, modules: tuple[int, ...], body: Callable[[Scalar, Scalar, Array], Array], carry: Array
    ) -> Array:
        """Carry through `body` (place in the modules, number of the item, carried) in one loop."""
        counts = self.work.items[self.layer, jnp.asarray(modules)]
        ends = jnp.cumsum(counts)

        def item(i: Scalar, carry: Array) -> Array:
            which = jnp.sum(i >= ends)
            return body(which, i - (ends - counts)[which], carry)

        return lax.fori_loop(0, ends[-1], item, carry)

    def take(self, module: Scalar, n: Scalar) -> tuple[Block, Float[Array, " blocks"]]:
        """The blocks of a module's nth item, and their scales."""
        count = self.shape.blocks
        at = (self.layer, module, n * count)
        fields = lax.dynamic_slice(self.work.blocks, (*at, 0), (1, 1, count, 7))
        scale = lax.dynamic_slice(self.work.scale, at, (1, 1, count)).reshape(count)
        return Block(*fields.reshape(count, 7).T), scale

    def tile(self, block: Block) -> Scalar:
        """First token of an item's tile."""
        return lax.div(block.start[0], jnp.int32(self.shape.tile)) * self.shape.tile

    def products(self, x: Float[Array, "T in"], block: Block) -> Float[Array, "t r"]:
        """Of all tokens of an item's tile with the ranks of all its blocks."""
        a = self.read(block.a, block, x.shape[1])
        xs = lax.dynamic_slice(x, (self.tile(block), 0), (self.shape.tile, x.shape[1]))
        return jnp.einsum("rh,th->rt", a, xs, preferred_element_type=jnp.float32).T

    def read(self, start: Int32[Array, " blocks"], block: Block, row: int) -> Float[Array, "r row"]:
        """RANK_BLOCK rows from each start on, zero where the block has fewer ranks."""
        return _read(self.pages, self.first_page, start, block, self.work, row)


def _add(
    y: Float[Array, "T out_all"],
    lists: _Lists,
    products: Products,
    peers: int,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    first: Scalar | None = None,
) -> Float[Array, "T out_all"]:
    """Add the deltas of modules side by side, those of one width in one loop."""
    T, tile = y.shape[0], lists.shape.tile
    assert T % tile == 0, f"{T} tokens are not whole tiles of {tile}"

    def item(
        nth: Scalar, n: Scalar, y: Float[Array, "T out_all"], same: tuple[int, ...]
    ) -> Float[Array, "T out_all"]:
        module, column, which = (
            jnp.asarray(of)[nth]
            for of in ([modules[i] for i in same], [sum(widths[:i]) for i in same], same)
        )
        block, scale = lists.take(module, n)
        low, tile, width = products(which, n, block), lists.tile(block), widths[same[0]]
        block, scale = _for_all(peers, block, scale)
        if first is not None:
            column = column + first
        before = lax.dynamic_slice(y, (tile, column), (lists.shape.tile, width))
        after = before + _delta(low, lists.read(block.b, block, width), block, scale, tile)
        return lax.dynamic_update_slice(y, after, (tile, column))

    for width in dict.fromkeys(widths):
        same = tuple(i for i, other in enumerate(widths) if other == width)
        y = lists.walk(tuple(modules[i] for i in same), partial(item, same=same), y)
    return y


def _for_all(
    peers: int, block: Block, scale: Float[Array, " blocks"]
) -> tuple[Block, Float[Array, " peers*blocks"]]:
    """An item's blocks for the ranks of each of the peers in turn."""
    if peers == 1:
        return block, scale
    repeated = Block(*(jnp.tile(field, peers) for field in block))
    nth = jnp.repeat(jnp.arange(peers), len(scale))
    return repeated._replace(b=repeated.b + nth * repeated.share), jnp.tile(scale, peers)


def _delta(
    low: Float[Array, "t r"],
    b: Float[Array, "r out"],
    block: Block,
    scale: Float[Array, " blocks"],
    tile: Scalar,
) -> Float[Array, "t out"]:
    """What B makes of the products of an item; r runs over the ranks of all its blocks."""
    token = (tile + jnp.arange(len(low)))[:, None]
    ours = (token >= block.start) & (token < block.end)  # [t, blocks]
    low = low.reshape(len(low), -1, RANK_BLOCK) * scale[:, None]
    low = jnp.where(ours[:, :, None], low, 0).reshape(len(low), -1).astype(b.dtype)
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
