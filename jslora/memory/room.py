"""One budget for everything in the pool: whose pages are given up when others are wanted.

Free pages go first. Then what nothing uses now, adapters and cached pages of KV alike, by what they
are worth (see `worth`); never what runs, is on its way, or is asked to be kept. Adapters want
consecutive pages, which a step reads much faster: if no such run is free, the run is cleared that
costs least. Either all pages wanted are given or nothing is given up. Host only: no jax.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency

_FEW = 1e-7
"""Seconds that giving up any page costs at least, so that fewer are given up among equals."""
_NEVER = 1e12
"""Seconds that giving up a page costs that must not be given up."""


@dataclass(frozen=True, slots=True)
class Room:
    """The pool's pages and all that may give them up."""

    pages: PageAllocator
    prefix: PrefixCache
    residency: Residency

    def take(self, n: int, keep: Collection[str] = ()) -> list[int] | None:
        """`n` single pages; None if giving up all but the adapters in `keep` were not enough."""
        if not self._within_reach(n, keep):
            return None
        leaving, adapter, given = self.residency.idle(keep), None, list[int]()
        while (need := n - self.pages.free - len(given)) > 0:
            worth = self.residency.least
            if self.prefix.least > worth:  # else none has to be looked for
                adapter = adapter or next(leaving, None)
                worth = self.residency.worth(adapter.since) if adapter else np.inf
            cached = self.prefix.surrender(need, worth)
            given += cached
            if not cached:
                assert adapter is not None, f"{need} pages lack that were within reach"
                self.residency.evict(adapter)
                adapter = None
        free = self.pages.take(n - len(given))
        assert free is not None, f"{n} pages lack that were within reach"
        return free + given

    def take_free_run(self, n: int) -> list[int] | None:
        """`n` consecutive pages if they are free already."""
        first = self.pages.free_run(n)
        return None if first is None else self.pages.take_at(first, n)

    def take_run(self, n: int, keep: Collection[str] = (), spare: int = 0) -> list[int] | None:
        """`n` pages for an adapter, consecutive where that can be.

        None if `spare` more could not be had afterwards, in the same way as by `take`.
        """
        if not self._within_reach(n + spare, keep):
            return None
        first = self.pages.free_run(n)
        if first is None:
            first = self._clear_run(n, keep)
        return self.take(n, keep) if first is None else self.pages.take_at(first, n)

    def _within_reach(self, n: int, keep: Collection[str]) -> bool:
        """Whether `n` pages are free or may leave; looks at no more adapters than it must."""
        found, adapters = self.pages.free + self.prefix.idle, self.residency.idle(keep)
        while found < n and (adapter := next(adapters, None)):
            found += len(adapter.placement.pages)
        return found >= n

    def _clear_run(self, n: int, keep: Collection[str]) -> int | None:
        """Make `n` consecutive pages free at the least cost; the first, or None if none can be."""
        first = _cheapest(self._costs(keep), n, self.residency.before, self.residency.after)
        if first is None:
            return None
        for resident in self.residency.among(range(first, first + n)):
            self.residency.evict(resident)
        idle = first + np.flatnonzero(self.prefix.since[first : first + n] < np.inf)
        self.prefix.evict(idle.tolist())
        return first

    def _costs(self, keep: Collection[str]) -> np.ndarray:
        """Of each page, what giving it up costs."""
        residents, prefix, residency = self.residency.residents, self.prefix, self.residency
        kept = [residents[digest].placement.pages for digest in keep if digest in residents]
        # What all have in common would count large things twice.
        common = min(prefix.oldest, residency.oldest(keep), _NEVER) - _FEW
        cost = residency.since + (residency.worth(0.0) - common)
        cost[[page for pages in kept for page in pages]] = np.inf
        np.minimum(cost, prefix.since + (prefix.worth(0.0) - common), out=cost)
        np.minimum(cost, _NEVER, out=cost)
        cost[self.pages.unused()] = 0
        return cost


def _cheapest(cost: np.ndarray, n: int, before: np.ndarray, after: np.ndarray) -> int | None:
    """Where `n` consecutive pages cost least; an adapter cut by an end costs all its pages.

    Args:
        before, after: see `Residency`.
    """
    total, last = _windows(cost, n), n - 1
    total += before[: len(total)] * cost[: len(total)]
    total += after[last:] * cost[last:]
    first = int(np.argmin(total))
    return first if total[first] < _NEVER else None


def _windows(values: np.ndarray, n: int) -> np.ndarray:
    """Sums of `n` consecutive values, put together from sums of 1, 2, 4, ... of them."""
    count, sums, size, at = len(values) - n + 1, values, 1, 0
    total: np.ndarray | float = 0.0
    while True:
        if n & size:
            total = sums[at : at + count] + total
            at += size
        if at == n:
            return np.asarray(total)
        sums, size = sums[:-size] + sums[size:], 2 * size
