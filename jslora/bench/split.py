"""A pool cut in two: pages for adapters alone, and pages for KV alone. For comparison only.

What every engine without a unified pool does. It stands where a `Room` stands; both sides give up
only what is theirs. Host only: no jax.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from jslora.memory.prefix import PrefixCache
from jslora.memory.room import Room
from jslora.memory.worth import Clock


@dataclass(frozen=True, slots=True)
class SplitRoom(Room):
    """`pages` and `prefix` are those of KV; `residency` has an allocator of its own."""

    def take(self, n: int, keep: Collection[str] = ()) -> list[int] | None:
        given = self.prefix.surrender(max(n - self.pages.free, 0), np.inf)
        free = self.pages.take(n - len(given))
        if free is None:
            self.pages.release(given)
            return None
        return free + given

    def take_free_run(self, n: int) -> list[int] | None:
        return self._adapters.take_free_run(n)

    def take_run(self, n: int, keep: Collection[str] = (), spare: int = 0) -> list[int] | None:
        return self._adapters.take_run(n, keep)

    @property
    def _adapters(self) -> Room:
        pages = self.residency.pages
        nothing = PrefixCache(pages, Clock(), enabled=False)
        return Room(pages, nothing, self.residency)
