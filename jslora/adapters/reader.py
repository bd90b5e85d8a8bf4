"""From a folder to an adapter's contents, by the shortest way: remembered, outlined, or read whole.

Knows no names and keeps nothing but what the cache keeps. Host only: no jax.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jslora.adapters.cache import PackedCache
from jslora.adapters.files import identities
from jslora.adapters.hosts import ALONE, Hosts
from jslora.adapters.known import Known
from jslora.adapters.layout import Layout, lay_out, pack
from jslora.adapters.peft import CONFIG, WEIGHTS, Limits, Outline, read_adapter, read_outline
from jslora.adapters.version import Version, stored_digest
from jslora.errors import AdapterRejected
from jslora.model.config import ModelConfig
from jslora.split import ONE_DEVICE, Split


@dataclass(frozen=True, slots=True)
class Outlined:
    """What is known of a folder without its numbers; `version` only if it was once read whole."""

    outline: Outline
    layout: Layout
    version: Version | None


@dataclass(frozen=True, slots=True)
class Whole:
    """A folder's contents; `seconds` by stage of having them."""

    outline: Outline
    layout: Layout
    version: Version
    blob: Float[np.ndarray, "d L n E"]
    seconds: dict[str, float]


class Reader:
    """Reads folders for one model and pool; every method may be called from any thread.

    Args:
        model: the whole one; adapters are read and checked whole on every host.
        page_elements: numbers in a page of one layer on one device.
        split, devices: how the model is split, and whose parts are packed; by default all.
        hosts: the others, which must have the same contents as this one.
    """

    def __init__(
        self, model: ModelConfig, page_elements: int, dtype: np.dtype, limits: Limits,
        host_cache_bytes: int, cache: PackedCache, split: Split = ONE_DEVICE,
        devices: range | None = None, hosts: Hosts = ALONE,
    ) -> None:  # fmt: skip
        self._model, self._page_elements, self._split = model, page_elements, split
        self._devices = range(split.devices) if devices is None else devices
        self._dtype = np.dtype(dtype)
        self._limits, self._host_cache_bytes = limits, host_cache_bytes
        self._cache = cache
        self.hosts = hosts

    def remembered(self, folder: Path, storage: str) -> Outlined | None:
        """What was read of these very files before, if it would still be served."""
        found = self._cache.known.get(folder, storage)
        if found is None:
            return None
        outline = found.outline
        if outline.files is None or identities(folder, (CONFIG, WEIGHTS)) != outline.files:
            return None
        limits = self._limits
        if outline.files[1].size > limits.max_file_bytes or outline.rank.max() > limits.max_rank:
            return None
        layout = self._lay_out(outline, storage)
        return Outlined(outline, layout, self._version(found.digest, layout, found.error))

    def outline(self, folder: Path, root: Path, storage: str) -> Outlined:
        """All that can be known without reading tensors.

        Raises:
            AdapterRejected: see `read_outline`; or it is larger than the pool or the host tier.
        """
        outline = read_outline(folder, self._model, self._limits, root)
        return Outlined(outline, self._lay_out(outline, storage), None)

    def whole(self, folder: Path, root: Path, storage: str) -> Whole:
        """Read, check and pack a folder; and put what it holds in the cache.

        Args:
            storage: one of `pieces.STORAGES`.

        Raises:
            AdapterRejected: see `read_adapter`; or it is larger than the pool or the host tier; or
                another host has other contents there.
        """
        began, clock = time.time(), _Clock()
        agree = self.hosts.ask(folder, root, storage)
        adapter = read_adapter(folder, self._model, self._limits, root)
        clock.lap("read")
        outline = adapter.outline(self._model)
        layout = self._lay_out(outline, storage)
        packed = pack(
            adapter, self._model, self._page_elements, self._dtype, self._split, self._devices,
            storage,
        )  # fmt: skip
        clock.lap("pack")
        version = self._version(adapter.digest, layout, packed.error)
        self._cache.store(version.digest, packed.blob)
        self._cache.known.put(folder, storage, Known(adapter.digest, outline, packed.error), began)
        clock.lap("store")
        agree(version.digest)
        return Whole(outline, layout, version, packed.blob, clock.seconds)

    def _lay_out(self, outline: Outline, storage: str) -> Layout:
        """Where its numbers go, if they fit."""
        layout = lay_out(
            outline.rank, outline.scale, self._model, self._page_elements, self._split, storage,
            8 * self._dtype.itemsize,
        )  # fmt: skip
        most = self._limits.max_pages
        if most is not None and layout.n_pages > most:
            raise AdapterRejected(f"the adapter takes {layout.n_pages} pages; the pool has {most}")
        needed, most = self._packed_bytes(layout), self._host_cache_bytes
        if needed > most:
            raise AdapterRejected(
                f"the adapter takes {needed} bytes of host memory; "
                f"adapters.host_cache_bytes is {most}"
            )
        return layout

    def _version(self, digest: str, layout: Layout, error: float) -> Version:
        return Version(
            digest=stored_digest(digest, layout.storage),
            a_offset=layout.a_offset,
            b_offset=layout.b_offset,
            rank=layout.rank,
            scale=layout.scale,
            n_pages=layout.n_pages,
            packed_bytes=self._packed_bytes(layout),
            storage=layout.storage,
            error=error,
        )

    def _packed_bytes(self, layout: Layout) -> int:
        pages = len(self._devices) * self._model.layers * layout.n_pages
        return pages * self._page_elements * self._dtype.itemsize


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def lap(self, stage: str) -> None:
        before, self._at = self._at, time.monotonic()
        self.seconds[stage] = self._at - before
