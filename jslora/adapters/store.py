"""Adapter names → versions, and the packed numbers of as many versions as host memory may hold.

A version is a content digest. A name is registered only when its adapter was read, checked and
packed whole, and moves to a new version in one step; who holds the old `Version` keeps using it.
While a name is loading, nothing else may change it. Files are read and packed on loader threads.
Packed blobs lie in a cache keyed by digest, so names with equal contents share one, and the least
recently used leave when it is full; a blob that left is read again from its folder and must have
its digest still. Every method may be called from any thread. Host only: no jax.
"""

import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jslora.adapters.files import resolve_below
from jslora.adapters.layout import PackedAdapter, pack
from jslora.adapters.peft import CONFIG, Adapter, Limits, read_adapter
from jslora.adapters.version import Version, describe, make_version
from jslora.config import NAME
from jslora.errors import AdapterRejected, UnknownModel
from jslora.logs import printable
from jslora.model.config import ModelConfig
from jslora.request import AdapterInfo

MAX_FAILURES = 64  # failed loads that are remembered, so that `info` can tell of them
MAX_PATH = 4096

log = logging.getLogger(__name__)


class AdapterStore:
    """The adapters of one engine.

    Args:
        roots: folders that adapters are read from; nothing outside them opens.
        page_elements: numbers in a page of one layer.
        dtype: the pool's.
        host_cache_bytes: most bytes of packed blobs kept in host memory.
        base_name: the base model's name, which no adapter may have.
        workers: loader threads.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        model: ModelConfig,
        page_elements: int,
        dtype: np.dtype,
        limits: Limits,
        host_cache_bytes: int,
        base_name: str,
        workers: int = 1,
    ) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._model = model
        self._page_elements = page_elements
        self._dtype = np.dtype(dtype)
        self._limits = limits
        self._base_name = base_name
        self._threads = ThreadPoolExecutor(workers, "adapter-loader")
        self._lock = threading.Lock()
        # Below here everything is read and written under the lock.
        self._versions: dict[str, Version] = {}
        self._loading: set[str] = set()
        self._failures: OrderedDict[str, str] = OrderedDict()
        self._fetches: dict[str, Future[PackedAdapter]] = {}
        self._fetch_errors: dict[str, str] = {}
        self._host = _HostCache(host_cache_bytes)

    def discover(self) -> dict[str, Path]:
        """Name → folder of every adapter directly below a root, by name; earlier roots win."""
        found: dict[str, Path] = {}
        for name, folder in self._candidates():
            if name == self._base_name or not re.fullmatch(NAME, name):
                log.warning("adapter folder %s is skipped: not a usable name", printable(name))
            elif name in found:
                log.warning("adapter %s is skipped in a later root: the name is taken", name)
            else:
                found[name] = folder
        return dict(sorted(found.items()))

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        for root in self._roots:
            try:
                names = sorted(os.listdir(root))
            except OSError as error:
                log.warning("adapter root %s cannot be listed: %s", root, error.strerror)
                continue
            for name in names:
                folder = resolve_below(root, root / name)
                if folder and os.path.isfile(folder / CONFIG) and not name.startswith("."):
                    yield name, folder

    # Loading -------------------------------------------------------------------------------------

    def load(self, name: str, path: str | None = None, replace: bool = False) -> "Future[Version]":
        """Read an adapter and register it under `name`.

        Args:
            path: folder below the roots, relative to them in order or absolute; by default `name`.
            replace: let `name` be registered already, and move it to the new version.

        The future fails with AdapterRejected if the name cannot be used, is registered (and not to
        be replaced) or is being loaded, if the folder is not below a root, or if the adapter is
        refused; nothing is registered then.
        """
        with self._lock:
            problem = self._name_problem(name, replace)
            if problem is None:
                self._loading.add(name)
                return self._threads.submit(self._load, name, path)
        refused: Future[Version] = Future()
        refused.set_exception(AdapterRejected(problem, param="name"))
        return refused

    def _name_problem(self, name: str, replace: bool) -> str | None:
        if not re.fullmatch(NAME, name):
            return f"{printable(name)!r} is not an adapter name; expected is {NAME}"
        if name == self._base_name:
            return f"{name!r} is the base model's name"
        if name in self._loading:
            return f"adapter {name!r} is being loaded"
        if name in self._versions and not replace:
            return f"adapter {name!r} is registered already"
        return None

    def _load(self, name: str, path: str | None) -> Version:
        try:
            folder, root = self._locate(name if path is None else path)
            adapter = read_adapter(folder, self._model, self._limits, root)
            packed = self._pack(adapter)
            version = make_version(name, folder, root, adapter, packed, self._base_name)
        except BaseException as error:
            with self._lock:
                self._loading.discard(name)
                self._remember_failure(name, error)
            raise
        with self._lock:
            self._loading.discard(name)
            self._failures.pop(name, None)
            before = self._versions.get(name)
            self._versions[name] = version
            self._host.put(packed)
            self._leave_first(before)
        return version

    def _remember_failure(self, name: str, error: BaseException) -> None:
        if name not in self._versions:
            self._failures[name] = _public(error)
            if len(self._failures) > MAX_FAILURES:
                self._failures.popitem(last=False)

    def _locate(self, path: str) -> tuple[Path, Path]:
        """(folder, its root); one error for what is absent and what is forbidden."""
        found = None
        if 0 < len(path) <= MAX_PATH and path.isprintable() and ".." not in Path(path).parts:
            found = self._below_roots(path)
        if found is None:
            raise AdapterRejected(
                f"{printable(path)!r} is no adapter folder below the adapter roots", param="path"
            )
        return found

    def _below_roots(self, path: str | Path) -> tuple[Path, Path] | None:
        for root in self._roots:
            folder = resolve_below(root, root / path)
            if folder is not None and os.path.isfile(folder / CONFIG):
                return folder, root
        return None

    def _pack(self, adapter: Adapter) -> PackedAdapter:
        packed = pack(adapter, self._model, self._page_elements, self._dtype)
        most = self._limits.max_pages
        if most is not None and packed.n_pages > most:
            raise AdapterRejected(f"the adapter takes {packed.n_pages} pages; the pool has {most}")
        if packed.blob.nbytes > self._host.limit:
            raise AdapterRejected(
                f"the adapter takes {packed.blob.nbytes} bytes of host memory; "
                f"adapters.host_cache_bytes is {self._host.limit}"
            )
        return packed

    # Names ---------------------------------------------------------------------------------------

    def get(self, name: str) -> Version | None:
        """The version registered under `name` now."""
        with self._lock:
            return self._versions.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._versions)

    def unload(self, name: str) -> Version:
        """Take `name` out of the registry and return the version it had.

        Raises:
            UnknownModel: it is not registered.
            AdapterRejected: it is being loaded.
        """
        with self._lock:
            if name in self._loading:
                raise AdapterRejected(f"adapter {name!r} is being loaded", param="name")
            if name not in self._versions:
                raise UnknownModel(f"no adapter {printable(name)!r} is registered", param="name")
            version = self._versions.pop(name)
            self._leave_first(version)
            return version

    def info(self) -> list[AdapterInfo]:
        """What is registered, loading and failed, by name.

        `state` is "host" where the blob is in memory, "registered" where it is on disk only,
        "loading" or "failed"; what is on the device only the engine knows.
        """
        with self._lock:
            registered = [
                (name, version, "host" if version.digest in self._host else "registered")
                for name, version in self._versions.items()
            ]
            loading = self._loading - self._versions.keys()
            failures = dict(self._failures)
        found = {
            name: AdapterInfo(name=name, digest="", state="failed", rank=0, error=error)
            for name, error in failures.items()
        }
        for name in loading:
            found[name] = AdapterInfo(name=name, digest="", state="loading", rank=0)
        for name, version, state in registered:
            found[name] = describe(name, version, state)
        return [found[name] for name in sorted(found)]

    # Packed blobs --------------------------------------------------------------------------------

    def packed(self, version: Version) -> PackedAdapter | None:
        """The blob if it is in host memory; otherwise None, and it is being read again.

        Raises:
            AdapterRejected: the last read failed; the next call starts another.
        """
        with self._lock:
            packed = self._host.get(version.digest)
            error = self._fetch_errors.pop(version.digest, None)
        if packed is None and error is not None:
            raise AdapterRejected(error)
        if packed is None:
            self.fetch(version)
        return packed

    def fetch(self, version: Version) -> "Future[PackedAdapter]":
        """The blob from host memory, or read again from its folder; one read serves all who wait.

        The future fails with AdapterRejected if the folder no longer holds the version's contents.
        """
        with self._lock:
            packed = self._host.get(version.digest)
            if packed is not None:
                ready: Future[PackedAdapter] = Future()
                ready.set_result(packed)
                return ready
            if version.digest not in self._fetches:
                self._fetch_errors.pop(version.digest, None)
                self._fetches[version.digest] = self._threads.submit(self._fetch, version)
            return self._fetches[version.digest]

    def _fetch(self, version: Version) -> PackedAdapter:
        try:
            packed = self._read_again(version)
        except BaseException as error:
            with self._lock:
                del self._fetches[version.digest]
                self._fetch_errors[version.digest] = _public(error)
            raise
        with self._lock:
            del self._fetches[version.digest]
            self._host.put(packed)
        return packed

    def _read_again(self, version: Version) -> PackedAdapter:
        changed = AdapterRejected(f"adapter {version.name!r} changed on disk; load it again")
        found = self._below_roots(version.path)
        if found is None:
            raise changed
        adapter = read_adapter(found[0], self._model, self._limits, found[1])
        if adapter.digest != version.digest:
            raise changed
        return self._pack(adapter)

    def _leave_first(self, version: Version | None) -> None:
        """Let a version's blob be the first to leave unless a name still has it."""
        if version is not None and version not in self._versions.values():
            self._host.age(version.digest)

    def close(self) -> None:
        """Cancel what has not begun and wait for what has."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class _HostCache:
    """Blobs by digest, least recently used first; never more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._blobs: OrderedDict[str, PackedAdapter] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._blobs

    def get(self, digest: str) -> PackedAdapter | None:
        if digest in self._blobs:
            self._blobs.move_to_end(digest)
        return self._blobs.get(digest)

    def put(self, packed: PackedAdapter) -> None:
        assert packed.blob.nbytes <= self.limit, f"{packed.blob.nbytes} of {self.limit} bytes"
        if self.get(packed.digest) is not None:
            return
        self._blobs[packed.digest] = packed
        self.bytes += packed.blob.nbytes
        while self.bytes > self.limit:
            _, oldest = self._blobs.popitem(last=False)
            self.bytes -= oldest.blob.nbytes

    def age(self, digest: str) -> None:
        if digest in self._blobs:
            self._blobs.move_to_end(digest, last=False)


def _public(error: BaseException) -> str:
    """What may be told of an error: all of ours, of others that there was one."""
    return error.message if isinstance(error, AdapterRejected) else "internal error"
