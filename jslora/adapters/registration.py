"""One name bound to one folder's contents, from its registration until nothing holds it.

Host only: no jax.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jslora.adapters.layout import Layout
from jslora.adapters.peft import Outline
from jslora.adapters.version import Version
from jslora.model.config import MODULES
from jslora.request import AdapterInfo


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where an adapter was found, links resolved, what its files said of it; how it is stored."""

    folder: Path
    root: Path
    outline: Outline
    storage: str = "full"


@dataclass(slots=True, eq=False)
class Registration:
    """A name's hold on one adapter; changed by its store alone, under its lock.

    Attributes:
        info: what is known of it for good; where it is now, the store tells.
        n_pages: pages it takes on the device; the same ids in every layer.
        version: None until the tensors were read whole; set once.
        named: whether new requests get it.
        uses: sequences bound to it.
        error: why its contents could not be had the last time; None once they could.
    """

    name: str
    info: AdapterInfo
    n_pages: int
    source: Source
    version: Version | None = None
    named: bool = True
    uses: int = 0
    error: str | None = None

    @property
    def held(self) -> bool:
        return self.named or self.uses > 0


def make_registration(
    name: str, source: Source, layout: Layout, version: Version | None, base_name: str
) -> Registration:
    """Bind `name` to what was read from `source`.

    Its report gains a warning if the adapter was trained for a base whose name, without the
    organisation, is not `base_name`.
    """
    outline = source.outline
    warnings = outline.warnings
    if outline.base_model and _leaf(outline.base_model) != _leaf(base_name):
        warnings += (f"it was trained for {outline.base_model}; the base here is {base_name}",)
    info = AdapterInfo(
        name=name,
        digest=version.digest if version else "",
        state="registered",
        rank=int(outline.rank.max()),
        modules=_modules(outline),
        layers=int(outline.rank.any(axis=1).sum()),
        bytes=outline.bytes,
        pages=layout.n_pages,
        padding=layout.padding,
        storage=layout.storage,
        path=str(source.folder.relative_to(source.root)),
        base_model=outline.base_model,
        warnings=warnings,
    )
    return Registration(name, info, layout.n_pages, source, version)


def _modules(outline: Outline) -> dict[str, tuple[int, int, float]]:
    """Module → (lowest rank, highest rank, highest scale) over the layers it is targeted in."""
    found = {}
    for column in np.flatnonzero(outline.rank.any(axis=0)):
        layers = outline.rank[:, column] > 0
        ranks, scales = outline.rank[layers, column], outline.scale[layers, column]
        found[MODULES[column]] = (int(ranks.min()), int(ranks.max()), float(scales.max()))
    return found


def _leaf(name: str) -> str:
    """A model's name without its organisation or folder."""
    return name.rstrip("/").rpartition("/")[2].lower()
