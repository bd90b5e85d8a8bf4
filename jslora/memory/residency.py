"""Adapters on the device: their pages, their way there, and who uses them.

An adapter's pages are taken before its blob is sent; transfers run on another thread, and the
engine writes them into the pool in chunks of one size, a bounded number a step, each only when its
transfer is done. An adapter is ready once its last chunk was dispatched, because the device keeps
the order. What has to leave to make room is not decided here (see `room`). Host only: no jax;
`upload` is the runner's.

Invariants: an adapter that is used or on its way keeps its pages; a transfer that fails takes its
adapter away and nothing else.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jslora.adapters.version import Version
from jslora.batch import Placement
from jslora.memory.pages import PageAllocator
from jslora.memory.worth import Clock, Kind

Upload = Callable[[np.ndarray, np.ndarray], "Future[Any]"]
Outcome = tuple[Version, dict[str, float] | Exception]

_GUESS = 1e-9  # seconds to bring one byte, until it was measured


@dataclass(slots=True)
class Resident:
    """An adapter with pages on the device; `uploads` empty means ready.

    Attributes:
        since: the clock when it was last used.
        fresh: not used since it came.
        started: when its first transfer was asked for, of `time.monotonic`.
    """

    version: Version
    placement: Placement
    uploads: deque["Future[Any]"]
    since: float
    started: float
    sent: float = 0.0
    users: int = 0
    fresh: bool = True
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
        told: what became of loads since this was looked at: the seconds of their stages, or what
            went wrong.
        pinned: digests that are evicted only as a last resort.
    """

    pages: PageAllocator
    clock: Clock
    upload: Upload
    layers: int
    layer_pages: int
    drop_row: int
    chunk: int
    told: list[Outcome] = field(default_factory=list)
    kind: Kind = field(default_factory=lambda: Kind(_GUESS))
    pinned: set[str] = field(default_factory=set)
    residents: dict[str, Resident] = field(default_factory=dict)
    loads: int = 0
    evictions: int = 0
    _coming: list[Resident] = field(default_factory=list)  # looked at in every step, so few

    # Coming --------------------------------------------------------------------------------------

    def bring(self, version: Version, blob: np.ndarray, pages: list[int]) -> None:
        """Start sending an adapter to pages taken for it, which it owns from now on."""
        assert version.digest not in self.residents, f"adapter {version.digest[:12]} is here"
        placement = Placement(
            version.digest, tuple(pages), version.a_offset, version.b_offset,
            version.rank, version.scale,
        )  # fmt: skip
        try:
            started = time.monotonic()
            uploads = deque(self._send(blob, pages))
        except BaseException:
            self.pages.release(pages)
            raise
        resident = Resident(version, placement, uploads, self.clock.tick(), started)
        self.residents[version.digest] = resident
        self._coming.append(resident)
        self.loads += 1

    def _send(self, blob: np.ndarray, pages: list[int]) -> Iterator["Future[Any]"]:
        first = np.arange(self.layers, dtype=np.int32)[:, None] * self.layer_pages
        rows = (first + np.asarray(pages, np.int32)[None]).reshape(-1)
        data = blob.reshape(len(rows), -1)
        for at in range(0, len(rows), self.chunk):
            n = min(self.chunk, len(rows) - at)
            if n == self.chunk:
                yield self.upload(rows[at : at + n], data[at : at + n])
            else:
                padded = np.zeros((self.chunk, data.shape[1]), data.dtype)
                padded[:n] = data[at:]
                ids = np.full(self.chunk, self.drop_row, np.int32)
                ids[:n] = rows[at:]
                yield self.upload(ids, padded)

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
            if resident.doomed and not resident.busy:
                self._drop(resident)
        self._coming = [resident for resident in self._coming if resident.uploads]
        return found

    def _await(self, patience: float) -> None:
        coming = [resident.uploads[0] for resident in self._coming]
        if coming and not any(upload.done() for upload in coming):
            wait(coming, patience, FIRST_COMPLETED)

    def _note(self, resident: Resident) -> None:
        now = time.monotonic()
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

    def acquire(self, digest: str) -> None:
        """Hold a ready adapter for a running sequence."""
        resident = self.residents[digest]
        if not (resident.fresh or resident.users):
            self.kind.reused()
        resident.users += 1
        resident.fresh = False

    def release(self, digest: str) -> None:
        resident = self.residents[digest]
        assert resident.users > 0, f"adapter {digest[:12]} is not in use"
        resident.users -= 1
        resident.since = self.clock.tick()
        if resident.doomed and not resident.busy:
            self._drop(resident)

    # Going ---------------------------------------------------------------------------------------

    def idle(self, keep: Collection[str]) -> list[Resident]:
        """Adapters that may leave, those of least worth first."""
        found = [r for d, r in self.residents.items() if not r.busy and d not in keep]
        return sorted(found, key=self.worth)

    def worth(self, resident: Resident) -> float:
        """What a page of an idle adapter is worth (see `worth`)."""
        version = resident.version
        return resident.since + self.kind.saved * version.packed_bytes / version.n_pages

    def evict(self, resident: Resident) -> None:
        """Free an idle adapter's pages."""
        assert not resident.busy, f"adapter {resident.version.digest[:12]} is in use"
        self.clock.advance(self.worth(resident))
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
        del self.residents[resident.version.digest]
        self.pages.release(resident.placement.pages)
