"""Stores over a temporary root, and ways to wait for what they do off-thread."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from adapter_folders import CONFIG, MODEL, tensors, write

from jslora.adapters.cache import PackedCache
from jslora.adapters.peft import Limits
from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version

PAGE = 512
F32 = np.dtype(np.float32)
BLOB = 3 * PAGE * 4  # bytes of an adapter of `CONFIG`: three layers of one page


class Stores:
    """Makes stores over `root` with a common cache, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir(exist_ok=True)
        self.cache_folder = folder / "cache"
        self.made: list[AdapterStore] = []

    def cache(self, limit_bytes: int = 2**30) -> PackedCache:
        return PackedCache(self.cache_folder, MODEL, PAGE, F32, limit_bytes)

    def __call__(self, *roots: Path, **changes: Any) -> AdapterStore:
        arguments = {
            "limits": Limits(),
            "host_cache_bytes": 64 * BLOB,
            "base_name": "base",
            "cache": changes.get("cache") or self.cache(),
            **changes,
        }
        store = AdapterStore(roots or (self.root,), MODEL, PAGE, F32, **arguments)
        self.made.append(store)
        return store

    def close(self) -> None:
        for store in self.made:
            store.close()


def make_folder(root: Path, label: str, seed: int = 0, **config: Any) -> Path:
    """A folder of `CONFIG`, with changes, whose numbers depend on `seed`."""
    return write(root / label, {**CONFIG, **config}, tensors(seed=seed))


def poll[T](ask: Callable[[], T | None]) -> T:
    """Ask until there is an answer."""
    end = time.monotonic() + 60
    while (answer := ask()) is None:
        assert time.monotonic() < end, "nothing came within a minute"
        time.sleep(0.0005)
    return answer


def version_of(store: AdapterStore, registration: Registration) -> Version:
    return poll(lambda: store.resolve(registration))


def blob_of(store: AdapterStore, registration: Registration) -> np.ndarray:
    """Its packed numbers, however long it takes to have them."""
    version = version_of(store, registration)
    return poll(lambda: store.blob(version))


def states(store: AdapterStore) -> list[tuple[str, str]]:
    return [(info.name, info.state) for info in store.infos()]
