"""How the GPU kernels cut their work: block sizes, launch parameters, the number of programs.

The figures are for an H100: 132 processors with 64 Ki registers and 227 KiB of shared memory each.
A program has a few KiB of a factor in flight, so bandwidth needs several on every processor.
Products in full float32 are made without matrix units and take more registers. They are chosen so
that nothing spills, but for a few bytes with integers in words of float32; none was timed.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from pallas_kernels.lora.pieces import (
    column_block,
    packed_in_word,
    row_piece,
    row_words,
    scale_groups,
)
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
    """Blocks of A; a long span of tokens is read once for as many ranks as registers allow.

    Taking integers out of words needs registers too.
    """
    few, exact = shape.span <= 16, dtype.itemsize > 2
    block = partial(column_block, all_row_words((row,), shape.storages, dtype), page)
    programs = PROCESSORS * (8 if few else 4)
    match few, exact, shape.storages != ("full",):
        case True, True, _:
            return Tiles(16, block(32), warps=4, stages=1, programs=programs)
        case True, False, True:
            return Tiles(16, block(64), max(1, block(64) // 16), stages=4, programs=programs)
        case True, False, False:
            return Tiles(16, block(128), max(1, block(128) // 64), stages=4, programs=programs)
        case False, True, True:
            return Tiles(16, block(32), max(1, block(32) // 4), stages=1, programs=programs)
        case False, True, False:
            return Tiles(16, block(64), max(1, block(64) // 16), stages=2, programs=programs)
    return Tiles(32, block(64), warps=4, stages=3, programs=programs)


def expand_tiles(rows: tuple[int, ...], page: int, shape: SegmentShape, dtype: np.dtype) -> Tiles:
    """Blocks of B and of the output, which stays in registers while ranks are walked.

    They are narrower where integers are taken out of words and parts of sums are added up besides.
    """
    few, exact = shape.span <= 16, dtype.itemsize > 2
    much = shape.storages != ("full",) and shape.splits > 1
    limit = (64 if much else 128) if few else 32 if exact else 64
    columns = column_block(all_row_words(rows, shape.storages, dtype), page, limit)
    ranks = 16 if few or exact else 32
    warps = max(1, columns // (16 if much else 32)) if few else 4
    return Tiles(ranks, columns, warps, stages=1, programs=PROCESSORS * (8 if few else 4))


def all_row_words(
    rows: tuple[int, ...], storages: tuple[str, ...], dtype: np.dtype
) -> tuple[int, ...]:
    """Words of these rows in every storage."""
    bits = 8 * dtype.itemsize
    return tuple(row_words(row, storage, bits) for row in rows for storage in storages)


class Rows(NamedTuple):
    """How a factor's rows lie in pages in one storage; lengths are in column blocks.

    Attributes:
        row, piece, page: words of a row, of the pieces it lies in, and of a page.
        packed: numbers in a word; those of a row are `packed * row` column blocks.
        groups, group: scales of a row, and columns that share one; both 0 in full.
        boundary: blocks, on a multiple of which a factor's scales begin.
        touched: groups that have columns in one block, at most.
    """

    row: int
    piece: int
    page: int
    packed: int = 1
    groups: int = 0
    group: int = 0
    boundary: int = 1
    touched: int = 0


def in_blocks(row: int, page: int, columns: int, storage: str, dtype: np.dtype) -> Rows:
    """The same for rows and pages of so many numbers."""
    bits = 8 * dtype.itemsize
    words = row_words(row, storage, bits)
    piece = row_piece(row, storage, bits, page)
    lengths = words // columns, piece // columns, page // columns
    if storage == "full":
        return Rows(*lengths)
    groups = scale_groups(row, storage)
    assert page % groups == 0, f"a row of {groups} scales in pages of {page} numbers"
    group = row // groups
    blocks = range(0, row, columns)
    touched = max((at + columns - 1) // group - at // group + 1 for at in blocks)
    packed = packed_in_word(storage, bits)
    return Rows(*lengths, packed, groups, group, max(1, groups // columns), touched)


def check_blocks(numbers: int, columns: int) -> None:
    """Kernels number a pool's column blocks in 32 bits."""
    blocks = numbers // columns
    assert blocks < 2**31, f"a pool of {numbers} numbers has {blocks} blocks of {columns} columns"
