"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

The reference in plain jax.numpy: the contract of every other implementation, and what runs on CPU.
It walks a host-built work list. A block is up to RANK_BLOCK ranks of one adapter for a span of
tokens; an item is up to `shape.blocks` blocks, of any adapters, whose tokens lie in one tile of
the step. So time and bytes follow the true ranks present, and rows without an adapter are in no
block. An item costs two gathers of whole block rows and two products, with the blocks of other
tokens masked between them: on a CPU that is several times faster than one small product a block.
Where devices' products meet before B, all items are walked once for A and once more for B.

Weights that are stored as integers (`pieces`) become numbers of the pool's dtype as they are read:
the deltas are, bit by bit, those of an adapter that has these numbers. An item's blocks are stored
alike, so that one choice serves them all.

Invariant: numbers outside a block's ranks are selected away as A and B are read, and tokens outside
it in the low-rank product; a weight of a block that is not finite reaches that block's tokens only.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.lora.finish import Finish, finish_sum
from pallas_kernels.lora.pieces import (
    BITS,
    RANK_BLOCK,
    packed_in_word,
    piece_width,
    row_piece,
    row_words,
    scale_groups,
)

Scalar = Int32[Array, ""]

_VIEW = 64  # words; a slice of so many lies in the slack behind the pool


class BlockShape(NamedTuple):
    """How a step's work is cut: tokens in a tile, blocks in an item; and how weights are stored."""

    tile: int
    blocks: int
    storages: tuple[str, ...] = ("full",)


def block_shape(tokens: int, *, prefill: bool, storages: tuple[str, ...] = ("full",)) -> BlockShape:
    """Decode batches mix many adapters in a tile; a prefill tile mostly belongs to one."""
    return BlockShape(min(tokens, 32), 8 if prefill else 16, storages)


class Block(NamedTuple):
    """The integer fields of a block, in the order they are packed.

    `a` and `b` are where the block's rows start, in pieces of the factor's width (`piece_width`):
    counted from the layer's page 0, or, when the work is `split`, from the adapter's own start,
    whose pages are `page_list[pages:]`. Where devices share the ranks, `share` pieces lie between
    B's rows for the ranks of one and those of the next. [start, end) are tokens of the item's tile.
    A block of no ranks pads an item, and is never its first.

    The last four there are only if weights may be stored as integers: where the scales of the
    block's ranks start, in pieces of their width, and how many pieces of B's scales lie between
    those for the ranks of one device and those of the next; and how all weights of the item's
    blocks are stored, by its place in `BlockShape.storages`.
    """

    a: Int32[Array, " blocks"]
    b: Int32[Array, " blocks"]
    start: Int32[Array, " blocks"]
    end: Int32[Array, " blocks"]
    ranks: Int32[Array, " blocks"]
    pages: Int32[Array, " blocks"]
    share: Int32[Array, " blocks"]
    a_scales: Int32[Array, " blocks"] | None = None
    b_scales: Int32[Array, " blocks"] | None = None
    scale_share: Int32[Array, " blocks"] | None = None
    storage: Int32[Array, " blocks"] | None = None


class BlockWork(NamedTuple):
    """The work lists of one step, for every layer and each of its linear modules.

    A list holds its blocks item after item; only as many items as `items` says count.
    """

    blocks: Int32[Array, "L modules I*blocks fields"]
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
        width = self.work.blocks.shape[3]
        fields = lax.dynamic_slice(self.work.blocks, (*at, 0), (1, 1, count, width))
        scale = lax.dynamic_slice(self.work.scale, at, (1, 1, count)).reshape(count)
        return Block(*fields.reshape(count, width).T), scale

    def tile(self, block: Block) -> Scalar:
        """First token of an item's tile."""
        return lax.div(block.start[0], jnp.int32(self.shape.tile)) * self.shape.tile

    def products(self, x: Float[Array, "T in"], block: Block) -> Float[Array, "t r"]:
        """Of all tokens of an item's tile with the ranks of all its blocks."""
        a = self.read(block.a, block.a_scales, block, x.shape[1])
        xs = lax.dynamic_slice(x, (self.tile(block), 0), (self.shape.tile, x.shape[1]))
        return jnp.einsum("rh,th->rt", a, xs, preferred_element_type=jnp.float32).T

    def read(
        self, start: Int32[Array, " blocks"], scales: Int32[Array, " blocks"] | None, block: Block,
        row: int,
    ) -> Float[Array, "r row"]:  # fmt: skip
        """RANK_BLOCK rows from each start on, zero where the block has fewer ranks."""
        pool = _Pool(self.pages, self.first_page, self.work, block)
        if scales is None or block.storage is None:
            return pool.rows(start, row)

        def stored(storage: str) -> Callable[[], Float[Array, "r row"]]:
            if storage == "full":
                return lambda: pool.rows(start, row)
            return lambda: pool.integers(start, scales, row, storage)

        return lax.switch(block.storage[0], [stored(storage) for storage in self.shape.storages])


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
        b = lists.read(block.b, block.b_scales, block, width)
        after = before + _delta(low, b, block, scale, tile)
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
    repeated = jax.tree.map(lambda field: jnp.tile(field, peers), block)
    nth = jnp.repeat(jnp.arange(peers), len(scale))
    repeated = repeated._replace(b=repeated.b + nth * repeated.share)
    if repeated.b_scales is not None and repeated.scale_share is not None:
        b_scales = repeated.b_scales + nth * repeated.scale_share
        repeated = repeated._replace(b_scales=b_scales)
    return repeated, jnp.tile(scale, peers)


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


