"""How the host cuts a step's attention into items; the one file here without jax."""

from typing import NamedTuple


class Cut(NamedTuple):
    """How the host cuts a step into items.

    Attributes:
        query_tile: tokens in an item of a row that has several.
        parts: items that a one-token row's context is cut in at most; 0 when such rows are not
            listed at all.
        span: positions that a part has at least, unless the context is shorter.
    """

    query_tile: int
    parts: int
    span: int
