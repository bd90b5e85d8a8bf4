"""The LoRA kernels in Pallas, lowered through Triton (see `segments` for what they walk).

What kernels must mind of the lowering is said in `pallas_factor`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.pallas_factor import (
    Factor,
    Ref,
    Scalar,
    as_int,
    ceil,
    divide,
    pair_field,
    pick,
)
from pallas_kernels.lora.pieces import STORAGES
from pallas_kernels.lora.segments import Address, SegmentShape, SegmentWork
from pallas_kernels.lora.tiles import (
    INTERPRETED_PROGRAMS,
    Rows,
    Tiles,
    check_blocks,
    expand_tiles,
    in_blocks,
    shrink_tiles,
)


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
        _shrink_kernel, modules=modules, shape=shape, tiles=tiles, programs=programs,
        rows=_every_storage(x.shape[1], page, tiles, shape, pages.dtype),
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
        rows=tuple(_every_storage(width, page, tiles, shape, pages.dtype) for width in widths),
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


def _every_storage(
    row: int, page: int, tiles: Tiles, shape: SegmentShape, dtype: np.dtype
) -> tuple[Rows, ...]:
    """How rows of `row` numbers lie in each of the storages that there may be."""
    return tuple(in_blocks(row, page, tiles.columns, name, dtype) for name in shape.storages)


def _shrink_kernel(
    where: Ref, pairs: Ref, count: Ref, table: Ref, page_list: Ref, pool: Ref, x: Ref, low: Ref,
    *, modules: tuple[int, ...], rows: tuple[Rows, ...], shape: SegmentShape, tiles: Tiles,
    programs: int,
) -> None:  # fmt: skip
    """An item is a pair, one of the modules, and one part of the columns."""
    token = jnp.arange(shape.span)

    def item(w: Scalar) -> None:
        rest, split = divide(w, shape.splits)
        i, module = divide(rest, len(modules))
        for each, storage in zip(rows, shape.storages, strict=True):
            stored(i, module, split, each, storage)

    def stored(i: Scalar, module: Scalar, split: Scalar, rows: Rows, storage: str) -> None:
        """The products of a pair whose weights are stored so; nothing for any other."""
        which = pick(modules, module)
        part = -(-rows.row // shape.splits)
        first = jnp.minimum(split * part, rows.row)
        end = jnp.minimum(first + part, rows.row)

        def block(n: Scalar, _: None) -> None:
            rank = n * tiles.ranks + jnp.arange(tiles.ranks)
            start = _address(table, where[1], which, i, "a")
            ranks = _address(table, where[1], which, i, "rank")
            factor = Factor.of(pool, page_list, where[0], pairs, i, start, rank, ranks, rows)
            product = _low_rank(x, factor, token, first, end, rows)
            base = (split * len(modules) + module) * shape.share
            at = base + _places(pairs, i, token, shape) + rank[None, :]
            mask = (token < pair_field(pairs, i, "tokens"))[:, None] & (rank < ranks)[None, :]
            plgpu.store(low.at[at], product, mask=mask)

        ranks = _address(table, where[1], which, i, "rank")
        ranks *= _is_stored(pairs, i, storage, shape)
        lax.fori_loop(0, ceil(ranks, tiles.ranks), block, None)

    _stride(item, count[0] * (len(modules) * shape.splits), programs)


def _low_rank(
    x: Ref, factor: Factor, token: Int32[Array, " span"], first: Scalar, end: Scalar, rows: Rows
) -> Float[Array, "span ranks"]:
    """The products over word blocks [first, end), run by run of blocks that lie in a row."""
    width = factor.pool.shape[1]
    mine = (pair_field(factor.pairs, factor.i, "start") + token)[:, None]
    ours = (token < pair_field(factor.pairs, factor.i, "tokens"))[:, None]
    ours = jnp.broadcast_to(ours, (len(token), width))

    def add_run(r: Scalar, total: Array, run: Scalar) -> Array:
        # It can be negative; only with c added is it an index, which must not be (Pallas extends
        # it to 64 bits as if unsigned).
        place = factor.place(r * run) - r * run

        def inputs(column: Scalar) -> Array:
            at = x.at[mine, (column * width + jnp.arange(width))[None, :]]
            return plgpu.load(at, mask=ours, other=0)

        def add_block(c: Scalar, total: Array) -> Array:
            if rows.packed == 1:
                return total + _dot(inputs(c), factor.words(place + c).T)
            words = factor.words(place + c)
            for nth in range(rows.packed):
                column = nth * rows.row + c
                total += _dot(inputs(column), factor.numbers(words, nth, column).T)
            return total

        since, until = jnp.maximum(first, r * run), jnp.minimum(end, (r + 1) * run)
        return lax.fori_loop(since, until, add_block, total)

    nothing = jnp.zeros((len(token), len(factor.real)), jnp.float32)
    if rows.row == rows.piece:
        return add_run(jnp.int32(0), nothing, jnp.int32(rows.row))
    run = rows.row + pair_field(factor.pairs, factor.i, "split") * (rows.piece - rows.row)
    return lax.fori_loop(lax.div(first, run), ceil(end, run), partial(add_run, run=run), nothing)


def _expand_kernel(
    where: Ref, pairs: Ref, count: Ref, table: Ref, scale: Ref, page_list: Ref, pool: Ref, low: Ref,
    y: Ref, *stream_and_out: Ref,
    modules: tuple[int, ...], rows: tuple[tuple[Rows, ...], ...], shape: SegmentShape,
    tiles: Tiles, programs: int, finish: Finish,
) -> None:  # fmt: skip
    """An item is a span of tokens and a column block of the result; it walks the span's chain."""
    *stream, out = stream_and_out
    starts = (0, *accumulate(row.row * row.packed for row, *_ in rows))
    token, lane = jnp.arange(shape.span), jnp.arange(tiles.columns)
    blocks = starts[1] if finish is Finish.GATED else starts[-1]

    def place(head: Scalar, tile: Scalar) -> tuple[Array, Array]:
        if len(where) == 3:  # the modules' columns are a part of y
            tile = tile + where[2]
        mine = (pair_field(pairs, head, "start") + token)[:, None]
        return mine, (tile * tiles.columns + lane)[None, :]

    def masked(head: Scalar, condition: Bool[Array, ""]) -> Bool[Array, "span columns"]:
        ours = (token < pair_field(pairs, head, "tokens")) & condition
        return jnp.broadcast_to(ours[:, None], (shape.span, tiles.columns))

    def sums(head: Scalar, tile: Scalar) -> tuple[Bool[Array, ""], Array]:
        """Whether there is a delta, and a block of base output with the deltas of a chain."""
        module = sum((as_int(tile >= start) for start in starts[1:-1]), jnp.int32(0))
        which, column = pick(modules, module), tile - pick(starts, module)

        def add_pair(i: Scalar, found: tuple[Scalar, Array]) -> tuple[Scalar, Array]:
            share, (_, total) = _address(table, where[1], which, i, "rank"), found
            for storage, each in zip(shape.storages, zip(*rows, strict=True), strict=True):
                total = add_stored(i, share, total, storage, _of(each, module))
            return found[0] + share * shape.peers, total

        def add_stored(i: Scalar, share: Scalar, total: Array, storage: str, rows: Rows) -> Array:
            ranks, nth, within = share * shape.peers, jnp.int32(0), column
            if rows.packed > 1:
                length = jnp.int32(rows.row)
                nth, within = lax.div(column, length), lax.rem(column, length)

            def add_ranks(n: Scalar, total: Array) -> Array:
                rank = n * tiles.ranks + jnp.arange(tiles.ranks)
                start = _address(table, where[1], which, i, "b")
                factor = Factor.of(pool, page_list, where[0], pairs, i, start, rank, ranks, rows)
                product = _sum_parts(low, module, len(modules), factor, share, shape)
                product = product * scale[where[1], which, i]
                words = factor.words(factor.place(within))
                numbers = factor.numbers(words, nth, column)
                return total + _dot(product.astype(pool.dtype), numbers)

            mine = ranks * _is_stored(pairs, i, storage, shape)
            return lax.fori_loop(0, ceil(mine, tiles.ranks), add_ranks, total)

        nothing = jnp.int32(0), jnp.zeros((shape.span, tiles.columns), jnp.float32)
        chain = head + pair_field(pairs, head, "chain")
        ranks, delta = lax.fori_loop(head, chain, add_pair, nothing)
        wanted = masked(head, (ranks > 0) | (finish is not Finish.SUM))
        return ranks > 0, delta + plgpu.load(y.at[place(head, tile)], mask=wanted, other=0)

    def item(w: Scalar) -> None:
        head, tile = divide(w, blocks)
        changed, result = sums(head, tile)
        if finish is Finish.GATED:
            _, up = sums(head, tile + blocks)
            result = result / (1 + jnp.exp(-result)) * up
        whole = (pair_field(pairs, head, "chain") > 0) & (changed | (finish is not Finish.SUM))
        mask, at = masked(head, whole), place(head, tile)
        if finish is Finish.RESIDUAL:
            before = plgpu.load(stream[0].at[at], mask=mask, other=0).astype(jnp.float32)
            result = before + result.astype(out.dtype).astype(jnp.float32)
        plgpu.store(out.at[at], result.astype(out.dtype), mask=mask)

    _stride(item, count[0] * blocks, programs)


