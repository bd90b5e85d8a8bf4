"""Who owns which page of the pool: one allocator, with reference counts, for KV and adapters alike.

A page id means the same page in every layer. Page 0 is the null page and is never handed out.
Of free pages, single ones (KV) are given from the top of the pool and runs (adapters) from the
bottom, so that long runs survive. Host only: no jax.

Invariant: free pages and pages in use make up all pages but page 0, and a page's count equals the
number of holders that list it; `check` proves it against the holders.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, Int32


class PageAllocator:
    """Pages 1 to `total` - 1, free or counted."""

    def __init__(self, total: int) -> None:
        assert total >= 2, f"a pool of {total} pages has no page to give"
        self.total = total
        self._count = np.zeros(total + 1, np.int32)
        self._count[[0, total]] = -1  # the null page, and where the pool ends: nobody's
        # Highest first; an entry may be stale (its page was taken by a run) and is then skipped.
        self._heap = [-page for page in range(total - 1, 0, -1)]
        self.free = total - 1

    def take(self, n: int) -> list[int] | None:
        """`n` single pages, or None (and nothing taken) if fewer are free."""
        if n > self.free:
            return None
        pages: list[int] = []
        while len(pages) < n:
            page = -heapq.heappop(self._heap)
            if self._count[page] == 0:
                self._count[page] = 1
                pages.append(page)
        self.free -= n
        return pages

    def free_run(self, n: int) -> int | None:
        """First of `n` consecutive free pages: of the shortest run that fits, the lowest."""
        if n > self.free:
            return None
        held = self._count != 0
        edges = np.flatnonzero(held[1:] != held[:-1]) + 1
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        fits = np.flatnonzero(lengths >= n)
        return int(starts[fits[np.argmin(lengths[fits])]]) if len(fits) else None

    def take_at(self, first: int, n: int) -> list[int]:
        """The pages from `first` on, which must be free."""
        taken = self._count[first : first + n] != 0
        assert first > 0 and not taken.any(), f"{taken.sum()} of {n} pages at {first} are in use"
        self._count[first : first + n] = 1
        self.free -= n
        return list(range(first, first + n))

    def used(self) -> np.ndarray:
        """Of each page, whether anything holds it; page 0 counts as held."""
        return self._count[:-1] != 0

    def unused(self) -> Int[np.ndarray, " free"]:
        """The free pages, lowest first."""
        return np.flatnonzero(self._count == 0)

    def count(self, pages: Sequence[int]) -> Int32[np.ndarray, " n"]:
        """How many hold each of some pages."""
        return self._count[list(pages)]

    def share(self, pages: Sequence[int]) -> None:
        """Count one more holder of each page."""
        self._add(pages, 1)

    def release(self, pages: Sequence[int]) -> Int32[np.ndarray, " n"]:
        """Count one holder less of each page; a page without holders is free. How many are left."""
        at, left = self._add(pages, -1)
        freed = (-at[left == 0]).tolist()
        self.free += len(freed)
        for page in freed:
            heapq.heappush(self._heap, page)
        if len(self._heap) > 2 * self.total:
            self._heap = (-self.unused()).tolist()
            heapq.heapify(self._heap)
        return left

    def _add(
        self, pages: Sequence[int], n: int
    ) -> tuple[Int[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """Pages, of which none may be there twice, and the holders of each after so many more."""
        at = np.array(pages, np.int64)
        count = self._count[at]
        assert (count > 0).all(), f"pages {at[count <= 0][:10].tolist()} are not held"
        count += n
        self._count[at] = count
        return at, count

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that every page's count is the number of `holders` that list it."""
        held = Counter(page for pages in holders for page in pages)
        used = {int(page): int(self._count[page]) for page in np.flatnonzero(self.used())}
        used.pop(0, None)
        assert 0 not in held, "the null page is held"
        assert held == used, f"pages held and counted differ: {_difference(held, used)}"
        assert self.free + len(used) == self.total - 1, (
            f"{self.free} free and {len(used)} used pages of {self.total - 1}"
        )


def _difference(held: Counter[int], used: dict[int, int]) -> list[tuple[int, int, int]]:
    pages = sorted(page for page in held.keys() | used.keys() if held[page] != used.get(page, 0))
    return [(page, held[page], used.get(page, 0)) for page in pages[:10]]
