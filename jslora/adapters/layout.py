"""An adapter's numbers in pages: one blob a layer, at true rank, nothing padded to a maximum.

For each group of modules that read the same input come all A rows, then all B rows, B transposed so
that both are one row per rank. A factor starts on a boundary of its own piece, the largest width
that divides both its row and the page, so that no piece straddles two pages. One page id serves all
layers: an adapter takes the pages of its largest layer. Where factors lie follows from the ranks
and how they are stored alone, so it is known before a tensor was read. Stored in full, B is as it
is, bit for bit where the dtypes agree; the scale stays a float32 beside it. Stored as integers
(`quantize`), a factor's group scales come behind its rows.

Where a model is split over devices (`jslora.split`), each has a blob of its own part, and all blobs
of an adapter are laid out alike: a share of the ranks that is not full ends in rows of zeros.
Host only: no jax.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32

from jslora.adapters.peft import Adapter, Factors
from jslora.adapters.quantize import Changes, Quantized, from_words, quantize, to_words
from jslora.adapters.tensors import all_finite
from jslora.errors import AdapterRejected
from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.split import ONE_DEVICE, Split
from pallas_kernels.lora.pieces import (
    factor_end,
    first_scale,
    row_piece,
    row_words,
    scale_groups,
)

LAYOUT = 3
"""Number of the rules below and of those by which folders are read; to be raised with either."""

POOL_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))

_COLUMN = {module: column for column, module in enumerate(MODULES)}

Planes = tuple[np.ndarray, ...]
"""A factor as it is stored, its ranks along axis 0: its numbers; or its words, and its scales."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where an adapter's factors lie; arrays are read-only, columns are in `MODULES` order.

    Attributes:
        a_offset, b_offset: first word of a factor in its layer's blob; 0 where `rank` is 0.
        rank: rows of A on one device; 0 where a module is not targeted.
        scale: what the low-rank product is multiplied by.
        padding: share of the pages' words that hold nothing, on average over the devices.
        storage: one of `pieces.STORAGES`.
    """

    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    n_pages: int
    padding: float
    storage: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter as pools hold it: `blob`, in their dtype, and what a `Layout` says.

    The blob's first axis is devices. `error` is what rounding to integers changes, see
    `AdapterInfo.output_error`.
    """

    digest: str
    blob: Float[np.ndarray, "devices L n E"]
    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    padding: float
    storage: str
    error: float

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


def lay_out(
    rank: Int32[np.ndarray, "L 7"],
    scale: Float32[np.ndarray, "L 7"],
    model: ModelConfig,
    page_elements: int,
    split: Split = ONE_DEVICE,
    storage: str = "full",
    word_bits: int = 16,
) -> Layout:
    """Place an adapter of these ranks in one device's pages of `page_elements` words.

    Args:
        rank, scale: as the adapter has them; `scale` is kept.
        word_bits: of a word of the pool.
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
            placed[like] = _place(rows, counts, page_elements, storage, word_bits)
        a_offset[layer], b_offset[layer], _ = placed[like]
    longest = max(end for _, _, end in placed.values())
    assert 0 < longest < 2**31, f"a layer's blob of {longest} words"
    n_pages = -(-longest // page_elements)
    words = [[row_words(r, storage, word_bits) + scale_groups(r, storage) for r in p] for p in rows]
    in_, out = np.array(words, np.int64).T
    used = rank.sum(axis=0, dtype=np.int64) @ (in_ / peers + out)
    for array in (a_offset, b_offset, own):
        array.flags.writeable = False
    padding = 1 - float(used) / (model.layers * n_pages * page_elements)
    return Layout(a_offset, b_offset, own, scale, n_pages, padding, storage)


def empty_blob(shape: tuple[int, int, int, int], dtype: np.dtype) -> Float[np.ndarray, "d L n E"]:
    """Zeros on a page boundary, where XLA:CPU takes them as they are; given back once unused."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def pack(
    adapter: Adapter, model: ModelConfig, page_elements: int, dtype: np.dtype,
    split: Split = ONE_DEVICE, devices: range | None = None, storage: str = "full",
) -> PackedAdapter:  # fmt: skip
    """Lay an adapter out in pages of `page_elements` words of the pool's `dtype`.

    Args:
        model: the whole one, as the adapter is.
        devices: those of `split` whose parts are wanted; by default all.

    Raises:
        AdapterRejected: a weight is too large for `dtype`.
    """
    assert dtype in POOL_DTYPES, f"a pool of {dtype}"
    outline, word_bits = adapter.outline(model), 8 * dtype.itemsize
    layout = lay_out(outline.rank, outline.scale, model, page_elements, split, storage, word_bits)
    devices = range(split.devices) if devices is None else devices
    blob = empty_blob((len(devices), model.layers, layout.n_pages, page_elements), dtype)
    parts, changes = _Parts(layout, model, split), Changes()
    for target, factors in adapter.factors.items():
        sides: list[Planes] = [(factors.a,), (factors.b.T,)]
        if storage != "full":
            sides = _store(target, factors, parts, dtype, changes)
        for device, own in zip(devices, blob, strict=True):
            for place, numbers in parts.of(own, target, sides, device):
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
        storage=storage,
        error=changes.error,
    )


