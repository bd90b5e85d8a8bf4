"""The LoRA kernels in Pallas, lowered through Triton (see `segments` for what they walk).

Inside the kernels the pool is rows of one column block each, so an address is a block's number;
Pallas makes the offset in numbers from it, with 64 bits where the pool needs them. Traced numbers
are divided by `lax.div` and `lax.rem`, and a choice between numbers known at compile time is a sum
of steps: the lowering of `//` and of `jnp.where` on scalars cannot be relied upon.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.segments import Address, Pair, SegmentShape, SegmentWork
from pallas_kernels.lora.tiles import (
    INTERPRETED_PROGRAMS,
    Rows,
    Tiles,
    check_blocks,
    expand_tiles,
    in_blocks,
    shrink_tiles,
)

Scalar = Int32[Array, ""]
Ref = Any
"""An array in device memory, as kernels are given it; Pallas has no public type for that."""


def shrink(
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Scalar,
    layer: Scalar,
    work: SegmentWork,
    *,
    modules: tuple[int, ...],
    shape: SegmentShape,
    interpret: bool,
) -> Float[Array, " splits*modules*share"]:
    """The low-rank products of all pairs: `shape.share` numbers for each split and module.

    Args:
        interpret: run the kernel as XLA operations.
    """
    page = math.prod(pages.shape[1:])
    tiles = shrink_tiles(x.shape[1], page, shape, pages.dtype)
    check_blocks(pages.size, tiles.columns)
    programs = INTERPRETED_PROGRAMS if interpret else tiles.programs
    kernel = partial(
        _shrink_kernel, modules=modules, rows=in_blocks(x.shape[1], page, tiles.columns),
        shape=shape, tiles=tiles, programs=programs,
    )  # fmt: skip
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((shape.splits * len(modules) * shape.share,), np.float32),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lora_shrink",
    )(jnp.stack([first_page, layer]), work.pairs, work.total, work.table, work.page_list,
      pages.reshape(-1, tiles.columns), x)  # fmt: skip


def expand(
    y: Float[Array, "T out_all"],
    low: Float[Array, "*peers splits*modules*share"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Scalar,
    layer: Scalar,
    work: SegmentWork,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: SegmentShape,
    finish: Finish,
    stream: Float[Array, "T out"] | None,
    dtype: np.dtype,
    first: Scalar | None,
    interpret: bool,
) -> Float[Array, "T out"]:
    """What `finish` makes of the base output and all that the pairs add to it.

    Args:
        first: where the modules' columns begin in a y that is wider.
    """
    assert first is not None or sum(widths) == y.shape[1], f"{widths} in {y.shape[1]} columns"
    page = math.prod(pages.shape[1:])
    tiles = expand_tiles(widths, page, shape, pages.dtype)
    check_blocks(pages.size, tiles.columns)
    programs = INTERPRETED_PROGRAMS if interpret else tiles.programs
    kernel = partial(
        _expand_kernel, modules=modules,
        rows=tuple(in_blocks(width, page, tiles.columns) for width in widths),
        shape=shape, tiles=tiles, programs=programs, finish=finish,
    )  # fmt: skip
    own = [] if first is None else [lax.div(first, jnp.int32(tiles.columns))]
    where = jnp.stack([first_page, layer, *own])
    operands = [where, work.pairs, work.total, work.table, work.scale, work.page_list,
                pages.reshape(-1, tiles.columns), low.reshape(-1), y]  # fmt: skip
    if finish is Finish.GATED:
        out, aliases = jax.ShapeDtypeStruct((len(y), widths[0]), dtype), {}
    else:
        operands += [] if stream is None else [stream]
        out, aliases = jax.typeof(operands[-1]), {len(operands) - 1: 0}
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(programs,),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lora_expand",
    )(*operands)


def _shrink_kernel(
    where: Ref, pairs: Ref, count: Ref, table: Ref, page_list: Ref, pool: Ref, x: Ref, low: Ref,
    *, modules: tuple[int, ...], rows: Rows, shape: SegmentShape, tiles: Tiles, programs: int,
) -> None:  # fmt: skip
    """An item is a pair, one of the modules, and one part of the columns."""
    part = -(-rows.row // shape.splits)
    token = jnp.arange(shape.span)

    def item(w: Scalar) -> None:
        rest, split = _divide(w, shape.splits)
        i, module = _divide(rest, len(modules))
        which = _pick(modules, module)
        first = jnp.minimum(split * part, rows.row)
        end = jnp.minimum(first + part, rows.row)

        def block(n: Scalar, _: None) -> None:
            rank = n * tiles.ranks + jnp.arange(tiles.ranks)
            start = _address(table, where[1], which, i, "a") * rows.piece
            ranks = _address(table, where[1], which, i, "rank")
            factor = _Factor(
                pool,
                page_list,
                where[0],
                pairs,
                i,
                start + rank * rows.row,
                rank < ranks,
                rows.page,
            )
            product = _low_rank(x, factor, token, first, end, rows)
            base = (split * len(modules) + module) * shape.share
            at = base + _places(pairs, i, token, shape) + rank[None, :]
            mask = (token < _pair(pairs, i, "tokens"))[:, None] & (rank < ranks)[None, :]
            plgpu.store(low.at[at], product, mask=mask)

        ranks = _address(table, where[1], which, i, "rank")
        lax.fori_loop(0, _ceil(ranks, tiles.ranks), block, None)

    _stride(item, count[0] * (len(modules) * shape.splits), programs)


def _low_rank(
    x: Ref, factor: "_Factor", token: Int32[Array, " span"], first: Scalar, end: Scalar, rows: Rows
) -> Float[Array, "span ranks"]:
    """The products over column blocks [first, end), run by run of blocks that lie in a row."""
    width = factor.pool.shape[1]
    mine = (_pair(factor.pairs, factor.i, "start") + token)[:, None]
    ours = (token < _pair(factor.pairs, factor.i, "tokens"))[:, None]
    ours = jnp.broadcast_to(ours, (len(token), width))

    def add_run(r: Scalar, total: Array, run: Scalar) -> Array:
        # It can be negative; only with c added is it an index, which must not be (Pallas extends
        # it to 64 bits as if unsigned).
        place = factor.place(r * run) - r * run

        def add_block(c: Scalar, total: Array) -> Array:
            at = x.at[mine, (c * width + jnp.arange(width))[None, :]]
            return total + _dot(plgpu.load(at, mask=ours, other=0), factor.read(place + c).T)

        since, until = jnp.maximum(first, r * run), jnp.minimum(end, (r + 1) * run)
        return lax.fori_loop(since, until, add_block, total)

    nothing = jnp.zeros((len(token), len(factor.real)), jnp.float32)
    if rows.row == rows.piece:
        return add_run(jnp.int32(0), nothing, jnp.int32(rows.row))
    run = rows.row + _pair(factor.pairs, factor.i, "split") * (rows.piece - rows.row)
    return lax.fori_loop(lax.div(first, run), _ceil(end, run), partial(add_run, run=run), nothing)


def _expand_kernel(
    where: Ref, pairs: Ref, count: Ref, table: Ref, scale: Ref, page_list: Ref, pool: Ref, low: Ref,
    y: Ref, *stream_and_out: Ref,
    modules: tuple[int, ...], rows: tuple[Rows, ...], shape: SegmentShape, tiles: Tiles,
    programs: int, finish: Finish,
) -> None:  # fmt: skip
    """An item is a span of tokens and a column block of the result; it walks the span's chain."""
    *stream, out = stream_and_out
    starts = (0, *accumulate(row.row for row in rows))
    token, lane = jnp.arange(shape.span), jnp.arange(tiles.columns)
    blocks = rows[0].row if finish is Finish.GATED else starts[-1]

    def place(head: Scalar, tile: Scalar) -> tuple[Array, Array]:
        if len(where) == 3:  # the modules' columns are a part of y
            tile = tile + where[2]
        mine = (_pair(pairs, head, "start") + token)[:, None]
        return mine, (tile * tiles.columns + lane)[None, :]

    def masked(head: Scalar, condition: Bool[Array, ""]) -> Bool[Array, "span columns"]:
        ours = (token < _pair(pairs, head, "tokens")) & condition
        return jnp.broadcast_to(ours[:, None], (shape.span, tiles.columns))

    def sums(head: Scalar, tile: Scalar) -> tuple[Bool[Array, ""], Array]:
        """Whether there is a delta, and a block of base output with the deltas of a chain."""
        module = sum((_int(tile >= start) for start in starts[1:-1]), jnp.int32(0))
        which, column = _pick(modules, module), tile - _pick(starts, module)
        row, piece = (_pick(sizes, module) for sizes in list(zip(*rows, strict=True))[:2])

        def add_pair(i: Scalar, found: tuple[Scalar, Array]) -> tuple[Scalar, Array]:
            start = _address(table, where[1], which, i, "b") * piece
            share = _address(table, where[1], which, i, "rank")
            ranks = share * shape.peers

            def add_ranks(n: Scalar, total: Array) -> Array:
                rank = n * tiles.ranks + jnp.arange(tiles.ranks)
                factor = _Factor(
                    pool, page_list, where[0], pairs, i, start + rank * row, rank < ranks,
                    rows[0].page,
                )  # fmt: skip
                product = _sum_parts(low, module, len(modules), factor, rank, share, shape)
                product = product * scale[where[1], which, i]
                return total + _dot(product.astype(pool.dtype), factor.read(factor.place(column)))

            total = lax.fori_loop(0, _ceil(ranks, tiles.ranks), add_ranks, found[1])
            return found[0] + ranks, total

        nothing = jnp.int32(0), jnp.zeros((shape.span, tiles.columns), jnp.float32)
        chain = head + _pair(pairs, head, "chain")
        ranks, delta = lax.fori_loop(head, chain, add_pair, nothing)
        wanted = masked(head, (ranks > 0) | (finish is not Finish.SUM))
        return ranks > 0, delta + plgpu.load(y.at[place(head, tile)], mask=wanted, other=0)

    def item(w: Scalar) -> None:
        head, tile = _divide(w, blocks)
        changed, result = sums(head, tile)
        if finish is Finish.GATED:
            _, up = sums(head, tile + blocks)
            result = result / (1 + jnp.exp(-result)) * up
        whole = (_pair(pairs, head, "chain") > 0) & (changed | (finish is not Finish.SUM))
        mask, at = masked(head, whole), place(head, tile)
        if finish is Finish.RESIDUAL:
            before = plgpu.load(stream[0].at[at], mask=mask, other=0).astype(jnp.float32)
            result = before + result.astype(out.dtype).astype(jnp.float32)
        plgpu.store(out.at[at], result.astype(out.dtype), mask=mask)

    _stride(item, count[0] * blocks, programs)


