"""A follower's adapters: its own copies of the folders, packed for its own devices.

It reads what the leader names, below its own root of the same number, and knows contents by digest
alone. What was read stays in host memory, the least recently used first to leave, and in the packed
cache; a folder that changed since is noticed by its digest. Host only: no jax.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jslora.adapters.cache import PackedCache
from jslora.adapters.folders import Roots
from jslora.adapters.host import HostTier
from jslora.adapters.reader import Reader
from jslora.errors import AdapterRejected
from jslora.logs import printable


class Shelf:
    """Every method may be called from any thread, and may take as long as reading does."""

    def __init__(
        self, roots: Sequence[Path], reader: Reader, cache: PackedCache, host_cache_bytes: int
    ) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._reader, self._cache = reader, cache
        self._lock = threading.Lock()
        self._host = HostTier(host_cache_bytes)

    def read(self, root: int, path: str, storage: str) -> str:
        """The digest of what a folder holds, stored so; its numbers are at hand then.

        Args:
            root: number of a root.
            path: of a folder below it.

        Raises:
            AdapterRejected: there is none, or it cannot be served.
        """
        if root >= len(self._roots):
            raise AdapterRejected(f"there are {len(self._roots)} adapter roots, no number {root}")
        folder, top = Roots([self._roots[root]]).locate(path)
        known = self._reader.remembered(folder, storage)
        if known is not None and known.version is not None:
            digest, pages = known.version.digest, known.version.n_pages
            if self._at_hand(digest, pages) is not None:
                return digest
        whole = self._reader.whole(folder, top, storage)
        self._keep(whole.version.digest, whole.blob)
        return whole.version.digest

    def blob(
        self, digest: str, pages: int, root: int, path: str, storage: str
    ) -> Float[np.ndarray, "d L n E"]:
        """The packed numbers of contents that were read here before.

        Raises:
            AdapterRejected: they are gone, and the folder has others now.
        """
        found = self._at_hand(digest, pages)
        if found is None and self.read(root, path, storage) == digest:
            found = self._at_hand(digest, pages)
        if found is None:
            raise AdapterRejected(f"{printable(path)!r} changed on disk; load it again")
        return found

    def forget(self, digest: str) -> None:
        """Nobody asks for contents any more."""
        with self._lock:
            self._host.drop(digest)

    def _at_hand(self, digest: str, pages: int) -> np.ndarray | None:
        with self._lock:
            blob = self._host.get(digest)
        if blob is None:
            blob = self._cache.load(digest, pages)
            if blob is not None:
                self._keep(digest, blob)
        return blob

    def _keep(self, digest: str, blob: np.ndarray) -> None:
        with self._lock:
            self._host.put(digest, blob)
