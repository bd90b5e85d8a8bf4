"""Policies that order who waits by what is known of each: age, priority, size, adapter.

Those that could pass somebody over for ever do so for `starvation_seconds` at most: whoever waited
longer goes before all whom the policy would prefer. Host only: no jax.
"""

from dataclasses import dataclass, field

import numpy as np

from jslora.schedule.queue import Rows, Waiting
from jslora.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class NewestFirst:
    """The last to arrive goes first; of those who waited too long, all before it, the oldest."""

    starvation: float

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        return _overdue(-waiting.column("order")[rows], waiting, rows, now - self.starvation)


@dataclass(frozen=True, slots=True)
class Priority:
    """By level, lower first; `ageing` seconds of waiting make up for one level."""

    ageing: float

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        waited = now - waiting.column("since")[rows]
        return waiting.column("level")[rows] - np.floor(waited / self.ageing)


@dataclass(frozen=True, slots=True)
class ShortestFirst:
    """By the work that is expected."""

    starvation: float

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        return _overdue(waiting.column("work")[rows], waiting, rows, now - self.starvation)


@dataclass(slots=True)
class Cluster:
    """Adapters that running rows use go first, and as many more as `bound` pages hold with those.

    A soft bound: the others come after them, not never (S-LoRA, section 4.1, counts adapters; a
    page more is a page less for KV, so pages are counted here).
    """

    bound: int
    starvation: float
    _users: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    _pages: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def queued(self, sequence: Sequence) -> None:
        """Learn the size of its adapter."""
        self._users = _longer(self._users, sequence.adapter)
        self._pages = _longer(self._pages, sequence.adapter)
        self._pages[sequence.adapter] = sequence.adapter_pages

    def started(self, sequence: Sequence) -> None:
        """A sequence that was queued runs now."""
        self._users[sequence.adapter] += 1

    def stopped(self, sequence: Sequence) -> None:
        """It does not run any more."""
        self._users[sequence.adapter] -= 1

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        running = self._users > 0
        left = max(self.bound - int(self._pages[running].sum()), 0)
        fits = running | (self._pages <= left)
        other = np.where(fits[waiting.column("adapter")[rows]], 0.0, 1.0)
        return _overdue(other, waiting, rows, now - self.starvation)


def _overdue(score: np.ndarray, waiting: Waiting, rows: Rows, before: float) -> np.ndarray:
    """Scores that put those who wait since `before` or earlier before all others."""
    return np.where(waiting.column("since")[rows] <= before, -np.inf, score)


def _longer(values: np.ndarray, last: int) -> np.ndarray:
    """With an element `last`, in steps that double."""
    if last < len(values):
        return values
    return np.concatenate(
        [values, np.zeros(max(len(values), last + 1 - len(values)), values.dtype)]
    )