def _sum_parts(
    low: Ref, module: Scalar, modules: int, factor: "_Factor", rank: Int32[Array, " ranks"],
    share: Scalar, shape: SegmentShape,
) -> Float[Array, "span ranks"]:  # fmt: skip
    """A pair's low-rank products, the parts of their sums added in order.

    Those of all peers lie behind each other, each of a `share` of the ranks.
    """
    token = jnp.arange(shape.span)
    mask = (token < _pair(factor.pairs, factor.i, "tokens"))[:, None] & factor.real[None, :]
    if shape.peers > 1:
        peer = lax.div(rank, jnp.full_like(rank, share))
        rank = rank + peer * (shape.splits * modules * shape.share - share)
    at = _places(factor.pairs, factor.i, token, shape) + rank[None, :]
    parts = [
        plgpu.load(low.at[at + (split * modules + module) * shape.share], mask=mask, other=0)
        for split in range(shape.splits)
    ]
    return sum(parts[1:], parts[0])


def _places(
    pairs: Ref, i: Scalar, token: Int32[Array, " span"], shape: SegmentShape
) -> Int32[Array, "span 1"]:
    """Where a device's products of each of a pair's tokens begin."""
    low, stride = (_divide(_pair(pairs, i, name), shape.peers)[0] for name in ("low", "stride"))
    return low + token[:, None] * stride


