"""Paged attention as two Pallas kernels (Triton lowering), interpreted on a CPU.

A program of the first kernel takes tiles (an item, a kv head, and some of the item's tokens) and
walks the positions that each sees in blocks, with an online softmax. An item that is all its row
needs is written to the output at once; one of several parts leaves its sum, maximum and total to
the second kernel, which merges the parts of a row, always in the same order.

Invariant: what a row does not see reads as zero and is masked in the scores again; no number of the
output or of the parts is written by two programs.
"""

from collections.abc import Callable
from functools import partial
from math import e, log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Item, Rows
from pallas_kernels.paged_attention.tiles import (
    INTERPRETED_PROGRAMS,
    PROGRAMS,
    STAGES,
    WARPS,
    Tile,
    make_tile,
    outputs,
    power_of_two,
)

Ref = Any
"""An array in memory, as a kernel sees it; its shape is annotated as an array's."""
_MASKED = -1e30


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    *,
    scale: float,
    prefill: bool,
    cut: Cut,
    interpret: bool = False,
) -> Float[Array, "T N D"]:
    """As `pallas_kernels.paged_attention.api.paged_attention`."""
    count, S, _, K, D = pages.shape
    tile = make_tile(q, pages, cut, prefill=prefill)
    result, sums, stats = pl.pallas_call(
        partial(_attend, tile=tile, page_size=S, scale=scale * log2(e)),
        out_shape=outputs(q, rows, cut),
        grid=(INTERPRETED_PROGRAMS if interpret else PROGRAMS,),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="paged_attention",
    )(
        jnp.reshape(first_page, 1), rows.block_table, rows.parts, rows.items, rows.total,
        q, pages.reshape(count * S, 2 * K, D),
    )  # fmt: skip
    if cut.parts == 1:
        return result
    return pl.pallas_call(
        _merge,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=sums.shape[::2],
        input_output_aliases={4: 0},
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="paged_attention_merge",
    )(rows.parts, rows.start, sums, stats, result)


def _attend(
    first_page: Int32[Ref, "1"],
    table: Int32[Ref, "B M"],
    parts: Int32[Ref, " B"],
    items: Int32[Ref, "I 6"],
    count: Int32[Ref, "1"],
    q: Float[Ref, "T N D"],
    pages: Float[Ref, "positions 2*K D"],
    out: Float[Ref, "T N D"],
    sums: Float[Ref, "B parts N D"],
    stats: Float[Ref, "2 B parts N"],
    *,
    tile: Tile,
    page_size: int,
    scale: float,
) -> None:
    """One program's tiles; `scale` is for scores to base 2."""
    kv_heads, D = pages.shape[1] // 2, pages.shape[2]
    in_token, in_group = _divide(jnp.arange(tile.rows), tile.lanes)
    d = jnp.arange(D)[None, :]
    program, programs = pl.program_id(0), pl.num_programs(0)

    def attend(i: Int32[Array, ""], _: None) -> None:
        pair, split = _divide(program + i * programs, tile.splits)
        index, kv_head = _divide(pair, kv_heads)
        item = Item(*(items[index, field] for field in range(len(Item._fields))))
        item = _narrow(item, split * tile.tokens, tile.tokens)
        token, head = item.start + in_token, kv_head * tile.group + in_group
        ours = (in_token < item.tokens) & (in_group < tile.group)
        at = token[:, None], head[:, None], d
        acc, high, total = _softmax_over_positions(
            plgpu.load(q.at[at], mask=_columns(ours, D), other=0), item,
            sees=item.end - item.tokens + 1 + in_token,
            read=partial(_read, first_page[0], table, pages, item.row, kv_head, page_size),
            positions=tile.positions, scale=scale,
        )  # fmt: skip
        whole = parts[item.row] <= 1
        result = (acc / total[:, None]).astype(out.dtype)
        plgpu.store(out.at[at], result, mask=_columns(ours & whole, D))
        if sums.shape[1] > 1:
            ours &= ~whole
            # The interpreter writes back what stands where masked rows point: point them nowhere.
            head = jnp.where(ours, head, sums.shape[2])
            part = item.row, item.part
            plgpu.store(sums.at[*part, head[:, None], d], acc, mask=_columns(ours, D))
            plgpu.store(stats.at[0, *part, head], high, mask=ours)
            plgpu.store(stats.at[1, *part, head], total, mask=ours)

    tiles = count[0] * (kv_heads * tile.splits)
    lax.fori_loop(0, _blocks(tiles - program, jnp.int32(programs)), attend, None)


