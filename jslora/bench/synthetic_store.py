"""The adapter store of a simulation: the real one, over adapters that have ranks but no numbers.

Names, registrations, versions, layouts, the host tier and its jobs are the server's own. Only what
would touch a file is exchanged: folders are names, blobs are broadcast zeros that take no memory,
and the thread that fetches a blob does so on a virtual clock. Every adapter counts as packed
before, so its version is known from its registration on. Host only: no jax.
"""

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float

from jslora.adapters.cache import PackedCache
from jslora.adapters.folders import Roots
from jslora.adapters.jobs import Jobs
from jslora.adapters.layout import Layout
from jslora.adapters.peft import Limits, Outline
from jslora.adapters.reader import Outlined, Reader
from jslora.adapters.store import AdapterStore
from jslora.bench.virtual import Link, Timeline, Worker
from jslora.model.config import MODULES, ModelConfig

BASE = "base"
"""The base model's name."""

DTYPE = np.dtype(ml_dtypes.bfloat16)

Ranks = tuple[int, ...]
"""The rank of an adapter in each of `MODULES`, in every layer; 0: no target."""

_ROOT = Path("/adapters")
_MAX_RANK = 512


@dataclass(frozen=True, slots=True)
class HostTier:
    """Adapters that do not fit in `bytes` of host memory come from a disk: seconds, bytes/s."""

    bytes: int
    latency: float
    bandwidth: float


class SyntheticStore(AdapterStore):
    """A store of adapters given by their ranks.

    Args:
        page_elements: numbers in a page of one layer.
        most_pages: that one may take.
        host: None keeps all of them in host memory from the start.

    Raises:
        AdapterRejected: one is too large for the pool or the host tier, or its name cannot be used.
    """

    def __init__(
        self, adapters: Mapping[str, Ranks], model: ModelConfig, page_elements: int,
        most_pages: int, timeline: Timeline, host: HostTier | None = None,
    ) -> None:  # fmt: skip
        limits = Limits(max_rank=_MAX_RANK, max_pages=most_pages)
        cache = _Blobs((model.layers, page_elements))
        size = host.bytes if host else 2**63 - 1
        super().__init__((), model, page_elements, DTYPE, limits, size, BASE, cache)
        self._reader = _Ranks(adapters, model, page_elements, limits, size, cache)
        self._roots = _Names()
        link = Link(timeline, host.bandwidth, host.latency) if host else Link(timeline, np.inf)
        self._jobs = _VirtualJobs(Worker(timeline, link, self._size))
        if host:
            for name in adapters:
                self.register(name)
        else:
            loaded = [self.load(name) for name in adapters]
            timeline.advance(timeline.now)
            for load in loaded:
                load.result()

    def _size(self, key: Hashable) -> float:
        """Bytes of the blob of a digest; a load, at the start, takes no time."""
        held = self._contents.get(key) if isinstance(key, str) else None
        return held.version.packed_bytes if held else 0.0


class _VirtualJobs(Jobs):
    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._short = self._long = worker


class _Names(Roots):
    """Every name is a folder."""

    def __init__(self) -> None:
        super().__init__(())

    def locate(self, path: str) -> tuple[Path, Path]:
        return _ROOT / path, _ROOT


class _Ranks(Reader):
    """What would be read of a folder, from its adapter's ranks."""

    def __init__(
        self, adapters: Mapping[str, Ranks], model: ModelConfig, page_elements: int,
        limits: Limits, host_bytes: int, cache: PackedCache,
    ) -> None:  # fmt: skip
        super().__init__(model, page_elements, DTYPE, limits, host_bytes, cache)
        self._adapters = adapters
        self._layouts: dict[Ranks, tuple[Outline, Layout]] = {}  # a few kinds, of many adapters

    def remembered(self, folder: Path, storage: str) -> Outlined:
        """All of it but the blob.

        Raises:
            AdapterRejected: it is larger than the pool or the host tier.
        """
        ranks = self._adapters[folder.name]
        if ranks not in self._layouts:
            self._layouts[ranks] = self._outlined(ranks)
        outline, layout = self._layouts[ranks]
        digest = hashlib.sha256(folder.name.encode()).hexdigest()
        return Outlined(outline, layout, self._version(digest, layout, 0.0))

    def _outlined(self, ranks: Ranks) -> tuple[Outline, Layout]:
        assert len(ranks) == len(MODULES), f"{len(ranks)} ranks for {len(MODULES)} modules"
        model = self._model
        rank = np.tile(np.array(ranks, np.int32), (model.layers, 1))
        scale = np.where(rank > 0, np.float32(1), np.float32(0))
        outline = Outline(rank, scale, None, 0, (), None)
        layout = self._lay_out(outline, "full")
        return replace(outline, bytes=self._packed_bytes(layout)), layout


class _Blobs(PackedCache):
    """A disk that has everything; what reading takes, a `Worker` waits."""

    def __init__(self, layer: tuple[int, int]) -> None:
        self._layer = layer

    def size(self, digest: str) -> int:
        return 0

    def load(self, digest: str, n_pages: int) -> Float[np.ndarray, "1 L n E"]:
        layers, numbers = self._layer
        return np.broadcast_to(np.zeros((), DTYPE), (1, layers, n_pages, numbers))
