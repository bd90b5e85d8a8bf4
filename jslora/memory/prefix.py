"""The prefix cache: full pages of KV by what was computed in them, for whoever asks the same next.

A page's key is a hash chained over all tokens up to its end, from a root of adapter digest, tenant
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
from dataclasses import dataclass

import numpy as np

from jslora.memory.pages import PageAllocator
from jslora.memory.worth import Clock, Kind, Numbers

_GUESS = 0.02  # seconds to compute a page again, until it was measured


def root_key(digest: str, tenant: str, salt: str) -> bytes:
    """Where the chain of keys begins."""
    return hashlib.blake2b(json.dumps([digest, tenant, salt]).encode(), digest_size=32).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the page that holds `tokens` behind the page of `key`."""
    return hashlib.blake2b(key + array("i", tokens).tobytes(), digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class _Entry:
    key: bytes
    page: int
    digest: str


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
        self._idle: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first

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

    def publish(self, key: bytes, page: int, digest: str) -> None:
        """Let a computed page be found; does nothing if another page of this key can be."""
        if self.enabled and key not in self._entries:
            assert page not in self._by_page, f"page {page} is published under another key"
            self._pages.share([page])
            self._entries[key] = self._by_page[page] = _Entry(key, page, digest)

    def release(self, pages: Sequence[int]) -> None:
        """Hold pages once less; a published one stays, idle if nobody else holds it."""
        self._pages.release(pages)
        for page in reversed(pages):
            entry = self._by_page.get(page)
            if entry is not None and self._pages.holders(page) == 1:
                self._idle[page] = entry
                self.since[page] = self._clock.tick()

    @property
    def idle(self) -> int:
        """Pages that only the cache holds."""
        return len(self._idle)

    def worth(self, since: Numbers) -> Numbers:
        """What idle pages are worth by when they were last used."""
        return since + self.kind.saved

    @property
    def least(self) -> float:
        """Worth of the idle page that goes first; infinite if there is none."""
        for page in self._idle:
            return self.worth(float(self.since[page]))
        return np.inf

    def evict(self, page: int | None = None) -> None:
        """Free an idle page; by default the one of least worth."""
        page = next(iter(self._idle)) if page is None else page
        self._clock.advance(self.worth(float(self.since[page])))
        self.kind.evicted()
        self.evictions += 1
        self._forget(self._idle[page])

    def drop(self, digest: str) -> None:
        """Forget what was computed with an adapter that is gone."""
        for entry in [entry for entry in self._entries.values() if entry.digest == digest]:
            self._forget(entry)

    def clear(self) -> None:
        """The pool was lost: nothing is known any more."""
        for entry in list(self._entries.values()):
            self._forget(entry)

    def held(self) -> Iterator[list[int]]:
        """What the cache holds, for the ledger."""
        yield list(self._by_page)

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.key], self._by_page[entry.page]
        self._idle.pop(entry.page, None)
        self.since[entry.page] = np.inf
        self._pages.release([entry.page])

    def check(self) -> None:
        """Assert that the idle pages are those that only the cache holds."""
        alone = {page for page in self._by_page if self._pages.holders(page) == 1}
        assert alone == self._idle.keys(), f"idle pages {sorted(alone ^ self._idle.keys())[:10]}"
        assert alone == set(np.flatnonzero(self.since < np.inf).tolist()), "since disagrees"