def _narrow(item: Item, first: Int32[Array, ""], tokens: int) -> Item:
    """Up to `tokens` of an item's tokens from the `first` on, and the positions that they see."""
    left = item.tokens - first
    found = jnp.minimum(left, tokens)
    end = jnp.where(found > 0, item.end - left + found, item.first)
    return item._replace(start=item.start + first, tokens=found, end=end)


def _softmax_over_positions(
    query: Float[Array, "rows D"],
    item: Item,
    *,
    sees: Int32[Array, " rows"],
    read: Callable,
    positions: int,
    scale: float,
) -> tuple[Float[Array, "rows D"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Weighted sum of the values, maximum of the scores, and sum of the weights 2^(score - max).

    A query sees the item's positions below its `sees`; `read` is `_read` of the item.
    """

    def block(i: Int32[Array, ""], carry: tuple) -> tuple:
        acc, high, total = carry
        position = item.first + i * positions + jnp.arange(positions)
        there = position < item.end
        key, value = read(position, there)
        scores = plgpu.dot(query, key, trans_b=True, precision=lax.Precision.HIGHEST) * scale
        visible = there[None, :] & (position[None, :] < sees[:, None])
        scores = jnp.where(visible, scores, _MASKED)
        new_high = jnp.maximum(high, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_high[:, None])
        scaling = jnp.exp2(high - new_high)
        update = plgpu.dot(weights.astype(value.dtype), value, precision=lax.Precision.HIGHEST)
        return acc * scaling[:, None] + update, new_high, total * scaling + jnp.sum(weights, axis=1)

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full(query.shape[0], _MASKED, jnp.float32),
        jnp.zeros(query.shape[0], jnp.float32),
    )
    blocks = _blocks(item.end - item.first, jnp.int32(positions))
    return lax.fori_loop(0, blocks, block, start)


def _read(
    first_page: Int32[Array, ""],
    table: Int32[Ref, "B M"],
    pages: Float[Ref, "positions 2*K D"],
    row: Int32[Array, ""],
    kv_head: Int32[Array, ""],
    page_size: int,
    position: Int32[Array, " s"],
    there: Bool[Array, " s"],
) -> tuple[Float[Array, "s D"], Float[Array, "s D"]]:
    """Keys and values at those positions of a row that are `there`, and zeros."""
    kv_heads, D = pages.shape[1] // 2, pages.shape[2]
    page, in_page = _divide(position, page_size)
    page = plgpu.load(table.at[row, page], mask=there, other=0)
    at, d = ((first_page + page) * page_size + in_page)[:, None], jnp.arange(D)[None, :]
    mask = _columns(there, D)
    key = plgpu.load(pages.at[at, kv_head, d], mask=mask, other=0)
    value = plgpu.load(pages.at[at, kv_heads + kv_head, d], mask=mask, other=0)
    return key, value


def _merge(
    parts: Int32[Ref, " B"],
    start: Int32[Ref, " B"],
    sums: Float[Ref, "B parts N D"],
    stats: Float[Ref, "2 B parts N"],
    before: Float[Ref, "T N D"],
    out: Float[Ref, "T N D"],
) -> None:
    """One head of one row: the parts' sums, brought to a common maximum, over their weights."""
    row, head, D = pl.program_id(0), pl.program_id(1), out.shape[2]

    @pl.when(parts[row] > 1)
    def _() -> None:
        part, d = jnp.arange(power_of_two(sums.shape[1])), jnp.arange(D)
        there = part < parts[row]
        high = plgpu.load(stats.at[0, row, part, head], mask=there, other=_MASKED)
        total = plgpu.load(stats.at[1, row, part, head], mask=there, other=0)
        at = row, part[:, None], head, d[None, :]
        acc = plgpu.load(sums.at[at], mask=_columns(there, D), other=0)
        scaling = jnp.exp2(high - jnp.max(high))
        result = jnp.sum(acc * scaling[:, None], axis=0) / jnp.sum(total * scaling)
        out[start[row], head, d] = result.astype(out.dtype)


def _columns(mask: Bool[Array, " rows"], columns: int) -> Bool[Array, "rows columns"]:
    """The same mask for every column."""
    return jnp.broadcast_to(mask[:, None], (mask.shape[0], columns))


def _divide(
    number: Int32[Array, "..."], by: int
) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """Quotient and remainder; `//` and `%` of traced numbers do not lower."""
    divisor = jnp.full_like(number, by)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _blocks(number: Int32[Array, ""], of: Int32[Array, ""]) -> Int32[Array, ""]:
    """How many blocks hold `number` of something, if `number` is above -`of`."""
    return lax.div(number + of - 1, of)
