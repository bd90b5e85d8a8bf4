"""Adapters without files: packed blobs whose every page says whose it is, and a store of them."""

from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from jslora.adapters.registration import Registration, Source
from jslora.adapters.version import Version
from jslora.calls import Chunk
from jslora.errors import AdapterRejected
from jslora.request import AdapterInfo

LAYERS = 2
NUMBERS = 4
"""Numbers in a page of one layer."""


def page_mark(number: int, layer: int, page: int) -> list[float]:
    """What the `page`-th page of adapter `number` holds in a layer."""
    return [number, layer, page, 1]


def make_version(number: int, n_pages: int) -> Version:
    """A version of so many pages; its digest sorts as its number does."""
    table = np.zeros((LAYERS, 7), np.int32)
    return Version(
        digest=f"{number:03}", a_offset=table, b_offset=table, rank=table,
        scale=table.astype(np.float32), n_pages=n_pages,
        packed_bytes=LAYERS * n_pages * NUMBERS * 4,
    )  # fmt: skip


def make_blob(version: Version) -> np.ndarray:
    """Its packed numbers for one device."""
    number, pages = int(version.digest), range(version.n_pages)
    blob = [[page_mark(number, layer, page) for page in pages] for layer in range(LAYERS)]
    return np.array([blob], np.float32)


def make_registration(version: Version, *, read: bool = True) -> Registration:
    """A name for a version, which is known once its tensors were read."""
    info = AdapterInfo(name=f"adapter-{version.digest}", digest="", state="registered", rank=1)
    source = Source(Path("/"), Path("/"), None)  # type: ignore[arg-type]
    return Registration(info.name, info, version.n_pages, source, version if read else None)


class FakeStore:
    """Host memory that has a blob only some turns after it was asked for.

    Attributes:
        unread: versions of registrations that do not know theirs yet.
        delays: turns for which each digest is still being read, from when it is asked for.
        again: turns it takes again after a turn in which the blob was there.
        refused: digests whose next read fails.
    """

    def __init__(self, again: int = 0) -> None:
        self.unread: dict[Registration, Version] = {}
        self.delays: Counter[str] = Counter()
        self.again = again
        self.refused: set[str] = set()
        self._asked: set[str] = set()
        self._given: set[str] = set()

    def turn(self) -> None:
        """Time passes: what was asked for gets nearer, and what was given leaves."""
        self.delays.subtract({digest: 1 for digest in self._asked if self.delays[digest]})
        self.delays.update(dict.fromkeys(self._given, self.again))
        self._asked.clear()
        self._given.clear()

    def fits_host(self, pages: int) -> bool:
        return True

    def resolve(self, registration: Registration) -> Version | None:
        if registration.version is None:
            version = self.unread[registration]
            if not self._read(version.digest):
                return None
            registration.version = self.unread.pop(registration)
        return registration.version

    def blob(self, version: Version) -> np.ndarray | None:
        if not self._read(version.digest):
            return None
        self._given.add(version.digest)
        return make_blob(version)

    def release(self, registration: Registration) -> None:
        assert registration.uses > 0, f"{registration.name} is not bound"
        registration.uses -= 1

    def _read(self, digest: str) -> bool:
        self._asked.add(digest)
        if self.delays[digest] > 0:
            return False
        if digest in self.refused:
            self.refused.discard(digest)
            raise AdapterRejected(f"adapter {digest} changed on disk; load it again")
        return True


class FakeUploads:
    """Transfers that are done when the test says so, in order."""

    def __init__(self) -> None:
        self.open: deque[tuple[Future, tuple[np.ndarray, np.ndarray]]] = deque()

    def __call__(self, chunk: Chunk) -> "Future":
        [data] = chunk.data
        assert len(chunk.rows) == len(data)
        future: Future = Future()
        self.open.append((future, (chunk.rows, data)))
        return future

    def finish(self, n: int) -> None:
        """Let the `n` oldest transfers be done."""
        for _ in range(min(n, len(self.open))):
            future, chunk = self.open.popleft()
            future.set_result(chunk)
