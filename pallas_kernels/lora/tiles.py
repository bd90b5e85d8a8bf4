"""How the GPU kernels cut their work: block sizes, launch parameters, the number of programs.

The figures are for an H100: 132 processors with 64 Ki registers and 227 KiB of shared memory each.
A program has a few KiB of a factor in flight, so bandwidth needs several on every processor.
Products in full float32 are made without matrix units and take more registers. They are chosen so
that nothing spills; none was timed.
"""

from typing import NamedTuple

import numpy as np

from pallas_kernels.lora.pieces import column_block, piece_width
from pallas_kernels.lora.segments import SegmentShape

PROCESSORS = 132

INTERPRETED_PROGRAMS = 3
"""An interpreter runs programs one after the other; more than one, so that they stride."""


class Tiles(NamedTuple):
    """Block sizes of a kernel and how it is launched.

    Attributes:
        ranks: ranks in a block, at least 16: a matrix unit takes no fewer.
        columns: columns in a block; they divide the factors' rows and the pieces these lie in.
        warps, stages: of a program, and of its pipelined loads.
        programs: meant to be as many as run at once; striding makes any number correct.
    """

    ranks: int
    columns: int
    warps: int
    stages: int
    programs: int


def shrink_tiles(row: int, page: int, shape: SegmentShape, dtype: np.dtype) -> Tiles:
    """Blocks of A; a long span of tokens is read once for as many ranks as registers allow."""
    few, exact = shape.span <= 16, dtype.itemsize > 2
    columns = column_block((row,), page, limit=(32 if exact else 128) if few else 64)
    if few and exact:
        return Tiles(16, columns, warps=4, stages=1, programs=PROCESSORS * 8)
    if few:
        return Tiles(16, columns, max(1, columns // 64), stages=4, programs=PROCESSORS * 8)
    if exact:
        return Tiles(16, columns, max(1, columns // 16), stages=2, programs=PROCESSORS * 4)
    return Tiles(32, columns, warps=4, stages=3, programs=PROCESSORS * 4)


def expand_tiles(rows: tuple[int, ...], page: int, shape: SegmentShape, dtype: np.dtype) -> Tiles:
    """Blocks of B and of the output, which stays in registers while ranks are walked."""
    few, exact = shape.span <= 16, dtype.itemsize > 2
    columns = column_block(rows, page, limit=128 if few else 32 if exact else 64)
    ranks = 16 if few or exact else 32
    warps = max(1, columns // 32) if few else 4
    return Tiles(ranks, columns, warps, stages=1, programs=PROCESSORS * (8 if few else 4))


class Rows(NamedTuple):
    """How long a factor's row, the pieces it lies in and a page are, in column blocks."""

    row: int
    piece: int
    page: int


def in_blocks(row: int, page: int, columns: int) -> Rows:
    """The same for rows and pages of so many numbers."""
    return Rows(row // columns, piece_width(row, page) // columns, page // columns)


def check_blocks(numbers: int, columns: int) -> None:
    """Kernels number a pool's column blocks in 32 bits."""
    blocks = numbers // columns
    assert blocks < 2**31, f"a pool of {numbers} numbers has {blocks} blocks of {columns} columns"
