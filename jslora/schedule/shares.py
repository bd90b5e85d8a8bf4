"""Fair shares by virtual token counters (Sheng et al., arXiv 2401.00588).

Each group, a tenant or an adapter, has a counter of the service it was given, divided by its share;
the group with the least goes first. Service is counted in tokens: those of a prompt that had to be
computed once, those generated twice (they cost about that much more), and a load of an adapter as
the tokens whose keys and values its pages could hold. Host only: no jax.

Invariant: a group that had nothing waiting returns with at least the least counter of those who do
wait, so nobody saves up service while idle.
"""

from collections.abc import Callable

import numpy as np

from jslora.schedule.queue import Rows, Waiting

PROMPT, GENERATED = 1.0, 2.0
"""What one token of each kind counts."""


class Shares:
    """Counters of the groups in one column of the queue.

    Args:
        column: "tenant" or "adapter".
        share: what the group of a number is due, against others.
    """

    def __init__(self, column: str, share: Callable[[int], float]) -> None:
        self._column, self._share = column, share
        self._counter, self._served = np.zeros(0), np.zeros(0)
        self._waiting = np.zeros(0, np.int64)
        self._weight = np.zeros(0)
        self._floor = 0.0  # the counter of the group that was served last

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        return self._counter[waiting.column(self._column)[rows]]

    def queued(self, group: int) -> None:
        """A sequence of a group begins to wait."""
        self._know(group)
        if self._waiting[group] == 0:
            others = self._counter[self._waiting > 0]
            least = others.min() if len(others) else self._floor
            self._counter[group] = max(self._counter[group], least)
        self._waiting[group] += 1

    def left(self, group: int) -> None:
        """One waits no more."""
        self._waiting[group] -= 1

    def started(self, group: int) -> None:
        """One was chosen to run."""
        self._floor = max(self._floor, self._counter[group])

    def charge(self, group: int, tokens: float) -> None:
        """A group was served so many (weighted) tokens."""
        self._counter[group] += tokens / self._weight[group]
        self._served[group] += tokens

    def charge_all(self, groups: np.ndarray, tokens: float) -> None:
        """Each group was served so many tokens, as often as it is listed."""
        if len(groups):
            served = tokens * np.bincount(groups)
            known = len(served)
            self._served[:known] += served
            self._counter[:known] += served / np.where(served, self._weight[:known], 1.0)

    def waiting(self, group: int) -> int:
        """How many of a group wait."""
        return int(self._waiting[group]) if group < len(self._waiting) else 0

    def service(self) -> list[float]:
        """Weighted tokens that each group was served, by number."""
        return self._served.tolist()

    def _know(self, group: int) -> None:
        if group >= len(self._counter):
            size = max(8, 2 * group)
            for name in ("_counter", "_served", "_weight", "_waiting"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(size - len(old), old.dtype)]))
        if self._weight[group] == 0:
            self._weight[group] = self._share(group)