class _Pool(NamedTuple):
    """The pool as one item's blocks read it; ranks that a block does not have are zero."""

    pages: Float[Array, "pages S 2 K D"]
    first_page: Scalar
    work: BlockWork
    block: Block

    @property
    def page(self) -> int:
        """Words in a page."""
        return math.prod(self.pages.shape[1:])

    def rows(self, start: Int32[Array, " blocks"], row: int) -> Float[Array, "r row"]:
        """RANK_BLOCK rows from each start on.

        Runs of pages are read in whole slices, other adapters piece by piece.
        """
        W = piece_width(row, self.page)
        per_page, count = self.page // W, RANK_BLOCK * row // W
        pieces = self.pages.reshape(-1, W)
        layer = self.first_page * per_page
        rank = jnp.arange(count) // (row // W)
        true = (rank < self.block.ranks[:, None])[:, :, None]

        def runs() -> Float[Array, "blocks n W"]:
            whole = lax.GatherDimensionNumbers(
                offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
            )
            at = (layer + start)[:, None]
            return jnp.where(true, lax.gather(pieces, at, whole, (count, W), mode="clip"), 0)

        def scattered() -> Float[Array, "blocks n W"]:
            at = start[:, None] + jnp.arange(count)
            at = layer + self._page_of(at, per_page) * per_page + at % per_page
            return jnp.where(true, pieces.at[at].get(mode="clip"), 0)

        return lax.cond(self.work.split == 1, scattered, runs).reshape(-1, row)

    def integers(
        self, start: Int32[Array, " blocks"], scales: Int32[Array, " blocks"], row: int,
        storage: str,
    ) -> Float[Array, "r row"]:  # fmt: skip
        """RANK_BLOCK rows of `row` numbers from each start on that are stored as integers."""
        dtype, bits = self.pages.dtype, BITS[storage]
        size = 8 * dtype.itemsize
        k, groups = packed_in_word(storage, size), scale_groups(row, storage)
        words = self._words(
            start, row_words(row, storage, size), row_piece(row, storage, size, self.page)
        )
        words = lax.bitcast_convert_type(words, f"uint{size}")
        factors = self._words(scales, groups, piece_width(groups, self.page)).astype(jnp.float32)
        true = (jnp.arange(RANK_BLOCK) < self.block.ranks[:, None]).reshape(-1, 1)
        factors = jnp.where(true, factors, 0)  # of integers whatever they are nothing is left then
        # A lane has whole groups or, of wide ones, a part of one. They are taken one by one and as
        # [groups, rest]: XLA:CPU is several times slower where it has to find each column's place.
        own = max(1, groups // k)
        factors = jnp.repeat(factors, k * own // groups, axis=1).reshape(-1, k, own, 1)
        lanes = []
        for lane in range(k):
            top = lax.bitcast_convert_type(words << (size - bits * (lane + 1)), f"int{size}")
            integers = (top >> (size - bits)).astype(jnp.float32)
            numbers = integers.reshape(len(words), own, -1) * factors[:, lane]
            lanes.append(numbers.astype(dtype))
        return jnp.stack(lanes, axis=1).reshape(-1, row)

    def _words(self, start: Int32[Array, " blocks"], row: int, W: int) -> Float[Array, "r row"]:
        """Whatever lies in RANK_BLOCK rows of `row` words from each start on, in pieces of W.

        XLA:CPU gathers narrow pieces several times more slowly than it copies slices. Pieces may be
        as narrow as one word, too many to be numbered through the whole pool.
        """
        page, count = self.page, RANK_BLOCK * row

        def runs() -> Float[Array, "blocks n"]:
            V = math.gcd(page, _VIEW)
            lines = self.pages.reshape(-1, V)
            length = (count + V - 2) // V + 1

            def copy(i: Scalar, found: Float[Array, "blocks n"]) -> Float[Array, "blocks n"]:
                word = start[i] * W
                line = self.first_page * (page // V) + word // V
                near = lax.dynamic_slice(lines, (line, 0), (length, V)).reshape(-1)
                one = lax.dynamic_slice(near, (word % V,), (count,))
                return lax.dynamic_update_slice(found, one[None], (i, 0))

            empty = jnp.zeros((len(start), count), lines.dtype)
            return lax.fori_loop(0, len(start), copy, empty)

        def scattered() -> Float[Array, "blocks n"]:
            at = start[:, None] + jnp.arange(count // W)
            place = self.first_page + self._page_of(at, page // W), at % (page // W) * W
            one = lax.GatherDimensionNumbers(
                offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
            )
            pages, at = self.pages.reshape(-1, page), jnp.stack(place, axis=-1)
            return lax.gather(pages, at, one, (1, W), mode="clip").reshape(len(start), -1)

        return lax.cond(self.work.split == 1, scattered, runs).reshape(-1, row)

    def _page_of(self, at: Int32[Array, "blocks n"], per_page: int) -> Int32[Array, "blocks n"]:
        """The page of the layer in which a piece lies, counted from an adapter's own start."""
        nth = self.block.pages[:, None] + at // per_page
        return self.work.page_list.at[nth].get(mode="clip")
