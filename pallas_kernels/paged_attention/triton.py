"""The paged attention kernels in the Triton language, called through jax-triton.

Invariant: neither triton nor jax-triton is imported before a kernel is called; they can be
missing, and importing the kernels decides for good whether they are interpreted.
"""

from math import e, log2
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.launch import import_jax_triton
from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Rows
from pallas_kernels.paged_attention.tiles import (
    PROGRAMS,
    STAGES,
    WARPS,
    Tile,
    make_tile,
    outputs,
    power_of_two,
)


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    *,
    scale: float,
    prefill: bool,
    cut: Cut,
) -> Float[Array, "T N D"]:
    """As `pallas_kernels.paged_attention.api.paged_attention`."""
    call = import_jax_triton().triton_call
    from pallas_kernels.paged_attention import triton_kernels

    tile = make_tile(q, pages, cut, prefill=prefill)
    result, sums, stats = call(
        jnp.reshape(first_page, 1), rows.block_table, rows.parts, rows.items, rows.total, q, pages,
        kernel=triton_kernels.attend, name="paged_attention", out_type=outputs(q, rows, cut),
        grid=(PROGRAMS,), num_warps=WARPS, num_stages=STAGES,
        **attend_constants(pages, rows, tile, cut, scale, PROGRAMS),
        **common_constants(q, rows, cut),
    )  # fmt: skip
    if cut.parts == 1:
        return result
    out = jax.new_ref(result)
    call(
        rows.parts, rows.start, sums, stats, out,
        kernel=triton_kernels.merge, name="paged_attention_merge", out_type=(),
        grid=sums.shape[::2], num_warps=1, PADDED_PARTS=power_of_two(cut.parts),
        **common_constants(q, rows, cut),
    )  # fmt: skip
    return jax.freeze(out)


def attend_constants(
    pages: jax.Array, rows: Rows, tile: Tile, cut: Cut, scale: float, programs: int
) -> dict[str, Any]:
    """What the first kernel alone is compiled for."""
    return dict(
        SCALE=scale * log2(e), TABLE=rows.block_table.shape[1],
        PAGE_SIZE=pages.shape[1], KV_HEADS=pages.shape[3],
        GROUP=tile.group, LANES=tile.lanes, TOKENS=tile.tokens, SPLITS=tile.splits, TILE=tile.rows,
        POSITIONS=tile.positions, PROGRAMS=programs,
    )  # fmt: skip


def common_constants(q: jax.Array, rows: Rows, cut: Cut) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return dict(ROWS=rows.context.shape[0], PARTS=cut.parts, HEADS=q.shape[1], DIM=q.shape[2])
