"""How the rows of a factor lie in pages: in pieces of one width, none of which crosses a page.

What lies in pages are words, numbers of the pool's dtype. Stored in full, a word is a weight.
Stored as integers of 8 or 4 bits, a word is bits that only happen to lie in a float's place: it is
moved and taken apart, never converted and never reckoned with, because any bits may be in it. A row
of n numbers is n / k words then, k numbers in each: word j holds columns j, j + n/k, j + 2n/k, and
so on, the first in its lowest bits, in two's complement. So a tile of words unpacks into k tiles of
consecutive columns, none of which has to be woven into another.

Groups of consecutive columns share a scale, a number of the pool's dtype that is 0 or normal. A
number is its integer times its group's scale, in float32, rounded to the pool's dtype. The scales
of a factor lie behind all of its rows: one row of scales a rank, beginning on a boundary of its own
piece (`first_scale`). Pure arithmetic: no jax.
"""

import math

import numpy as np

RANK_BLOCK = 8
"""Ranks in a block of the reference."""

STORAGES = ("full", "int8", "int4")
"""How weights can be stored; work lists name one by its place here."""

BITS = {"int8": 8, "int4": 4}
"""Bits of an integer, of the storages that have them."""

LARGEST = {"int8": 127, "int4": 7}
"""The largest integer, of either sign."""

_LEAST_GROUP = {"int8": 128, "int4": 48}
"""Columns of a group at least, unless a row is shorter: few scales for 8 bits, fit ones for 4."""

_LONGEST_PIECE = 512  # words of a row of integers


def packed_in_word(storage: str, word_bits: int) -> int:
    """k: numbers in a word of the pool."""
    return 1 if storage == "full" else word_bits // BITS[storage]


def row_words(row: int, storage: str, word_bits: int) -> int:
    """Words of a row of `row` numbers.

    Raises:
        NotImplementedError: it is not a whole number of words.
    """
    k = packed_in_word(storage, word_bits)
    if row % k:
        raise NotImplementedError(
            f"rows of {row} numbers cannot be stored as {storage}: a word of {word_bits} bits "
            f"holds {k}"
        )
    return row // k


def scale_groups(row: int, storage: str) -> int:
    """Scales of a row, a power of two that divides it; none if it is stored in full."""
    if storage == "full":
        return 0
    groups = 1
    while row % (2 * groups) == 0 and row // (2 * groups) >= _LEAST_GROUP[storage]:
        groups *= 2
    return groups


def first_scale[N: (int, np.ndarray)](
    first: N, rows: N, row: int, storage: str, word_bits: int, page: int
) -> N:
    """Where the scales of a factor begin that has `rows` rows from number `first` on.

    Both are counted in words from the start of an adapter's layer.
    """
    end = first + rows * row_words(row, storage, word_bits)
    width = piece_width(scale_groups(row, storage), page)
    return -(-end // width) * width


def factor_end(first: int, rows: int, row: int, storage: str, word_bits: int, page: int) -> int:
    """Where the words of a factor end, those of its scales included."""
    if storage == "full":
        return first + rows * row
    begin = first_scale(first, rows, row, storage, word_bits, page)
    return begin + rows * scale_groups(row, storage)


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` words lie in pages of `page` words."""
    return math.gcd(row, page)


def row_piece(row: int, storage: str, word_bits: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie, and on which a factor begins.

    Behind a row of scales the next boundary of a long row would be far off, so rows of integers
    have shorter pieces: on SmolLM2-135M an int8 adapter of rank 8 takes 7 pages instead of 8.
    """
    width = piece_width(row_words(row, storage, word_bits), page)
    return width if storage == "full" else math.gcd(width, _LONGEST_PIECE)


def column_block(rows: tuple[int, ...], page: int, limit: int) -> int:
    """The widest block of columns, a power of two, that lies within one piece of every row.

    Raises:
        NotImplementedError: it is narrower than a matrix unit takes.
    """
    assert limit & (limit - 1) == 0, f"{limit} is no power of two"
    width = math.gcd(limit, *(piece_width(row, page) for row in rows))
    if width < 16:
        raise NotImplementedError(
            f"rows of {rows} numbers in pages of {page} numbers have column blocks of {width}; "
            "the kernels need 16"
        )
    return width


def slack_pages(longest_row: int, page: int) -> int:
    """Pages that must follow the last layer so that no block's slice is moved back by clamping."""
    return -(-RANK_BLOCK * longest_row // page)
