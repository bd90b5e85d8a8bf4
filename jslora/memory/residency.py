"""Adapters on the device: their pages, their way there, and who uses them.

An adapter's pages are taken before its blob is sent; transfers run on another thread, and the
engine writes them into the pool in chunks of one size, a bounded number a step, each only when its
transfer is done. An adapter is ready once its last chunk was dispatched, because the device keeps
the order. What has to leave to make room is not decided here (see `room`). Host only: no jax;
`upload` is the runner's.

Invariants: an adapter that is used or on its way keeps its pages, all others are idle; a transfer
that fails takes its adapter away and nothing else; a page holds the same number of bytes of every
adapter, so that of idle ones the longest idle is worth least.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import Any

import numpy as np

from jslora.adapters.version import Version
from jslora.batch import Placement
from jslora.calls import Chunk
from jslora.memory.pages import PageAllocator
from jslora.memory.worth import Clock, Kind

WRITES_PER_STEP, WRITES_PER_SECOND = 16, 800
"""Uploaded chunks written into the pool between two steps: at least, and for a second of a step."""

Upload = Callable[[Chunk], "Future[Any]"]
Outcome = tuple[Version, dict[str, float] | Exception]

_GUESS = 1e-9  # seconds to bring one byte, until it was measured


def write_limit(step_seconds: float) -> int:
    """How many chunks may be written before a step, if the last one took so long.

    Writing delays everybody, a long step less than a short one in proportion.
    """
    return max(WRITES_PER_STEP, int(WRITES_PER_SECOND * step_seconds))


def chunks(
    digest: str, blob: np.ndarray, pages: Sequence[int], layer_pages: int, drop_row: int, size: int
) -> Iterator[Chunk]:
    """An adapter in parts of `size` rows, the last one filled up with rows that are dropped.

    Args:
        blob: [devices of this process, L, n, numbers in a page of one].
        layer_pages: pages of the pool in a layer.
        drop_row: beyond the pool.
    """
    first = np.arange(blob.shape[1], dtype=np.int32)[:, None] * layer_pages
    rows = (first + np.asarray(pages, np.int32)[None]).reshape(-1)
    data = blob.reshape(len(blob), len(rows), -1)
    count, held = -(-len(rows) // size), tuple(pages)
    for index in range(count):
        part = slice(index * size, min((index + 1) * size, len(rows)))
        ids, numbers = rows[part], data[:, part]
        if (n := len(ids)) < size:
            filled = np.full(size, drop_row, np.int32)
            padded = np.zeros((len(blob), size, data.shape[2]), data.dtype)
            filled[:n], padded[:, :n] = ids, numbers
            ids, numbers = filled, padded
        yield Chunk(digest, index, count, held, ids, numbers)


@dataclass(slots=True)
class Resident:
    """An adapter with pages on the device; `uploads` empty means ready.

    Attributes:
        started: when its first transfer was asked for.
        since: the clock when it became idle.
    """

    version: Version
    placement: Placement
    uploads: deque["Future[Any]"]
    started: float
    since: float = np.inf
    sent: float = 0.0
    users: int = 0
    doomed: bool = False

    @property
    def busy(self) -> bool:
        return self.users > 0 or bool(self.uploads)


@dataclass(slots=True)
class Residency:
    """The adapters that hold pages.

    Attributes:
        layers, layer_pages: rows of the pool an adapter's page has, one in each layer.
        chunk: rows of the pool in one upload.
        now: the time in seconds.
        told: what became of loads since this was looked at: the seconds of their stages, or what
            went wrong.
        pinned: digests that are evicted only as a last resort.
        fresh: digests not used since they came.
        used: pages of adapters that running sequences use.
        since: of idle adapters' pages the clock when they became idle, elsewhere infinite.
        before, after: of pages in a run how many of the run are before and after, elsewhere 0.
    """

    pages: PageAllocator
    clock: Clock
    upload: Upload
    layers: int
    layer_pages: int
    drop_row: int
    chunk: int
    now: Callable[[], float] = time.monotonic
    told: list[Outcome] = field(default_factory=list)
    kind: Kind = field(default_factory=lambda: Kind(_GUESS))
    pinned: set[str] = field(default_factory=set)
    residents: dict[str, Resident] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    used: int = 0
    loads: int = 0
    evictions: int = 0
    since: np.ndarray = field(init=False)
    before: np.ndarray = field(init=False)
    after: np.ndarray = field(init=False)
    _page_bytes: int = 0
    _by_page: dict[int, Resident] = field(default_factory=dict)
    _idle: dict[str, Resident] = field(default_factory=dict)  # longest idle first
    _coming: list[Resident] = field(default_factory=list)  # looked at in every step, so few

    def __post_init__(self) -> None:
        total = self.pages.total
        self.since, self.before, self.after = np.full(total, np.inf), *np.zeros((2, total))

    @property
    def pages_held(self) -> int:
        """Pages of all adapters that are here, or on their way."""
        return len(self._by_page)

    @property
    def pages_idle(self) -> int:
        """Pages of adapters that nothing uses."""
        return int(np.isfinite(self.since).sum())

    def resting(self) -> list[str]:
        """Digests of the adapters that nothing uses, the last used first; from any thread."""
        return list(self._idle)[::-1]

    # Coming --------------------------------------------------------------------------------------

    def bring(self, version: Version, blob: np.ndarray, pages: list[int]) -> None:
        """Start sending an adapter to pages taken for it, which it owns from now on."""
        assert version.digest not in self.residents, f"adapter {version.digest[:12]} is here"
        page_bytes = version.packed_bytes // version.n_pages
        assert self._page_bytes in (0, page_bytes), f"{page_bytes} bytes in a page"
        self._page_bytes = page_bytes
        assert blob.shape[1] == self.layers, f"a blob {blob.shape} for {self.layers} layers"
        placement = Placement(
            version.digest, tuple(pages), version.a_offset, version.b_offset,
            version.rank, version.scale, version.storage,
        )  # fmt: skip
        try:
            started = self.now()
            parts = chunks(version.digest, blob, pages, self.layer_pages, self.drop_row, self.chunk)
            uploads = deque(self.upload(chunk) for chunk in parts)
        except BaseException:
            self.pages.release(pages)
            raise
        self._coming.append(self._settle(Resident(version, placement, uploads, started)))
        self.loads += 1

    def _settle(self, resident: Resident) -> Resident:
        digest, pages = resident.version.digest, resident.placement.pages
        self.residents[digest] = resident
        self.fresh.add(digest)
        self._by_page.update(dict.fromkeys(pages, resident))
        if resident.placement.is_run:
            self.before[pages[0] : pages[-1] + 1] = np.arange(len(pages))
            self.after[pages[0] : pages[-1] + 1] = np.arange(len(pages))[::-1]
        return resident

    def writes(self, limit: int, patience: float) -> list[Any]:
        """Up to `limit` transferred chunks to write into the pool now, in order.

        Waits `patience` seconds at most for the first: a step later would be far later.
        """
        self._await(patience)
        found: list[Any] = []
        for resident in self._coming:
            try:
                while resident.uploads and resident.uploads[0].done() and len(found) < limit:
                    found.append(resident.uploads[0].result())
                    resident.uploads.popleft()
                    self._note(resident)
            except Exception as error:  # of a transfer; what was written of it is never read
                resident.uploads.clear()
                self._drop(resident)
                self.told.append((resident.version, error))
                continue
            if not resident.uploads:
                self._rest(resident)
        self._coming = [resident for resident in self._coming if resident.uploads]
        return found

    def _await(self, patience: float) -> None:
        coming = [resident.uploads[0] for resident in self._coming]
        if coming and not any(upload.done() for upload in coming):
            wait(coming, patience, FIRST_COMPLETED)

    def _note(self, resident: Resident) -> None:
        now = self.now()
        if not resident.sent:
            resident.sent = now
        if not resident.uploads:
            whole, version = now - resident.started, resident.version
            self.kind.took(whole / version.packed_bytes)
            first = resident.sent - resident.started
            self.told.append((version, {"transfer": first, "write": whole - first}))

    @property
    def loading(self) -> bool:
        """Whether an adapter is on its way."""
        return bool(self._coming)

    # Use -----------------------------------------------------------------------------------------

    def placement(self, digest: str) -> Placement | None:
        """Where an adapter lies, if it is ready to be used."""
        resident = self.residents.get(digest)
        return resident.placement if resident and not resident.uploads else None

    def acquire(self, digest: str) -> Placement:
        """Hold a ready adapter for a running sequence; it stays where it is until released."""
        resident = self.residents[digest]
        if not resident.users:
            if digest not in self.fresh:
                self.kind.reused()
            self._wake(resident)
            self.used += len(resident.placement.pages)
        resident.users += 1
        self.fresh.discard(digest)
        return resident.placement

    def release(self, digest: str) -> None:
        resident = self.residents[digest]
        assert resident.users > 0, f"adapter {digest[:12]} is not in use"
        resident.users -= 1
        if not resident.users:
            self.used -= len(resident.placement.pages)
            self._rest(resident)

    def _rest(self, resident: Resident) -> None:
        """Nothing uses an adapter any more."""
        if resident.doomed:
            self._drop(resident)
            return
        resident.since = self.clock.tick()
        self._idle[resident.version.digest] = resident
        self.since[list(resident.placement.pages)] = resident.since

    def _wake(self, resident: Resident) -> None:
        """An adapter is idle no more."""
        del self._idle[resident.version.digest]
        self.since[list(resident.placement.pages)] = np.inf

    # Going ---------------------------------------------------------------------------------------

    def idle(self, keep: Collection[str]) -> Iterator[Resident]:
        """Adapters that may leave, those of least worth first; each may be evicted when it came."""
        for digest in filterfalse(keep.__contains__, list(self._idle)):  # there may be thousands
            yield self._idle[digest]

    def among(self, pages: range) -> list[Resident]:
        """Adapters that have any of these pages, those of least worth first."""
        found = {r.version.digest: r for page in pages if (r := self._by_page.get(page))}
        return sorted(found.values(), key=lambda resident: resident.since)

    def worth(self, since: float) -> float:
        """What a page of an idle adapter is worth by when that became idle (see `worth`)."""
        return since + self.kind.saved * self._page_bytes

    def oldest(self, keep: Collection[str]) -> float:
        """Since when the adapter is idle that may leave first; infinite if none may."""
        first = next(filterfalse(keep.__contains__, self._idle), None)
        return np.inf if first is None else self._idle[first].since

    @property
    def least(self) -> float:
        """Worth of the adapter that goes first; infinite if none is idle."""
        for resident in self._idle.values():
            return self.worth(resident.since)
        return np.inf

    def evict(self, resident: Resident) -> None:
        """Free an idle adapter's pages."""
        assert not resident.busy, f"adapter {resident.version.digest[:12]} is in use"
        self.clock.advance(self.worth(resident.since))
        self.kind.evicted()
        self.evictions += 1
        self._drop(resident)

    def retire(self, digest: str) -> None:
        """Free an adapter that nobody can ask for any more, as soon as nothing uses it."""
        resident = self.residents.get(digest)
        if resident is not None:
            resident.doomed = True
            if not resident.busy:
                self._drop(resident)

    def revive(self, digest: str) -> None:
        """Somebody can ask for the adapter again."""
        if digest in self.residents:
            self.residents[digest].doomed = False

    def forget_all(self) -> None:
        """The pool was lost: nothing is on the device any more."""
        for resident in list(self.residents.values()):
            self._drop(resident)
        self._coming.clear()

    def _drop(self, resident: Resident) -> None:
        assert not resident.users, f"{resident.users} use adapter {resident.version.digest[:12]}"
        digest, pages = resident.version.digest, list(resident.placement.pages)
        if digest in self._idle:
            self._wake(resident)
        del self.residents[digest]
        self.fresh.discard(digest)
        for page in pages:
            del self._by_page[page]
        self.before[pages] = self.after[pages] = 0
        self.pages.release(pages)

    def check(self) -> None:
        """Assert that what is noted of every page agrees with the adapters."""
        idle = {digest: r for digest, r in self.residents.items() if not r.busy}
        assert idle == self._idle, f"idle: {sorted(idle.keys() ^ self._idle.keys())[:10]}"
        times = [resident.since for resident in self._idle.values()]
        assert times == sorted(times), "idle adapters are not in order"
        since, inside = np.full(self.pages.total, np.inf), np.zeros(self.pages.total)
        owners: dict[int, Resident] = {}
        for resident in self.residents.values():
            pages = resident.placement.pages
            owners.update(dict.fromkeys(pages, resident))
            if not resident.busy:
                since[list(pages)] = resident.since
            inside[list(pages)] = len(pages) - 1 if resident.placement.is_run else 0
        assert owners == self._by_page, "pages and adapters disagree"
        assert (since == self.since).all() and (inside == self.before + self.after).all()
