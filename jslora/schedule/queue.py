"""Who waits, as a table: a row for each sequence, a column for each thing an order may go by.

A policy is a score, computed for whole columns at once; the front of the queue is found by the
first policy, among equals by the second, and so on, then by arrival. Nothing is kept sorted: what
counts may change with every token and every second, and ten thousand rows are scored in the time
that a few dozen take in a loop; only arrival never does, so where no policy has a say the front is
at hand. Sequences that ran already and were preempted go before all others. Host only: no jax.

Invariants: those that never ran are added in the order of arrival; rows 0 to n - 1 are in use, in
no order, and `Sequence.place` is a sequence's row, or -1 while it does not wait.
"""

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Protocol

import numpy as np

from jslora.schedule.sequence import Sequence

_COLUMNS = {
    "order": np.int64, "since": np.float64, "tenant": np.int64, "adapter": np.int64,
    "level": np.float64, "work": np.float64, "deadline": np.float64,
}  # fmt: skip


Rows = np.ndarray | slice
"""Rows of the table; a slice, of all of them, is read without a copy."""


class Policy(Protocol):
    """One way to order those who wait."""

    def score(self, waiting: "Waiting", rows: Rows, now: float) -> np.ndarray:
        """Of each of `rows`; the lowest go first."""


class Waiting:
    """The table; columns are read through `column`.

    Columns: `order` of arrival; `since` when it waits; `tenant` and `adapter` as numbers; `level`
    of priority; `work` that it is expected to be, in tokens; `deadline` for its first token.
    """

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._table = {name: np.zeros(64, dtype) for name, dtype in _COLUMNS.items()}
        self._resumed: list[Sequence] = []  # preempted, by arrival
        # All others, by arrival; a dict becomes slow at its beginning when that is what leaves.
        self._arrived: OrderedDict[Sequence, None] = OrderedDict()
        self.tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._rows) + len(self._resumed)

    def __iter__(self) -> Iterator[Sequence]:
        """By arrival; from any thread."""
        return iter(sorted([*self._resumed, *self._rows], key=lambda s: s.order))

    def column(self, name: str) -> np.ndarray:
        """Values of a column, row by row."""
        return self._table[name][: len(self._rows)]

    def add(self, sequence: Sequence) -> None:
        """A sequence begins to wait, or goes on waiting because it was preempted."""
        self.tokens += sequence.prompt_length
        if sequence.life:
            self._resumed.append(sequence)
            self._resumed.sort(key=lambda s: s.order)
            return
        row = len(self._rows)
        if row == len(self._table["order"]):
            self._table = {name: np.resize(c, 2 * row) for name, c in self._table.items()}
        for name, values in self._table.items():
            values[row] = getattr(sequence, name)
        last = next(reversed(self._arrived), None)
        assert last is None or last.order < sequence.order, f"{sequence.order} after {last.order}"
        self._rows.append(sequence)
        self._arrived[sequence] = None
        sequence.place = row

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        self.tokens -= sequence.prompt_length
        if sequence.place < 0:
            self._resumed.remove(sequence)
            return
        del self._arrived[sequence]
        row, last = sequence.place, self._rows.pop()
        if last is not sequence:
            for values in self._table.values():
                values[row] = values[len(self._rows)]
            self._rows[row], last.place = last, row
        sequence.place = -1

    def at(self, chosen: np.ndarray) -> list[Sequence]:
        """Those of the rows where `chosen` is true."""
        return [self._rows[row] for row in np.flatnonzero(chosen)]

    def front(self, k: int, policies: Seq[Policy], now: float) -> list[Sequence]:
        """The `k` that go first, in order."""
        found = self._resumed[:k]
        if not policies:
            return [*found, *islice(self._arrived, k - len(found))]
        rows = self._first(slice(len(self._rows)), k - len(found), policies, now)
        return found + [self._rows[row] for row in rows]

    def _first(self, rows: Rows, k: int, policies: Seq[Policy], now: float) -> np.ndarray:
        """The first `k` of `rows`: who is surely among them, then the best of those who tie."""
        n = len(self._rows) if isinstance(rows, slice) else len(rows)
        if k <= 0:
            return np.arange(0)
        if k >= n:
            scores = [policy.score(self, rows, now) for policy in policies]
            return _pick(rows, np.lexsort([self.column("order")[rows], *reversed(scores)]))
        score = policies[0].score(self, rows, now) if policies else self.column("order")[rows]
        edge = score.min()
        ties = score == edge
        tied = np.count_nonzero(ties)
        if tied >= k:  # as is usual: nobody is before them
            left = rows if tied == n else _pick(rows, np.flatnonzero(ties))
            return self._first(left, k, policies[1:], now)
        edge = np.partition(score, k - 1)[k - 1]
        best = _pick(rows, np.flatnonzero(score < edge))
        ties = _pick(rows, np.flatnonzero(score == edge))
        first = self._first(best, len(best), policies, now)
        return np.concatenate([first, self._first(ties, k - len(best), policies[1:], now)])


def _pick(rows: Rows, which: np.ndarray) -> np.ndarray:
    """Some of the rows, by their place among them."""
    return which if isinstance(rows, slice) else rows[which]
