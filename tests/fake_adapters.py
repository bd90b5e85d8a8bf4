"""Adapters without files: packed blobs whose every page says whose it is, and a store of them."""

from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from jslora.adapters.layout import PackedAdapter
from jslora.adapters.version import Version
from jslora.errors import AdapterRejected

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
        digest=f"{number:03}", name=f"adapter-{number}", path=Path("/"), place="",
        a_offset=table, b_offset=table, rank=table, scale=table.astype(np.float32),
        modules={}, layers=LAYERS, n_pages=n_pages, padding=0, bytes=0,
        packed_bytes=LAYERS * n_pages * NUMBERS * 4, base_model=None, warnings=(),
    )  # fmt: skip


def make_packed(version: Version) -> PackedAdapter:
    """Its blob."""
    number, pages = int(version.digest), range(version.n_pages)
    blob = [[page_mark(number, layer, page) for page in pages] for layer in range(LAYERS)]
    return PackedAdapter(
        digest=version.digest, blob=np.array(blob, np.float32), a_offset=version.a_offset,
        b_offset=version.b_offset, rank=version.rank, scale=version.scale, padding=0,
    )  # fmt: skip


class FakeStore:
    """Host memory that has a blob only after it was asked for it often enough.

    Attributes:
        delays: how often each digest is still answered with "being read".
        again: how often it is answered so again after each time the blob was there.
        refused: digests whose next read fails.
    """

    def __init__(self, again: int = 0) -> None:
        self.delays: Counter[str] = Counter()
        self.again = again
        self.refused: set[str] = set()

    def packed(self, version: Version) -> PackedAdapter | None:
        if self.delays[version.digest] > 0:
            self.delays[version.digest] -= 1
            return None
        if version.digest in self.refused:
            self.refused.discard(version.digest)
            raise AdapterRejected(f"adapter {version.name!r} changed on disk; load it again")
        self.delays[version.digest] = self.again
        return make_packed(version)


class FakeUploads:
    """Transfers that are done when the test says so, in order."""

    def __init__(self) -> None:
        self.open: deque[tuple[Future, tuple[np.ndarray, np.ndarray]]] = deque()

    def __call__(self, rows: np.ndarray, data: np.ndarray) -> "Future":
        assert len(rows) == len(data)
        future: Future = Future()
        self.open.append((future, (rows, data)))
        return future

    def finish(self, n: int) -> None:
        """Let the `n` oldest transfers be done."""
        for _ in range(min(n, len(self.open))):
            future, chunk = self.open.popleft()
            future.set_result(chunk)
