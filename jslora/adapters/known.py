"""What is known of source folders: their contents' digest and outline, by their files' identity.

With it a folder is registered without opening it; each way of storing what it holds has an entry of
its own. Invariant: an entry is written only when the files had settled before they were read, since
a change within one tick of a file system's clock leaves no trace; so equal identities mean the very
bytes that the digest was taken over. An entry that is damaged, or is another folder's, counts as
none. Host only: no jax.
"""

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from jslora.adapters.files import Identity
from jslora.adapters.peft import Outline
from jslora.adapters.private import private_folder, write_whole
from jslora.model.config import MODULES, ModelConfig

SETTLED_SECONDS = 2.0
"""Age from which a change would show: no common file system's clock is coarser."""

MAX_ENTRIES = 2**16
_MAX_BYTES = 2**20
_HASH = 64  # characters of a sha256

log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    """`rank` and `scale` are those of an `Outline`, row after row."""

    folder: str
    storage: str
    files: tuple[Identity, Identity]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    error: float
    rank: list[int]
    scale: list[float]
    base_model: str | None
    bytes: int
    warnings: tuple[str, ...]


class Known(NamedTuple):
    """What a folder held: its contents' digest, and what storing them changed (`Version.error`)."""

    digest: str
    outline: Outline
    error: float


class KnownFolders:
    """Entries in a private folder of their own, one file for each source folder."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._folder = private_folder(folder)
        self._shape = (model.layers, len(MODULES))
        self._forget_oldest()

    def get(self, source: Path, storage: str) -> Known | None:
        """What was known of a folder when it was last read whole and stored so."""
        try:
            with open(self._path(source, storage), "rb") as file:
                data = file.read(_MAX_BYTES)
        except OSError:
            return None
        found = self._decode(data)
        if found is None or (found.folder, found.storage) != (str(source), storage):
            log.warning("a damaged entry of the adapter cache is dropped")
            self.forget(source, storage)
            return None
        rank = np.array(found.rank, np.int32).reshape(self._shape)
        scale = np.array(found.scale, np.float32).reshape(self._shape)
        rank.flags.writeable = scale.flags.writeable = False
        outline = Outline(rank, scale, found.base_model, found.bytes, found.warnings, found.files)
        return Known(found.digest, outline, found.error)

    def put(self, source: Path, storage: str, known: Known, read_at: float) -> None:
        """Remember a folder, unless its files had just been changed at `read_at`, a `time.time`."""
        outline = known.outline
        assert outline.files is not None, "an outline without files"
        changed = max(max(file.mtime_ns, file.ctime_ns) for file in outline.files)
        if changed > (read_at - SETTLED_SECONDS) * 1e9:
            return
        entry = _Entry(
            folder=str(source),
            storage=storage,
            files=outline.files,
            digest=known.digest,
            error=known.error,
            rank=outline.rank.ravel().tolist(),
            scale=outline.scale.ravel().tolist(),
            base_model=outline.base_model,
            bytes=outline.bytes,
            warnings=outline.warnings,
        )
        text = msgspec.json.encode(entry)
        try:
            write_whole(
                self._path(source, storage), [hashlib.sha256(text).hexdigest().encode(), text]
            )
        except OSError as error:
            log.warning("the adapter cache cannot be written: %s", error.strerror)

    def forget(self, source: Path, storage: str) -> None:
        with contextlib.suppress(OSError):
            self._path(source, storage).unlink()

    def _path(self, source: Path, storage: str) -> Path:
        key = hashlib.sha256(storage.encode() + b":" + os.fsencode(source)).hexdigest()
        return self._folder / f"{key}.json"

    def _decode(self, data: bytes) -> _Entry | None:
        check, text = data[:_HASH], data[_HASH:]
        if hashlib.sha256(text).hexdigest().encode() != check:
            return None
        try:
            entry = msgspec.json.decode(text, type=_Entry)
        except msgspec.DecodeError:
            return None
        size = self._shape[0] * self._shape[1]
        return entry if len(entry.rank) == len(entry.scale) == size else None

    def _forget_oldest(self) -> None:
        """Keep the entries of folders that are gone from piling up."""
        entries = list(self._folder.glob("*.json"))
        if len(entries) <= MAX_ENTRIES:
            return
        times = {}
        for path in entries:
            with contextlib.suppress(OSError):
                times[path] = path.stat().st_mtime
        for path in sorted(times, key=times.__getitem__)[: len(times) - MAX_ENTRIES // 2]:
            path.unlink(missing_ok=True)
