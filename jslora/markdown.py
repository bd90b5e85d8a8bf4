"""Tables in Markdown: line by line as rows come, or aligned once all are there.

Host only: no jax.
"""

from collections.abc import Iterable, Iterator, Sequence


def lines(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a table, each row's as soon as it is there."""
    yield _line(head)
    yield "|" + "---|" * len(head)
    yield from map(_line, rows)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, others to the right, all of one width in every line."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return _line([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