def _sum_parts(
    low: Ref, module: Scalar, modules: int, factor: Factor, share: Scalar, shape: SegmentShape
) -> Float[Array, "span ranks"]:  # fmt: skip
    """A pair's low-rank products, the parts of their sums added in order.

    Those of all peers lie behind each other, each of a `share` of the ranks.
    """
    token, rank = jnp.arange(shape.span), factor.rank
    mask = (token < pair_field(factor.pairs, factor.i, "tokens"))[:, None] & factor.real[None, :]
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
    low, stride = (divide(pair_field(pairs, i, name), shape.peers)[0] for name in ("low", "stride"))
    return low + token[:, None] * stride


def _of(each: Sequence[Rows], module: Scalar) -> Rows:
    """How the rows of one of a kernel's modules lie, all in one storage."""
    fields = zip(*each, strict=True)
    picked: list[Any] = [
        alike[0] if len({*alike}) == 1 else pick(alike, module) for alike in fields
    ]
    return Rows(*picked)._replace(touched=max(rows.touched for rows in each))


def _is_stored(pairs: Ref, i: Scalar, storage: str, shape: SegmentShape) -> Scalar | int:
    """Whether a pair's weights are stored so, as a number."""
    if len(shape.storages) == 1:
        return 1
    return as_int(pair_field(pairs, i, "storage") == STORAGES.index(storage))


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
