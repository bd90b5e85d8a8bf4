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
from jslora.memory.residency import Residency, Resident

_FEW = 1e-7
"""Seconds that giving up any page costs at least, so that fewer are given up among equals."""


@dataclass(frozen=True, slots=True)
class Room:
    """The pool's pages and all that may give them up."""

    pages: PageAllocator
    prefix: PrefixCache
    residency: Residency

    def take(self, n: int, keep: Collection[str] = ()) -> list[int] | None:
        """`n` single pages; None if giving up all but the adapters in `keep` were not enough."""
        if self.pages.free >= n:  # so it mostly is, and there may be thousands of adapters
            return self.pages.take(n)
        idle = self.residency.idle(keep)
        if self._within_reach(idle) < n:
            return None
        leaving = iter(idle)
        adapter = next(leaving, None)
        while self.pages.free < n:
            if adapter is None or self.prefix.least <= self.residency.worth(adapter):
                self.prefix.evict()
            else:
                self.residency.evict(adapter)
                adapter = next(leaving, None)
        return self.pages.take(n)

    def take_free_run(self, n: int) -> list[int] | None:
        """`n` consecutive pages if they are free already."""
        first = self.pages.free_run(n)
        return None if first is None else self.pages.take_at(first, n)

    def take_run(self, n: int, keep: Collection[str] = (), spare: int = 0) -> list[int] | None:
        """`n` pages for an adapter, consecutive where that can be.

        None if `spare` more could not be had afterwards, in the same way as by `take`.
        """
        if self.pages.free >= n + spare and (pages := self.take_free_run(n)) is not None:
            return pages
        idle = self.residency.idle(keep)
        if self._within_reach(idle) < n + spare:
            return None
        pages = self.take_free_run(n)
        if pages is None and (first := self._clear_run(n, idle)) is not None:
            pages = self.pages.take_at(first, n)
        return self.take(n, keep) if pages is None else pages

    def _within_reach(self, idle: list[Resident]) -> int:
        adapters = sum(len(resident.placement.pages) for resident in idle)
        return self.pages.free + self.prefix.idle + adapters

    def _clear_run(self, n: int, idle: list[Resident]) -> int | None:
        """Make `n` consecutive pages free at the least cost; the first, or None if none can be."""
        cached = ~np.isnan(self.prefix.since)
        times = [*self.prefix.since[cached], *(resident.since for resident in idle)]
        oldest = min(times, default=0.0)  # what all have in common would count large things twice
        cost = np.where(self.pages.used(), np.inf, 0.0)
        cost[cached] = self.prefix.worth(self.prefix.since[cached]) - oldest + _FEW
        for resident in idle:
            cost[list(resident.placement.pages)] = self.residency.worth(resident) - oldest + _FEW
        first = _cheapest(cost, n, [resident for resident in idle if resident.placement.is_run])
        if first is None:
            return None
        for resident in idle:
            if any(first <= page < first + n for page in resident.placement.pages):
                self.residency.evict(resident)
        for page in range(first, first + n):
            if cached[page]:
                self.prefix.evict(page)
        return first


def _cheapest(cost: np.ndarray, n: int, runs: list[Resident]) -> int | None:
    """Where `n` consecutive pages cost least; an adapter cut by an end costs all its pages."""
    out_of_reach = np.isinf(cost)
    found = np.where(out_of_reach, 0.0, cost)
    if len(found) - out_of_reach.sum() < n:
        return None
    total = _windows(found, n)
    total[_windows(out_of_reach.astype(np.float64), n) > 0.5] = np.inf
    for resident in runs:
        start, end = resident.placement.pages[0], resident.placement.pages[-1] + 1
        each = found[start]
        inside = np.arange(start + 1, min(end, len(total)))
        total[inside] += (inside - start) * each
        inside = np.arange(max(start + 1 - n, 0), max(min(end - n, len(total)), 0))
        total[inside] += (end - n - inside) * each
    first = int(np.argmin(total))
    return first if np.isfinite(total[first]) else None


def _windows(values: np.ndarray, n: int) -> np.ndarray:
    """Sums of `n` consecutive values."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[n:] - sums[:-n]
