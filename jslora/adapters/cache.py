"""The disk tier: packed blobs by digest in a private folder, so that folders are parsed once.

A blob is a file in NumPy's format and, after its numbers, a sha256 over them and the digest they
belong to. Files appear whole or not at all and are checked whenever they are read; one that is
damaged or misplaced is dropped and made again, never trusted, and a full disk is no error. They are
read into memory and not mapped: Python keeps a descriptor open for each map, and a page that left
the page cache would stop the engine's thread. The least recently used leave, of all layouts, when
the bytes are too many; times of files tell the order, so a restart knows it, and several servers
may share a cache. Every method may be called from any thread. Host only: no jax.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jslora.adapters.known import KnownFolders
from jslora.adapters.layout import empty_blob, layout_key
from jslora.adapters.private import private_folder, write_whole
from jslora.model.config import ModelConfig
from jslora.split import ONE_DEVICE, Split

_CHECK = 32  # bytes of a sha256
_DIGEST = re.compile("[0-9a-f]{64}")

log = logging.getLogger(__name__)


class PackedCache:
    """Packed blobs for one model and pool, and what is known of source folders.

    Args:
        folder: holds a folder for each layout; made if it is absent.
        page_elements: numbers in a page of one layer on one device.
        limit_bytes: most bytes of blobs kept, of all layouts together.
        split, devices: how the model is split, and whose parts are here; by default all.

    Attributes:
        known: what is known of source folders.

    Raises:
        ConfigError: the folder cannot be made, or others can write to it.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, page_elements: int, dtype: np.dtype,
        limit_bytes: int, split: Split = ONE_DEVICE, devices: range | None = None,
    ) -> None:  # fmt: skip
        devices = range(split.devices) if devices is None else devices
        mine = private_folder(folder) / layout_key(model, page_elements, dtype, split, devices)
        private_folder(mine)
        self._blobs = private_folder(mine / "blobs")
        self.known = KnownFolders(mine / "known", model)
        self._devices, self._layers, self._page_elements = len(devices), model.layers, page_elements
        self._dtype = np.dtype(dtype)
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._sizes = OrderedDict(_by_age(folder))  # bytes of each file, least recently used first
        self._bytes = sum(self._sizes.values())
        self._shrink()

    def size(self, digest: str) -> int:
        """Bytes that an adapter's blob takes on disk."""
        return self._sizes.get(self._path(digest), 0)

    def load(self, digest: str, n_pages: int) -> Float[np.ndarray, "d L n E"] | None:
        """Read a blob of so many pages, or None if there is no sound one."""
        path = self._path(digest)
        try:
            blob = self._read(path, digest, n_pages)
            if blob is not None:
                os.utime(path)
                self._count(path, path.stat().st_size)
                return blob
            log.warning("the cached blob of adapter %s is damaged and dropped", digest[:12])
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the adapter cache cannot be read: %s", error.strerror)
        self._count(path, 0)
        return None

    def store(self, digest: str, blob: Float[np.ndarray, "d L n E"]) -> None:
        """Keep a blob, if there is room for it."""
        path = self._path(digest)
        header = self._header(blob.shape[2])
        size = len(header) + blob.nbytes + _CHECK
        if size > self._limit or path.exists():
            return
        try:
            write_whole(path, [header, blob.view(np.uint8).data, _check(digest, blob)])
        except OSError as error:
            log.warning("the adapter cache cannot be written: %s", error.strerror)
            return
        self._count(path, size)
        self._shrink()

    def _path(self, digest: str) -> Path:
        assert _DIGEST.fullmatch(digest), f"{digest!r} is no digest"
        return self._blobs / f"{digest}.npy"

    def _read(self, path: Path, digest: str, n_pages: int) -> Float[np.ndarray, "d L n E"] | None:
        header = self._header(n_pages)
        with open(path, "rb") as file:
            blob = empty_blob(self._shape(n_pages), self._dtype)
            size = os.fstat(file.fileno()).st_size
            if size != len(header) + blob.nbytes + _CHECK or file.read(len(header)) != header:
                return None
            read = file.readinto(blob.view(np.uint8).data)
            sound = read == blob.nbytes and file.read() == _check(digest, blob)
        blob.flags.writeable = False
        return blob if sound else None

    def _header(self, n_pages: int) -> bytes:
        """What a file of so many pages begins with."""
        text = io.BytesIO()
        kind = f"<u{self._dtype.itemsize}"  # NumPy has no name for bfloat16
        np.lib.format.write_array_header_1_0(
            text, {"descr": kind, "fortran_order": False, "shape": self._shape(n_pages)}
        )
        return text.getvalue()

    def _shape(self, n_pages: int) -> tuple[int, int, int, int]:
        return self._devices, self._layers, n_pages, self._page_elements

    def _count(self, path: Path, size: int) -> None:
        """A file was just used and has `size` bytes; none if it is gone."""
        with self._lock:
            self._bytes += size - self._sizes.pop(path, 0)
            if size:
                self._sizes[path] = size

    def _shrink(self) -> None:
        """Let the oldest files go until the others are within the limit."""
        while True:
            with self._lock:
                if self._bytes <= self._limit:
                    return
                path, size = self._sizes.popitem(last=False)
                self._bytes -= size
            with contextlib.suppress(OSError):
                path.unlink()


def _check(digest: str, blob: Float[np.ndarray, "d L n E"]) -> bytes:
    found = hashlib.sha256(digest.encode())
    found.update(blob.view(np.uint8).data)
    return found.digest()


def _by_age(folder: Path) -> list[tuple[Path, int]]:
    """(path, bytes) of all blobs below the cache's folder, the oldest first."""
    found = []
    for path in folder.glob("*/blobs/*.npy"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime_ns, path, status.st_size))
    return [(path, size) for _, path, size in sorted(found)]
