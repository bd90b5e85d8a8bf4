"""Which policies there are, and which may be combined: a stack is a list of their names.

Who waits is ordered by the first policy of the stack, those equal by it by the second, and so on;
who is equal by all goes first come, first served. A policy by which hardly two requests are equal
leaves nothing to say to those after it, and such a stack is refused. Host only: no jax.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

Name = Literal[
    "fcfs", "newest", "priority", "fair_tenants", "fair_adapters", "cluster", "shortest", "slo"
]

NAMES: tuple[Name, ...] = get_args(Name)

_TOTAL = ("fcfs", "newest", "shortest")
"""Policies by which next to no two requests are equal."""


def problem(stack: Sequence[Name]) -> str | None:
    """Why a stack is refused; None if it is not."""
    for name in NAMES:
        if stack.count(name) > 1:
            return f"{name!r} is given twice"
    for before, after in pairwise(stack):
        if before == "slo":
            return f"{after!r} comes after 'slo', which must be last: it also orders who is left"
        if before in _TOTAL and after != "slo":
            return f"{after!r} comes after {before!r}, which leaves it nothing to order"
    return None
