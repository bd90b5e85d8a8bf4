"""The prefix cache: full pages of KV by what was computed in them, for whoever asks the same next.

A page's key is a hash chained over all tokens up to its end, from a root of adapters, tenant
and salt: equal keys mean equal weights, tokens and owner, so nothing is shared across versions of
an adapter or across tenants. Pages are published only after their step completed, are never written
again, and are found for as long as they stay. The cache is one holder of each (`PageAllocator`); a
page that nobody else holds is idle and may be evicted, least recently used first, the end of a
prompt before its beginning. Host only: no jax.

Invariants: a key has one page and a page one key; a page is idle if and only if the cache is its
only holder.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from jslora.memory.pages import PageAllocator
from jslora.memory.worth import Clock, Kind

_GUESS = 0.02  # seconds to compute a page again, until it was measured


def root_key(weights: str, tenant: str, salt: str) -> bytes:
    """Where the chain of keys begins."""
    return hashlib.blake2b(json.dumps([weights, tenant, salt]).encode(), digest_size=32).digest()


def next_keys(key: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """The keys of the full pages that hold `tokens` behind the page of `key`."""
    data, found = array("i", tokens).tobytes(), []
    size = len(data) // len(tokens) * page_size
    for at in range(0, len(data) - size + 1, size):
        key = hashlib.blake2b(key + data[at : at + size], digest_size=32).digest()
        found.append(key)
    return found


class _Entry(NamedTuple):
    key: bytes
    page: int
    digests: tuple[str, ...]


class PrefixCache:
    """Published pages, and the way back to the allocator for all pages of KV.

    Attributes:
        kind: the time a page takes to compute, and how often pages are used again.
        since: for idle pages the clock when they were last used, elsewhere infinite.
    """

    def __init__(self, pages: PageAllocator, clock: Clock, *, enabled: bool = True) -> None:
        self.enabled, self.evictions = enabled, 0
        self.kind = Kind(_GUESS)
        self.since = np.full(pages.total, np.inf)
        self._pages, self._clock = pages, clock
        self._entries: dict[bytes, _Entry] = {}
        self._by_page: dict[int, _Entry] = {}
        self._idle: OrderedDict[int, float] = OrderedDict()  # `since`, least recently used first

    def take(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of `keys`, each held once more."""
        found = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            found.append(entry.page)
        self._pages.share(found)
        for page in found:
            if self._idle.pop(page, None) is not None:
                self.since[page] = np.inf
                self.kind.reused()
        return found

    def in_use(self, keys: Sequence[bytes]) -> int:
        """Of the longest known beginning of `keys`, the leading pages that somebody else holds."""
        found = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.page in self._idle:
                break
            found += 1
        return found

    def publish(
        self, keys: Sequence[bytes], pages: Sequence[int], digests: tuple[str, ...]
    ) -> None:
        """Let pages computed with some adapters be found, unless others are, of the same keys."""
        if not self.enabled:
            return
        entries, by_page, new = self._entries, self._by_page, []
        for key, page in zip(keys, pages, strict=True):
            if key not in entries:
                assert page not in by_page, f"page {page} is published under another key"
                entries[key] = by_page[page] = _Entry(key, page, digests)
                new.append(page)
        self._pages.share(new)

    def release(self, pages: Sequence[int]) -> None:
        """Hold pages once less; a published one stays, idle if nobody else holds it."""
        by_page, left = self._by_page, self._pages.release(pages)
        idle = [p for p, n in zip(pages, left.tolist(), strict=True) if n == 1 and p in by_page]
        for page in reversed(idle):
            self._idle[page] = self.since[page] = self._clock.tick()

    @property
    def idle(self) -> int:
        """Pages that only the cache holds."""
        return len(self._idle)

    def worth(self, since: float) -> float:
        """What an idle page is worth by when it was last used."""
        return since + self.kind.saved

    @property
    def oldest(self) -> float:
        """Since when the page is idle that is so longest; infinite if there is none."""
        return next(iter(self._idle.values()), np.inf)

    @property
    def least(self) -> float:
        """Worth of the idle page that goes first; infinite if there is none."""
        return self.worth(self.oldest)

    def evict(self, pages: Sequence[int]) -> None:
        """Free idle pages, one after the other."""
        for page in pages:
            self._leaves(self._idle[page])
        self._forget(pages)
        self._pages.release(pages)

    def surrender(self, most: int, worth: float) -> list[int]:
        """Evict idle pages that are worth no more than `worth`, least first, `most` at most.

        The caller holds them from now on, in the cache's place.
        """
        found: list[int] = []
        for page, since in islice(self._idle.items(), most):
            if self.worth(since) > worth:
                break
            self._leaves(since)
            found.append(page)
        self._forget(found)
        return found

    def _leaves(self, since: float) -> None:
        """A page that is idle since then is evicted."""
        self._clock.advance(self.worth(since))
        self.kind.evicted()
        self.evictions += 1

    def drop(self, digest: str) -> None:
        """Forget what was computed with an adapter that is gone."""
        gone = [page for page, entry in self._by_page.items() if digest in entry.digests]
        self._forget(gone)
        self._pages.release(gone)

    def clear(self) -> None:
        """The pool was lost: nothing is known any more."""
        pages = list(self._by_page)
        self._forget(pages)
        self._pages.release(pages)

    def held(self) -> Iterator[list[int]]:
        """What the cache holds, for the ledger."""
        yield list(self._by_page)

    def _forget(self, pages: Sequence[int]) -> None:
        """Know nothing more of pages, which the cache holds still."""
        for page in pages:
            del self._entries[self._by_page.pop(page).key]
            self._idle.pop(page, None)
        self.since[list(pages)] = np.inf

    def check(self) -> None:
        """Assert that the idle pages are those that only the cache holds."""
        pages = [*self._by_page]
        alone = {pages[i] for i in np.flatnonzero(self._pages.count(pages) == 1)}
        assert alone == self._idle.keys(), f"idle pages {sorted(alone ^ self._idle.keys())[:10]}"
        since = {page: float(self.since[page]) for page in np.flatnonzero(self.since < np.inf)}
        assert since == self._idle, "since disagrees"
