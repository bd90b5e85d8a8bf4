"""Which replica an adapter is served from: each has a home, left only while that is overloaded.

Invariants: an adapter keeps its home while that replica is there and has no more than its fair
share of the adapters, ceil(adapters / replicas); so the shares are as equal as they can be, a new
replica takes over only what others have too much of, and one that goes hands on only its own. Only
adapters that were asked for within `FORGET_SECONDS` count.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping

FORGET_SECONDS = 600.0
IMBALANCE = 1.5  # times the mean load of the replicas
POPULAR, CROWDED = 2, 8  # times what a replica runs at once


class Homes:
    """Homes of adapters among replicas.

    Args:
        room: requests that one replica runs at once.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._homes: dict[str, tuple[str, float]] = {}  # and when last asked for, oldest first
        self._counts: Counter[str] = Counter()

    def home(self, adapter: str, replicas: Collection[str], now: float) -> str:
        """The home of an adapter among `replicas`, of which there is at least one.

        Args:
            now: seconds of a clock that never goes back.
        """
        self._forget(now)
        home = ""
        if adapter in self._homes:
            home, _ = self._homes.pop(adapter)
            self._counts[home] -= 1
        share = -(-(len(self._homes) + 1) // len(replicas))
        if home not in replicas or self._counts[home] >= share:
            home = min(replicas, key=lambda name: (self._counts[name], _draw(adapter, name)))
        self._homes[adapter] = home, now
        self._counts[home] += 1
        return home

    def order(self, adapter: str, loads: Mapping[str, int], alike: int, now: float) -> list[str]:
        """The replicas in the order in which they should be asked.

        Overloaded ones come last; then the home comes first, and the others are in an order of this
        adapter's own, so that one that is too popular always overflows to the same. An adapter that
        fills a replica alone overflows early, as a second copy of it pays; others go elsewhere only
        if their home is crowded, for there they would drive others out.

        Args:
            loads: each replica's requests.
            alike: how many requests there are for this adapter.
        """
        home = self.home(adapter, loads.keys(), now)
        batches = POPULAR if alike >= POPULAR * self._room else CROWDED
        limit = max(batches * self._room, IMBALANCE * sum(loads.values()) / len(loads))
        return sorted(
            loads, key=lambda name: (loads[name] >= limit, name != home, _draw(adapter, name))
        )

    def _forget(self, now: float) -> None:
        while self._homes:
            adapter, (home, asked) = next(iter(self._homes.items()))
            if asked > now - FORGET_SECONDS:
                return
            del self._homes[adapter]
            self._counts[home] -= 1


def _draw(adapter: str, replica: str) -> bytes:
    """A pair's place in rendezvous hashing: the same in every process."""
    return hashlib.blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest()
