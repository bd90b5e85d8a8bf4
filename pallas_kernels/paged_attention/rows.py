"""What a step attends: each row's tokens and context, and the list of work."""

from typing import NamedTuple

from jaxtyping import Array, Int32


class Item(NamedTuple):
    """The integer fields of an item, in the order they are packed.

    Its queries are the step's tokens [start, start + tokens) of a row. It attends the positions
    [first, end) of the row's context, as far as each query sees them: `end` is one past the last
    query's own position, except in a part, where it is where the next part begins.
    """

    row: Int32[Array, ""]
    start: Int32[Array, ""]
    tokens: Int32[Array, ""]
    first: Int32[Array, ""]
    end: Int32[Array, ""]
    part: Int32[Array, ""]  # 0 unless it is one of several parts of its row


class Rows(NamedTuple):
    """The rows and items of a step; only the first `total` items count."""

    block_table: Int32[Array, "B M"]
    context: Int32[Array, " B"]  # tokens visible to the row's last query; 0 for a padding row
    start: Int32[Array, " B"]  # the row's first token in the step
    length: Int32[Array, " B"]  # its tokens in this step
    parts: Int32[Array, " B"]  # items that the row's one token is attended in; 0 for other rows
    items: Int32[Array, "I 6"]
    total: Int32[Array, "1"]
