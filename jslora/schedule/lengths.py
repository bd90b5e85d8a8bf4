"""How long an answer will be, learned from the answers that ended, adapter by adapter.

Lengths fall into buckets whose width grows with the length. For each bucket is counted how many
answers came into it and how many ended in it, so the share that ends there is known even when most
answers are cut off before their end: a cut one counts in what it passed and says no more (a life
table; Kaplan and Meier 1958). Old answers fade. An adapter that has few answers in a bucket borrows
there from all adapters together, which are counted in the same way.

Invariants: an estimate is above what is generated already, unless that is the most there can be,
and never above the most; it never shrinks as the answer grows; what no answer ever reached counts
as never ending. Memory is bounded whatever names come. Host only: no jax.
"""

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict

import numpy as np

MEMORY = 512.0
"""Answers after which an older one counts 1/e of a new one."""

BORROWED = 8.0
"""Answers of all adapters, at most, that stand in a bucket beside those of the adapter."""

MAX_ADAPTERS = 4096
"""Adapters that are remembered; those that ended nothing for longest are forgotten."""

_ENDS = np.unique(np.round(np.geomspace(1, 2**18, 72)))  # of the buckets, in tokens, each included
_EDGES = [0.0, *_ENDS.tolist()]
_FORGOTTEN = 0.01  # answers that came into a bucket: below it, nothing is known of the bucket
_SURE = 1 - 1e-12  # the most of those in a bucket that end in it, so that logarithms are finite
_LEAST_ODDS = 1e-9  # far above what rounding loses in sums of logarithms
_STALE = 32  # answers of others after which what an adapter borrows is looked up again


class _Table:
    """Answers that came into each bucket, and those that ended in it; `count` of them in all.

    Attributes:
        curve: what `_curve` made of it; None once an answer ended since.
        seen: count of the table of all adapters when the curve was made.
    """

    __slots__ = ("count", "curve", "ended", "entered", "seen")

    def __init__(self) -> None:
        self.entered, self.ended = np.zeros(len(_ENDS)), np.zeros(len(_ENDS))
        self.count, self.seen = 0, 0
        self.curve: _Curve | None = None

    def add(self, tokens: int, *, cut: bool) -> None:
        """Count an answer; one cut off within a bucket came into a part of it."""
        bucket = min(max(bisect_left(_EDGES, tokens) - 1, 0), len(_ENDS) - 1)
        for counts in (self.entered, self.ended):
            counts *= 1 - 1 / MEMORY
        self.entered[:bucket] += 1
        if cut:
            width = _EDGES[bucket + 1] - _EDGES[bucket]
            self.entered[bucket] += min(1.0, (tokens - _EDGES[bucket]) / width)
        else:
            self.entered[bucket] += 1
            self.ended[bucket] += 1
        self.count += 1
        self.curve = None


class _Curve:
    """How many answers are still going on at any length.

    Attributes:
        log_left: minus the logarithm of the share that outlives each bucket.
        hazard: share of those in a bucket that end in it, evenly over its tokens.
        known: buckets, from the first, that answers came into.
    """

    __slots__ = ("hazard", "known", "log_left")

    def __init__(self, entered: np.ndarray, ended: np.ndarray) -> None:
        known = entered > _FORGOTTEN
        hazard = np.minimum(np.divide(ended, entered, out=np.zeros(len(ended)), where=known), _SURE)
        self.known = len(known) if known.all() else int(known.argmin())
        self.hazard: list[float] = hazard[: self.known].tolist()
        self.log_left: list[float] = [0.0, *np.cumsum(-np.log1p(-hazard[: self.known])).tolist()]

    def total(self, generated: int, log_odds: float) -> float:
        """Length that an answer reaches with odds of exp(-log_odds), when so much is there."""
        bucket = bisect_right(_EDGES, generated) - 1
        if bucket >= self.known:
            return math.inf
        passed = (generated - _EDGES[bucket]) / (_EDGES[bucket + 1] - _EDGES[bucket])
        goal = self.log_left[bucket] - math.log1p(-self.hazard[bucket] * passed) + log_odds
        last = bisect_left(self.log_left, goal, lo=bucket + 1) - 1
        if last >= self.known:
            return math.inf
        part = -math.expm1(self.log_left[last] - goal) / self.hazard[last]
        return _EDGES[last] + part * (_EDGES[last + 1] - _EDGES[last])


class Lengths:
    """Answer lengths at a quantile, learned online."""

    def __init__(self, quantile: float) -> None:
        """Share of answers, above 0 and below 1, that shall be no longer than expected."""
        assert 0 < quantile < 1, f"quantile {quantile}"
        self._log_odds = max(-math.log1p(-quantile), _LEAST_ODDS)
        self._all = _Table()
        self._tables: OrderedDict[str, _Table] = OrderedDict()

    def ended(self, adapter: str, tokens: int, *, cut: bool) -> None:
        """An answer of so many tokens ended by itself, or was cut off there.

        Args:
            cut: it would have been at least so long (its limit was reached, or nobody listens).
        """
        assert tokens >= 0, f"an answer of {tokens} tokens"
        table = self._tables.get(adapter)
        if table is None:
            table = self._tables[adapter] = _Table()
            if len(self._tables) > MAX_ADAPTERS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(adapter)
        for counted in (table, self._all):
            counted.add(tokens, cut=cut)

    def expected(self, adapter: str, generated: int, most: int) -> int:
        """Total length of an answer at the quantile, of those that were as long as it is now.

        Args:
            generated: its tokens so far, at most `most`.
            most: what it is cut off at, and the estimate while nothing is known.
        """
        assert 0 <= generated <= most, f"{generated} tokens of at most {most}"
        total = self._curve(adapter).total(generated, self._log_odds)
        if total >= most:
            return most
        return min(max(math.ceil(total - 1e-6), generated + 1), most)

    def _curve(self, adapter: str) -> _Curve:
        """Of the adapter, beside at most `BORROWED` answers of all, in each bucket."""
        everyone = self._all
        table = self._tables.get(adapter, everyone)
        fresh = everyone.count - table.seen <= min(_STALE, table.seen / 8)
        if table.curve is None or not fresh:
            entered, ended = everyone.entered, everyone.ended
            if table is not everyone:
                part = BORROWED / np.maximum(entered, BORROWED)
                entered, ended = table.entered + part * entered, table.ended + part * ended
            table.curve, table.seen = _Curve(entered, ended), everyone.count
        return table.curve
