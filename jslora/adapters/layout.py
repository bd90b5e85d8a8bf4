"""An adapter's numbers in pages: one blob a layer, at true rank, nothing padded to a maximum.

For each group of modules that read the same input come all A rows, then all B rows, B transposed so
that both are one row per rank. A factor starts on a boundary of its own piece, the largest width
that divides both its row and the page, so that no piece straddles two pages. One page id serves all
layers: an adapter takes the pages of its largest layer. Where factors lie follows from the ranks
alone, so it is known before a tensor was read. B is stored as it is, bit for bit where the
dtypes agree; the scale stays a float32 beside it.

Where a model is split over devices (`jslora.split`), each has a blob of its own part, and all blobs
of an adapter are laid out alike: a share of the ranks that is not full ends in rows of zeros.
Host only: no jax.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32

from jslora.adapters.peft import Adapter, Factors
from jslora.adapters.tensors import all_finite
from jslora.errors import AdapterRejected
from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.split import ONE_DEVICE, Split

LAYOUT = 2
"""Number of the rules below and of those by which folders are read; to be raised with either."""

POOL_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))

_COLUMN = {module: column for column, module in enumerate(MODULES)}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where an adapter's factors lie; arrays are read-only, columns are in `MODULES` order.

    Attributes:
        a_offset, b_offset: first number of a factor in its layer's blob; 0 where `rank` is 0.
        rank: rows of A on one device; 0 where a module is not targeted.
        scale: what the low-rank product is multiplied by.
        padding: share of the pages' numbers that are no weights, on average over the devices.
    """

    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    n_pages: int
    padding: float


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter as pools hold it: `blob`, in their dtype, and what a `Layout` says.

    The blob's first axis is devices.
    """

    digest: str
    blob: Float[np.ndarray, "devices L n E"]
    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    padding: float

    @property
    def n_pages(self) -> int:
        return self.blob.shape[2]


def layout_key(
    model: ModelConfig, page_elements: int, dtype: np.dtype, split: Split, devices: range
) -> str:
    """A name for all that a blob depends on beside its adapter."""
    widths = [model.widths(module) for module in MODULES]
    shares = [split.devices, split.fully, devices.start, devices.stop]
    facts = [LAYOUT, model.layers, widths, page_elements, np.dtype(dtype).name, shares]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie in pages of `page` numbers."""
    return math.gcd(row, page)


