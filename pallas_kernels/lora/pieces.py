"""How the rows of a factor lie in pages: in pieces of one width, none of which crosses a page."""

import math

RANK_BLOCK = 8
"""Ranks in a block of the reference."""


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie in pages of `page` numbers."""
    return math.gcd(row, page)


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
