"""How slow start-up work reports: one callback, so that libraries below never print. Host only."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as (stage, done, total, note), often; `done` and `total` share a unit of the stage's."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """A `Progress` that reports nowhere."""