def lay_out(
    rank: Int32[np.ndarray, "L 7"],
    scale: Float32[np.ndarray, "L 7"],
    model: ModelConfig,
    page_elements: int,
    split: Split = ONE_DEVICE,
) -> Layout:
    """Place an adapter of these ranks in one device's pages of `page_elements` numbers.

    Args:
        rank, scale: as the adapter has them; `scale` is kept.
    """
    a_offset, b_offset = np.zeros_like(rank), np.zeros_like(rank)
    rows = [split.rows(model, module) for module in MODULES]
    peers = np.array([split.peers(module) for module in MODULES], np.int32)
    own = -(-rank // peers)
    placed: dict[bytes, tuple[list[int], list[int], int]] = {}  # most layers are alike
    for layer, ranks in enumerate(own):
        like = ranks.tobytes()
        if like not in placed:
            counts = list(zip(ranks.tolist(), (peers * ranks).tolist(), strict=True))
            placed[like] = _place(rows, page_elements, counts)
        a_offset[layer], b_offset[layer], _ = placed[like]
    longest = max(end for _, _, end in placed.values())
    assert 0 < longest < 2**31, f"a layer's blob of {longest} numbers"
    n_pages = -(-longest // page_elements)
    in_, out = np.array(rows, np.int64).T
    used = rank.sum(axis=0, dtype=np.int64) @ (in_ / peers + out)
    for array in (a_offset, b_offset, own):
        array.flags.writeable = False
    padding = 1 - float(used) / (model.layers * n_pages * page_elements)
    return Layout(a_offset, b_offset, own, scale, n_pages, padding)


def empty_blob(shape: tuple[int, int, int, int], dtype: np.dtype) -> Float[np.ndarray, "d L n E"]:
    """Zeros on a page boundary, where XLA:CPU takes them as they are; given back once unused."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def pack(
    adapter: Adapter, model: ModelConfig, page_elements: int, dtype: np.dtype,
    split: Split = ONE_DEVICE, devices: range | None = None,
) -> PackedAdapter:  # fmt: skip
    """Lay an adapter out in pages of `page_elements` numbers of the pool's `dtype`.

    Args:
        model: the whole one, as the adapter is.
        devices: those of `split` whose parts are wanted; by default all.

    Raises:
        AdapterRejected: a weight is too large for `dtype`.
    """
    assert dtype in POOL_DTYPES, f"a pool of {dtype}"
    outline = adapter.outline(model)
    layout = lay_out(outline.rank, outline.scale, model, page_elements, split)
    devices = range(split.devices) if devices is None else devices
    blob = empty_blob((len(devices), model.layers, layout.n_pages, page_elements), dtype)
    for device, own in zip(devices, blob, strict=True):
        for place, numbers, target in _parts(own, layout, adapter.factors, model, split, device):
            _copy(place, numbers, target)
    blob.flags.writeable = False
    return PackedAdapter(
        digest=adapter.digest,
        blob=blob,
        a_offset=layout.a_offset,
        b_offset=layout.b_offset,
        rank=layout.rank,
        scale=layout.scale,
        padding=layout.padding,
    )


def unpack(
    packed: PackedAdapter, model: ModelConfig, split: Split = ONE_DEVICE
) -> dict[tuple[int, str], Factors]:
    """The factors that `pack` laid out for all devices, in the pool's dtype.

    Their ranks are rounded up to what `split` holds.
    """
    factors = {}
    for layer, column in np.argwhere(packed.rank > 0).tolist():
        module = MODULES[column]
        rank = packed.rank[layer, column] * split.peers(module)
        wide_in, wide_out = model.widths(module)
        a, b = (np.zeros((rank, width), packed.blob.dtype) for width in (wide_in, wide_out))
        factors[layer, module] = Factors(a, b.T, packed.scale[layer, column])
    for device, own in enumerate(packed.blob):
        for place, numbers, _ in _parts(own, packed, factors, model, split, device):
            numbers[...] = place
    return factors


def _place(
    rows: list[tuple[int, int]], page: int, counts: list[tuple[int, int]]
) -> tuple[list[int], list[int], int]:
    """(offsets of A, offsets of B, end of the last factor) in one layer's blob.

    Args:
        rows, counts: length and number of each module's rows of A and of B.
    """
    offsets: tuple[list[int], list[int]] = ([0] * len(MODULES), [0] * len(MODULES))
    end = 0
    for group in GROUPS:
        for side in (0, 1):
            for module in group:
                column = _COLUMN[module]
                row, count = rows[column][side], counts[column][side]
                if count > 0:
                    width = piece_width(row, page)
                    offsets[side][column] = -(-end // width) * width
                    end = offsets[side][column] + count * row
    return *offsets, end


def _parts(
    blob: Float[np.ndarray, "L n E"], layout: Layout | PackedAdapter,
    factors: Mapping[tuple[int, str], Factors], model: ModelConfig, split: Split, device: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, str]]]:  # fmt: skip
    """(place in a device's blob, the numbers that belong there, whose they are) of all factors."""
    flat = blob.reshape(model.layers, -1)
    for (layer, module), (a, b) in ((key, (f.a, f.b.T)) for key, f in factors.items()):
        column = _COLUMN[module]
        parts = split.part(model, module, len(a), device)
        for rows, part, offset in zip(
            (a, b), parts, (layout.a_offset, layout.b_offset), strict=True
        ):
            numbers, first = rows[part], offset[layer, column]
            place = flat[layer, first : first + numbers.size].reshape(numbers.shape)
            yield place, numbers, (layer, module)


def _copy(place: np.ndarray, numbers: np.ndarray, target: tuple[int, str]) -> None:
    with np.errstate(over="ignore"):
        place[...] = numbers
    if numbers.dtype != place.dtype and not all_finite(place):
        layer, module = target
        raise AdapterRejected(
            f"a weight of layer {layer}'s {module} is too large for {place.dtype.name}"
        )