def unpack(
    packed: PackedAdapter, model: ModelConfig, split: Split = ONE_DEVICE
) -> dict[tuple[int, str], Factors]:
    """The factors that `pack` laid out for all devices, in the pool's dtype.

    Their ranks are rounded up to what `split` holds.
    """
    dtype, storage = packed.blob.dtype, packed.storage
    parts, factors = _Parts(packed, model, split), {}
    for layer, column in np.argwhere(packed.rank > 0).tolist():
        target = layer, MODULES[column]
        rank = packed.rank[target[0], column] * split.peers(target[1])
        cuts = parts.cuts(target[1])
        sides = []
        for whole, cut in zip(model.widths(target[1]), cuts, strict=True):
            words = cut * row_words(whole // cut, storage, 8 * dtype.itemsize)
            planes = [np.zeros((rank, words), dtype)]
            if storage != "full":
                groups = cut * scale_groups(whole // cut, storage)
                planes.append(np.zeros((rank, groups), dtype))
            sides.append(tuple(planes))
        for device, own in enumerate(packed.blob):
            for place, numbers in parts.of(own, target, sides, device):
                numbers[...] = place
        a, b = (_numbers(side, storage, cut) for side, cut in zip(sides, cuts, strict=True))
        factors[target] = Factors(a, b.T, packed.scale[layer, column])
    return factors


def _place(
    rows: list[tuple[int, int]], counts: list[tuple[int, int]], page: int, storage: str,
    word_bits: int,
) -> tuple[list[int], list[int], int]:  # fmt: skip
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
                    width = row_piece(row, storage, word_bits, page)
                    first = offsets[side][column] = -(-end // width) * width
                    end = factor_end(first, count, row, storage, word_bits, page)
    return *offsets, end


class _Parts:
    """Where parts of factors lie in devices' blobs."""

    def __init__(self, layout: Layout | PackedAdapter, model: ModelConfig, split: Split) -> None:
        self.storage = layout.storage
        self._layout, self._model, self._split = layout, model, split

    def cuts(self, module: str) -> tuple[int, int]:
        """Parts that the columns of A and of B are cut into."""
        rows, widths = self._split.rows(self._model, module), self._model.widths(module)
        return widths[0] // rows[0], widths[1] // rows[1]

    def of(
        self, blob: Float[np.ndarray, "L n E"], target: tuple[int, str], sides: Seq[Planes],
        device: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
        """(place in a device's blob, what belongs there) for the planes of A and of B."""
        layer, module = target
        layout, column = self._layout, _COLUMN[module]
        flat, own = blob[layer].reshape(-1), int(layout.rank[layer, column])
        parts = self._split.part(self._model, module, len(sides[0][0]), device)
        at = layout.a_offset[layer, column], layout.b_offset[layer, column]
        counts = own, own * self._split.peers(module)
        rows = self._split.rows(self._model, module)
        for planes, (ranks, columns), cut, first, count, row in zip(
            sides, parts, self.cuts(module), at, counts, rows, strict=True
        ):
            begins = [int(first)]
            if len(planes) > 1:
                bits, page = 8 * blob.itemsize, blob.shape[-1]
                begins.append(first_scale(begins[0], count, row, self.storage, bits, page))
            for plane, begin in zip(planes, begins, strict=True):
                width = plane.shape[1] // cut
                nth = columns.start // row
                numbers = plane[ranks, nth * width : (nth + 1) * width]
                place = flat[begin : begin + numbers.size].reshape(numbers.shape)
                yield place, numbers


def _store(
    target: tuple[int, str], factors: Factors, parts: _Parts, dtype: np.dtype, changes: Changes
) -> list[Planes]:
    """A and B rounded to integers; what that changes is noted.

    Raises:
        AdapterRejected: a weight is too large for `dtype`.
    """
    sides: list[Planes] = []
    rounded, given = [], (factors.a, factors.b.T)
    for rows, cut in zip(given, parts.cuts(target[1]), strict=True):
        found = quantize(rows, parts.storage, dtype, cut)
        integers = found.integers.reshape(len(rows) * cut, -1)
        words = to_words(integers, parts.storage, dtype).reshape(len(rows), -1)
        _check(found.numbers, target)
        sides.append((words, found.scales))
        rounded.append(found.numbers)
    changes.add(given, rounded, factors.scale)
    return sides


def _numbers(planes: Planes, storage: str, cut: int) -> np.ndarray:
    """What the planes of a factor stand for, whose columns are cut into so many parts."""
    if storage == "full":
        return planes[0]
    words, scales = planes
    integers = from_words(words.reshape(len(words) * cut, -1), storage)
    return Quantized(integers.reshape(len(words), -1), scales).numbers


def _copy(place: np.ndarray, numbers: np.ndarray, target: tuple[int, str]) -> None:
    with np.errstate(over="ignore"):
        place[...] = numbers
    if numbers.dtype != place.dtype:
        _check(place, target)


def _check(numbers: np.ndarray, target: tuple[int, str]) -> None:
    """Raise AdapterRejected if a number became infinite when it was rounded."""
    if not all_finite(numbers):
        layer, module = target
        raise AdapterRejected(
            f"a weight of layer {layer}'s {module} is too large for {numbers.dtype.name}"
        )
