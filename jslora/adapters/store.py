"""Adapter names → registrations: who gets which contents from when on.

A name is registered by its folder's metadata, or moved to other contents in one step; sequences
bound to the registration it had keep that one. While a name is being loaded nothing else may change
it. Every method may be called from any thread, and none but `register`, `discover` and `close`
touches a file or waits. Host only: no jax.
"""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from jslora.adapters.cache import PackedCache
from jslora.adapters.contents import Contents
from jslora.adapters.folders import Roots
from jslora.adapters.hosts import ALONE, Hosts
from jslora.adapters.jobs import Task, public
from jslora.adapters.layout import Layout
from jslora.adapters.peft import Limits
from jslora.adapters.reader import Reader, Whole
from jslora.adapters.registration import Registration, Source, make_registration
from jslora.adapters.version import Version
from jslora.config import NAME
from jslora.errors import AdapterRejected, JsloraError, Unavailable, UnknownModel
from jslora.logs import printable
from jslora.model.config import ModelConfig
from jslora.request import AdapterInfo
from jslora.split import ONE_DEVICE, Split

MAX_FAILURES = 64  # failed loads that are remembered, so that `infos` can tell of them


class AdapterStore(Contents):
    """The adapters of one engine.

    Args:
        roots: folders that adapters are read from; nothing outside them opens.
        page_elements: numbers in a page of one layer on one device.
        dtype: the pool's.
        host_cache_bytes: most bytes of packed blobs kept in host memory.
        base_name: the base model's name, which no adapter may have.
        cache: for the same model, pages, dtype and devices.
        split, devices: how the model is split, and whose parts are kept here; by default all.
        hosts: the others; nothing is kept that they do not have too.
        storage, storage_of: how weights are stored (`pieces.STORAGES`), and those of some names.
    """

    def __init__(
        self, roots: Sequence[Path], model: ModelConfig, page_elements: int, dtype: np.dtype,
        limits: Limits, host_cache_bytes: int, base_name: str, cache: PackedCache,
        split: Split = ONE_DEVICE, devices: range | None = None, hosts: Hosts = ALONE,
        storage: str = "full", storage_of: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        devices = range(split.devices) if devices is None else devices
        reader = Reader(
            model, page_elements, dtype, limits, host_cache_bytes, cache, split, devices, hosts
        )
        super().__init__(reader, cache, host_cache_bytes)
        numbers = len(devices) * model.layers * page_elements
        self._page_bytes = numbers * np.dtype(dtype).itemsize
        self._roots = Roots(roots)
        self._base_name = base_name
        self._storage, self._storage_of = storage, dict(storage_of or {})
        # Below here everything is written under the lock.
        self._named: dict[str, Registration] = {}
        self._draining: dict[Registration, None] = {}  # in use, and named no more
        self._loading: dict[str, Future[Registration]] = {}
        self._failed: OrderedDict[str, str] = OrderedDict()  # loads by name
        self._closed = False

    def discover(self) -> dict[str, Path]:
        """Name → folder of every adapter directly below a root, by name; earlier roots win."""
        return self._roots.discover(self._base_name)

    # Names ---------------------------------------------------------------------------------------

    def register(self, name: str, path: str | None = None) -> Registration:
        """Register an adapter by its metadata; its tensors are read when they are first needed.

        Args:
            path: folder below the roots, relative to them in order or absolute; by default `name`.

        Raises:
            AdapterRejected: the name cannot be used, is registered or is being loaded; the folder
                is not below a root; or the adapter is refused. Nothing is registered then.
        """
        done = self._claim(name, replacing=False)
        with self._loading_of(name, done):
            folder, root = self._roots.locate(name if path is None else path)
            storage = self._storage_for(name)
            found = self._reader.remembered(folder, storage)
            if found is None:
                found = self._reader.outline(folder, root, storage)
            source = Source(folder, root, found.outline, storage)
            self._enter(name, done, source, found.layout, found.version)
        return done.result()

    def load(
        self, name: str, path: str | None = None, replace: bool = False
    ) -> "Future[Registration]":
        """Read an adapter whole and register it under `name`.

        Args:
            path: as for `register`.
            replace: let `name` be registered already, and move it to the new contents.

        The future fails as `register` does, or if a tensor is refused; or with Unavailable if the
        store was closed first. Nothing is registered then, and `name` keeps what it had.
        """
        try:
            done = self._claim(name, replacing=replace)
        except JsloraError as error:
            refused: Future[Registration] = Future()
            refused.set_exception(error)
            return refused
        self._jobs.start(done, partial(self._load, name, path, done))
        return done

    def unload(self, name: str) -> Registration:
        """Let new requests have `name` no more; returns the registration it had.

        Raises:
            UnknownModel: it is not registered.
            AdapterRejected: it is being loaded.
        """
        with self._lock:
            if name in self._loading:
                raise AdapterRejected(f"adapter {name!r} is being loaded", param="name")
            registration = self._find(name)
            del self._named[name]
            self._failed.pop(name, None)
            self._leave(registration)
            return registration

    def fits_host(self, pages: int) -> bool:
        """Whether so many packed pages can be in host memory at once."""
        return pages * self._page_bytes <= self._host.limit

    def get(self, name: str) -> Registration | None:
        """What is registered under `name` now."""
        return self._named.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._named)

    def bind(self, name: str) -> Registration:
        """Hold what is registered under `name` for a sequence, until `release`.

        Raises:
            UnknownModel: nothing is.
        """
        with self._lock:
            registration = self._find(name)
            registration.uses += 1
            return registration

    def release(self, registration: Registration) -> None:
        """A sequence needs a registration no more."""
        with self._lock:
            assert registration.uses > 0, f"adapter {registration.name!r} is not in use"
            registration.uses -= 1
            if not registration.held:
                self._draining.pop(registration, None)
                self._let_go(registration)

    def _storage_for(self, name: str) -> str:
        """How an adapter of this name is stored."""
        return self._storage_of.get(name, self._storage)

    def _find(self, name: str) -> Registration:
        if name not in self._named:
            raise UnknownModel(f"no adapter {printable(name)!r} is registered", param="model")
        return self._named[name]

    def _leave(self, registration: Registration) -> None:
        """Its name is gone or another's."""
        registration.named = False
        if registration.held:
            self._draining[registration] = None
        else:
            self._let_go(registration)

    # Loading -------------------------------------------------------------------------------------

    def _claim(self, name: str, *, replacing: bool) -> "Future[Registration]":
        with self._lock:
            if self._closed:
                raise _closed()
            problem = self._name_problem(name, replacing)
            if problem is not None:
                raise AdapterRejected(problem, param="name")
            done = self._loading[name] = Future()
            done.set_running_or_notify_cancel()
            return done

    def _name_problem(self, name: str, replacing: bool) -> str | None:
        if not re.fullmatch(NAME, name):
            return f"{printable(name)!r} is not an adapter name; expected is {NAME}"
        if name == self._base_name:
            return f"{name!r} is the base model's name"
        if name in self._loading:
            return f"adapter {name!r} is being loaded"
        if name in self._named and not replacing:
            return f"adapter {name!r} is registered already"
        return None

    @contextlib.contextmanager
    def _loading_of(self, name: str, done: "Future[Registration]") -> Iterator[None]:
        """Tell of a load that fails inside."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                if self._loading.get(name) is not done:
                    return  # the store was closed, and told of it
                del self._loading[name]
                self._failures += 1
                self._failed[name] = public(error)
                if len(self._failed) > MAX_FAILURES:
                    self._failed.popitem(last=False)
            done.set_exception(error)

    def _load(self, name: str, path: str | None, done: "Future[Registration]") -> Task | None:
        """Enter what is at hand already; otherwise it is read whole, which may take long."""
        with self._loading_of(name, done):
            folder, root = self._roots.locate(name if path is None else path)
            found = self._at_hand(folder, root, self._storage_for(name))
            if found is None:
                return partial(self._load_whole, name, folder, root, done)
            self._enter_whole(name, done, folder, root, found)
        return None

    def _load_whole(
        self, name: str, folder: Path, root: Path, done: "Future[Registration]"
    ) -> None:
        with self._loading_of(name, done):
            whole = self._reader.whole(folder, root, self._storage_for(name))
            self._enter_whole(name, done, folder, root, whole)

    def _enter_whole(
        self, name: str, done: "Future[Registration]", folder: Path, root: Path, found: Whole
    ) -> None:
        source = Source(folder, root, found.outline, found.version.storage)
        self._enter(name, done, source, found.layout, found.version, found)

    def _enter(
        self, name: str, done: "Future[Registration]", source: Source, layout: Layout,
        version: Version | None, whole: Whole | None = None,
    ) -> None:  # fmt: skip
        """Register `name` in one step, in place of what it had."""
        registration = make_registration(name, source, layout, version, self._base_name)
        with self._lock:
            if self._loading.get(name) is not done:
                return  # the store was closed, and told of it
            del self._loading[name]
            self._failed.pop(name, None)
            before = self._named.get(name)
            self._named[name] = registration
            if version is not None:
                self._hold(registration, version)
            if whole is not None:
                self._keep(whole.version.digest, whole.blob, whole.seconds)
            if before is not None:
                self._leave(before)
        done.set_result(registration)

    # Reports -------------------------------------------------------------------------------------

    def registered(self) -> dict[str, AdapterInfo]:
        """What is known for good of every registered adapter; the same objects until it changes."""
        with self._lock:
            return {name: registration.info for name, registration in self._named.items()}

    def info(self, name: str) -> AdapterInfo:
        """Present state of what has `name` now; or had it last, is to have it, or failed to.

        Raises:
            UnknownModel: nothing of that name is known.
        """
        registration = self._named.get(name)
        if registration is not None:
            return self.describe(registration)
        found = [info for info in self.infos() if info.name == name]
        if not found:
            raise UnknownModel(f"no adapter {printable(name)!r} is registered", param="model")
        return found[-1]

    def infos(self) -> list[AdapterInfo]:
        """Present state of all that is registered, loading, draining and failed, by name.

        `state` is "host" where the blob is in memory, "registered" where it is not; what is on the
        device only the engine knows.
        """
        with self._lock:
            named, draining = dict(self._named), list(self._draining)
            loading, failed = set(self._loading), dict(self._failed)
        found = [self.describe(registration) for registration in (*draining, *named.values())]
        for name in loading - named.keys():
            found.append(AdapterInfo(name=name, digest="", state="loading", rank=0))
        for name in failed.keys() - named.keys() - loading:
            error = failed[name]
            found.append(AdapterInfo(name=name, digest="", state="failed", rank=0, error=error))
        return sorted(found, key=lambda info: info.name)

    def describe(self, registration: Registration) -> AdapterInfo:
        """Present state of one registration, named or not.

        Without the lock: thousands are asked for at a time, and each is true of its moment.
        """
        version, error = registration.version, registration.error
        contents = self._contents.get(version.digest) if version else None
        in_host = version is not None and version.digest in self._host
        if not registration.named:
            state = "draining"
        elif in_host:
            state = "host"
        elif self._jobs.runs(version.digest if version else registration):
            state = "loading"
        else:
            state = "failed" if error else "registered"
        return replace(
            registration.info,
            state=state,
            digest=version.digest if version else "",
            bytes_disk=self._cache.size(version.digest) if version else 0,
            bytes_host=version.packed_bytes if version and in_host else 0,
            output_error=version.error if version else None,
            in_flight=registration.uses,
            seconds=dict(contents.seconds) if contents else {},
            error=error or self._failed.get(registration.name),
        )

    def close(self) -> None:
        """Drop what has not begun, wait for what has, and tell who waits for a load."""
        with self._lock:
            self._closed = True
        self._jobs.close()
        with self._lock:
            waiting = list(self._loading.values())
            self._loading.clear()
        for done in waiting:
            done.set_exception(_closed())


def _closed() -> Unavailable:
    return Unavailable("adapters are loaded no more: the engine was closed")
