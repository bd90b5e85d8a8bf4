"""What is kept of a registered adapter's contents whatever tier its numbers are in. Host only."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from jslora.adapters.layout import PackedAdapter
from jslora.adapters.peft import Adapter
from jslora.model.config import MODULES
from jslora.request import AdapterInfo


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One adapter's contents; two with the same digest are equal.

    Attributes:
        name: the name it was loaded under.
        path: its folder, links resolved.
        place: the same, below its root.
        a_offset, b_offset, rank, scale: see `PackedAdapter`.
        modules: module -> (lowest rank, highest rank, highest scale) over the layers.
        layers: number of layers it targets.
        n_pages: pages it takes on the device; the same ids in every layer.
        padding: share of those pages' numbers that hold no weight.
        bytes: size of its tensors as saved.
        packed_bytes: size of its blob in host memory.
    """

    digest: str
    name: str
    path: Path
    place: str
    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    modules: dict[str, tuple[int, int, float]]
    layers: int
    n_pages: int
    padding: float
    bytes: int
    packed_bytes: int
    base_model: str | None
    warnings: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def make_version(
    name: str, path: Path, root: Path, adapter: Adapter, packed: PackedAdapter, base_name: str
) -> Version:
    """The version of an adapter that was read from `path`, below `root`, and packed.

    It gains a warning if it was trained for a base whose name, without the organisation, is not
    `base_name`.
    """
    warnings = adapter.warnings
    if adapter.base_model and _leaf(adapter.base_model) != _leaf(base_name):
        warnings += (f"it was trained for {adapter.base_model}; the base here is {base_name}",)
    return Version(
        digest=adapter.digest,
        name=name,
        path=path,
        place=str(path.relative_to(root)),
        a_offset=packed.a_offset,
        b_offset=packed.b_offset,
        rank=packed.rank,
        scale=packed.scale,
        modules=_modules(packed),
        layers=int((packed.rank > 0).any(axis=1).sum()),
        n_pages=packed.n_pages,
        padding=packed.padding,
        bytes=adapter.bytes,
        packed_bytes=packed.blob.nbytes,
        base_model=adapter.base_model,
        warnings=warnings,
    )


def describe(name: str, version: Version, state: str) -> AdapterInfo:
    """The bind report of a version registered under `name`."""
    return AdapterInfo(
        name=name,
        digest=version.digest,
        state=state,
        rank=max(highest for _, highest, _ in version.modules.values()),
        modules=version.modules,
        layers=version.layers,
        bytes=version.bytes,
        pages=version.n_pages,
        padding=version.padding,
        path=version.place,
        base_model=version.base_model,
        warnings=version.warnings,
    )


def _modules(packed: PackedAdapter) -> dict[str, tuple[int, int, float]]:
    found = {}
    for column, module in enumerate(MODULES):
        layers = packed.rank[:, column] > 0
        if layers.any():
            ranks, scales = packed.rank[layers, column], packed.scale[layers, column]
            found[module] = (int(ranks.min()), int(ranks.max()), float(scales.max()))
    return found


def _leaf(name: str) -> str:
    """A model's name without its organisation or folder."""
    return name.rstrip("/").rpartition("/")[2].lower()
