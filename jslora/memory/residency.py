"""Which adapters are on the device: loaded on demand, evicted when idle, least recent first.

An adapter's pages are taken before its blob is sent; uploads run on another thread, and the engine
writes them into the pool a bounded number of chunks a step, each only when its transfer is ready.
An adapter is ready once its last chunk was dispatched, because the device keeps the order.
Host only: no jax; `upload` is the runner's.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.batch import Placement
from jslora.memory.pages import PageAllocator

Upload = Callable[[np.ndarray, np.ndarray], "Future[Any]"]


@dataclass(slots=True)
class Resident:
    """An adapter with pages on the device; `uploads` empty means ready."""

    version: Version
    placement: Placement
    uploads: deque["Future[Any]"]
    users: int = 0
    used_at: int = 0
    doomed: bool = False


@dataclass(slots=True)
class Residency:
    """The adapters that hold pages.

    Attributes:
        layers, layer_pages: rows of the pool an adapter's page has, one in each layer.
        chunk: rows of the pool in one upload.
        pinned: digests that are evicted only as a last resort.
    """

    pages: PageAllocator
    store: AdapterStore
    upload: Upload
    layers: int
    layer_pages: int
    drop_row: int
    chunk: int
    pinned: set[str] = field(default_factory=set)
    residents: dict[str, Resident] = field(default_factory=dict)
    loads: int = 0
    evictions: int = 0
    _clock: Iterator[int] = field(default_factory=count)

    def placement(self, version: Version) -> Placement | None:
        """Where the adapter lies, if it is ready to be used."""
        resident = self.residents.get(version.digest)
        return resident.placement if resident and not resident.uploads else None

    def ensure(self, version: Version, keep: Collection[str], *, last_resort: bool = False) -> bool:
        """Start loading an adapter unless it is here; False if there is no room for it.

        Evicts to make room as `make_room` does.

        Raises:
            AdapterRejected: its files could not be read again.
        """
        if version.digest in self.residents:
            return True
        packed = self.store.packed(version)
        if packed is None:
            return True  # being read; asked for again in the next step
        if not self.make_room(version.n_pages, keep, last_resort=last_resort):
            return False
        pages = self.pages.take_run(version.n_pages)
        assert pages is not None, f"{self.pages.free} pages free, {version.n_pages} promised"
        placement = Placement(
            version.digest, tuple(pages), version.a_offset, version.b_offset,
            version.rank, version.scale,
        )  # fmt: skip
        try:
            uploads = deque(self._send(packed.blob, pages))
        except BaseException:
            self.pages.release(pages)
            raise
        self.residents[version.digest] = Resident(version, placement, uploads)
        self.touch(version.digest)
        self.loads += 1
        return True

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

    def writes(self, limit: int) -> list[Any]:
        """Up to `limit` transferred chunks to write into the pool now, in order."""
        found: list[Any] = []
        for resident in list(self.residents.values()):
            while resident.uploads and resident.uploads[0].done() and len(found) < limit:
                found.append(resident.uploads.popleft().result())
            if resident.doomed and not resident.users and not resident.uploads:
                self._drop(resident)
        return found

    @property
    def loading(self) -> bool:
        return any(resident.uploads for resident in self.residents.values())

    def make_room(self, n: int, keep: Collection[str], *, last_resort: bool = False) -> bool:
        """Evict idle adapters, least recently used first, until `n` pages are free; or none.

        Those in `keep` stay, and pinned ones do unless this is the last resort.
        """
        stay = {*keep} if last_resort else {*keep, *self.pinned}
        idle = [
            resident
            for digest, resident in self.residents.items()
            if not (resident.users or resident.uploads or digest in stay)
        ]
        if self.pages.free + sum(len(r.placement.pages) for r in idle) < n:
            return False
        for resident in sorted(idle, key=lambda r: (r.version.digest in self.pinned, r.used_at)):
            if self.pages.free >= n:
                break
            self._drop(resident)
            self.evictions += 1
        return True

    def acquire(self, digest: str) -> None:
        """Hold a ready adapter for a running sequence."""
        self.residents[digest].users += 1
        self.touch(digest)

    def release(self, digest: str) -> None:
        resident = self.residents[digest]
        assert resident.users > 0, f"adapter {digest[:12]} is not in use"
        resident.users -= 1
        self.touch(digest)
        if resident.doomed and not resident.users and not resident.uploads:
            self._drop(resident)

    def touch(self, digest: str) -> None:
        self.residents[digest].used_at = next(self._clock)

    def retire(self, digest: str) -> None:
        """Free an adapter that no name has any more, as soon as nothing uses it."""
        resident = self.residents.get(digest)
        if resident is not None:
            resident.doomed = True
            if not resident.users and not resident.uploads:
                self._drop(resident)

    def revive(self, digest: str) -> None:
        """A name has the adapter again."""
        if digest in self.residents:
            self.residents[digest].doomed = False

    def forget_all(self) -> None:
        """The pool was lost: nothing is on the device any more."""
        for resident in list(self.residents.values()):
            self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        del self.residents[resident.version.digest]
        self.pages.release(resident.placement.pages)