class _Factor(NamedTuple):
    """A block of ranks of one factor of pair `i`, and all it takes to read its columns.

    `starts` counts column blocks: from the layer's page 0, or, when the pair is split, from the
    adapter's own start. Ranks that are not `real` are neither looked up nor read.
    """

    pool: Ref
    page_list: Ref
    first_page: Scalar
    pairs: Ref
    i: Scalar
    starts: Int32[Array, " ranks"]
    real: Bool[Array, " ranks"]
    per_page: int

    def place(self, column: Scalar) -> Int32[Array, " ranks"]:
        """The block of the pool that holds each rank's column block."""
        page, rest = _divide(self.starts + column, self.per_page)
        listed = self.page_list.at[_pair(self.pairs, self.i, "pages") + page]
        split = _pair(self.pairs, self.i, "split") == 1
        page = plgpu.load(listed, mask=self.real & split, other=page)
        return (self.first_page + page) * self.per_page + rest

    def read(self, place: Int32[Array, " ranks"]) -> Float[Array, "ranks columns"]:
        """The numbers of these blocks, zero where a rank is not real."""
        at = self.pool.at[place[:, None], jnp.arange(self.pool.shape[1])[None, :]]
        mask = jnp.broadcast_to(self.real[:, None], (len(self.real), self.pool.shape[1]))
        return plgpu.load(at, mask=mask, other=0)


def _pair(pairs: Ref, i: Scalar, field: str) -> Scalar:
    """A field of a pair; loaded where it is used, for registers are scarcer than loads."""
    return pairs[i, Pair._fields.index(field)]


def _address(table: Ref, layer: Scalar, module: Scalar, i: Scalar, field: str) -> Scalar:
    return table[layer, module, i, Address._fields.index(field)]


def _stride(item: Callable[[Scalar], None], items: Scalar, programs: int) -> None:
    """Every program's share of the items."""
    first = pl.program_id(0)
    count = lax.div(items - first + (programs - 1), np.int32(programs))
    lax.fori_loop(0, count, lambda n, _: item(first + n * programs), None)


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """In float32; without the precision, float32 factors would be rounded to tf32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _pick(choices: Sequence[int], index: Scalar) -> Scalar:
    """One of a few numbers known at compile time."""
    steps = enumerate(pairwise(choices), start=1)
    return sum((_int(index >= n) * (b - a) for n, (a, b) in steps), jnp.int32(choices[0]))


def _divide(a: Array, b: int) -> tuple[Array, Array]:
    """Quotient and remainder of numbers that are not negative."""
    if b == 1:
        return a, jnp.zeros_like(a)
    return lax.div(a, jnp.full_like(a, b)), lax.rem(a, jnp.full_like(a, b))


def _ceil(a: Scalar, b: Scalar | int) -> Scalar:
    """The quotient, rounded up."""
    return lax.div(a + (b - 1), jnp.int32(b))


def _int(condition: Bool[Array, ""]) -> Scalar:
    return condition.astype(jnp.int32)
