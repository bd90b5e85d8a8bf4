"""What an adapter takes of one device's memory, by how it is split. Host only: no jax."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jslora.adapters.layout import lay_out
from jslora.aot.cases import MODELS
from jslora.model.config import MODULES, from_hf
from jslora.split import Split

MODEL, RANK, PAGE_SIZE, BYTES = "llama3-8b", 16, 16, 2
DEVICES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class AdapterBytes:
    """An adapter of `RANK` in all modules of `MODEL`, in whole pages of bfloat16.

    Attributes:
        bytes: on each of the devices.
        share: of what one device alone would hold.
    """

    split: Split
    pages: int
    bytes: int
    share: float


def measure() -> list[AdapterBytes]:
    """By mode, then by number of devices."""
    whole = _measure(Split())[1]
    found = []
    for fully in (False, True):
        for devices in DEVICES:
            split = Split(devices, fully)
            pages, size = _measure(split)
            found.append(AdapterBytes(split, pages, size, size / whole))
    return found


def _measure(split: Split) -> tuple[int, int]:
    """Pages that it takes on a device, and bytes."""
    model = from_hf(MODELS[MODEL])
    page = split.page_numbers(model, PAGE_SIZE)
    rank = np.full((model.layers, len(MODULES)), RANK, np.int32)
    layout = lay_out(rank, np.ones(rank.shape, np.float32), model, page, split)
    return layout.n_pages, layout.n_pages * page * model.layers * BYTES


def broken(found: Sequence[AdapterBytes]) -> list[str]:
    """Fully sharded each of n devices holds 1/n, otherwise no more than one device alone would."""
    lines = []
    for one in found:
        allowed = 1 / one.split.devices if one.split.fully else 1.0
        if one.share > allowed:
            lines.append(
                f"adapter bytes: {one.share:.3f} of one device's on each of {one.split.devices}"
                f"{', fully sharded' * one.split.fully}; allowed is {allowed:.3f}"
            )
    return lines
