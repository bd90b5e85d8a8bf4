"""The LoRA kernels in the Triton language, called through jax-triton.

Invariant: neither triton nor jax-triton is imported before a kernel is called; they can be
missing, and importing the kernels decides for good whether they are interpreted.
"""

import math
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.launch import import_jax_triton
from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.pieces import STORAGES
from pallas_kernels.lora.segments import SegmentShape, SegmentWork
from pallas_kernels.lora.tiles import (
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
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: SegmentWork,
    *,
    modules: tuple[int, ...],
    shape: SegmentShape,
) -> Float[Array, " splits*modules*share"]:
    """The low-rank products of all pairs: `shape.share` numbers for each split and module."""
    call = import_jax_triton().triton_call
    from pallas_kernels.lora import triton_kernels

    where, page = jnp.stack([first_page, layer]), math.prod(pages.shape[1:])
    tiles = shrink_tiles(x.shape[1], page, shape, pages.dtype)
    check_blocks(pages.size, tiles.columns)
    return call(
        where, work.pairs, work.total, work.table, work.page_list, pages, x,
        kernel=triton_kernels.shrink, name="lora_shrink",
        out_type=jax.ShapeDtypeStruct((low_numbers(modules, shape),), np.float32),
        grid=(tiles.programs,), num_warps=tiles.warps, num_stages=tiles.stages,
        **shrink_constants(
            x.shape[1], page, pages.dtype, work, modules, shape, tiles, tiles.programs
        ),
    )  # fmt: skip


def expand(
    y: Float[Array, "T out_all"],
    low: Float[Array, "*peers splits*modules*share"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: SegmentWork,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: SegmentShape,
    finish: Finish,
    stream: Float[Array, "T out"] | None,
    dtype: np.dtype,
    first: Int32[Array, ""] | None,
) -> Float[Array, "T out"]:
    """What `finish` makes of the base output and all that the pairs add to it.

    Args:
        first: where the modules' columns begin in a y that is wider.
    """
    call = import_jax_triton().triton_call
    from pallas_kernels.lora import triton_kernels

    assert first is not None or sum(widths) == y.shape[1], f"{widths} in {y.shape[1]} columns"
    page = math.prod(pages.shape[1:])
    tiles = expand_tiles(widths, page, shape, pages.dtype)
    check_blocks(pages.size, tiles.columns)
    own = [] if first is None else [lax.div(first, jnp.int32(tiles.columns))]
    where = jnp.stack([first_page, layer, *own])
    run = partial(
        call, where, work.pairs, work.total, work.table, work.scale, work.page_list, pages, low,
        name="lora_expand", grid=(tiles.programs,), num_warps=tiles.warps, num_stages=tiles.stages,
        **expand_constants(
            widths, y.shape[1], page, pages.dtype, work, modules, shape, tiles, tiles.programs
        ),
    )  # fmt: skip
    into = partial(run, y, kernel=triton_kernels.expand_into, FINISH=finish.value)
    if finish is Finish.GATED:
        return into(out_type=jax.ShapeDtypeStruct((len(y), widths[0]), dtype))
    out = jax.new_ref(y if stream is None else stream)
    if finish is Finish.RESIDUAL:
        into(out, out_type=())
    else:
        run(out, kernel=triton_kernels.expand, out_type=())
    return jax.freeze(out)


def low_numbers(modules: tuple[int, ...], shape: SegmentShape) -> int:
    """Numbers of the low-rank products that the shrink kernel writes."""
    return shape.splits * len(modules) * shape.share


def shrink_constants(
    row: int, page: int, dtype: np.dtype, work: SegmentWork, modules: tuple[int, ...],
    shape: SegmentShape, tiles: Tiles, programs: int,
) -> dict[str, Any]:  # fmt: skip
    """What the shrink kernel is compiled for."""
    rows = [in_blocks(row, page, tiles.columns, storage, dtype) for storage in shape.storages]
    return dict(
        ROWS=tuple(length for each in rows for length in _lengths(each)),
        **_constants([[each] for each in rows], work, modules, shape, tiles, page, programs),
    )


def expand_constants(
    widths: tuple[int, ...], y_width: int, page: int, dtype: np.dtype, work: SegmentWork,
    modules: tuple[int, ...], shape: SegmentShape, tiles: Tiles, programs: int,
) -> dict[str, Any]:  # fmt: skip
    """What the expand kernel is compiled for; each length is one for each module."""
    assert y_width % tiles.columns == 0, f"{y_width} columns in blocks of {tiles.columns}"
    rows = [
        [in_blocks(width, page, tiles.columns, storage, dtype) for width in widths]
        for storage in shape.storages
    ]
    return dict(
        TILES=(0, *accumulate(width // tiles.columns for width in widths)),
        WIDTH=y_width // tiles.columns,
        ROWS=tuple(length for alike in rows for length in zip(*map(_lengths, alike), strict=True)),
        **_constants(rows, work, modules, shape, tiles, page, programs),
    )


def _lengths(rows: Rows) -> tuple[int, ...]:
    """What depends on how long a row is, in the order of `triton_kernels`."""
    return rows.row, rows.piece, rows.groups, rows.group, rows.boundary


def _constants(
    rows: list[list[Rows]], work: SegmentWork, modules: tuple[int, ...], shape: SegmentShape,
    tiles: Tiles, page: int, programs: int,
) -> dict[str, Any]:  # fmt: skip
    """What both are compiled for; `rows` are those of each storage, of one module or more."""
    _, all_modules, pairs, _ = work.table.shape
    storages = tuple(
        (STORAGES.index(name), alike[0].packed, max(each.touched for each in alike))
        for name, alike in zip(shape.storages, rows, strict=True)
    )
    return dict(
        MODULES=modules, ALL_MODULES=all_modules, PAIRS=pairs, STORAGES=storages,
        PAGE=page // tiles.columns, SPAN=shape.span, RANKS=tiles.ranks, COLUMNS=tiles.columns,
        SPLITS=shape.splits, LOW=shape.share, PEERS=shape.peers, PROGRAMS=programs,
    )  # fmt: skip
