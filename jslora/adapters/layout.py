"""An adapter's numbers in pages: one blob a layer, at true rank, nothing padded to a maximum.

For each group of modules that read the same input come all A rows, then all B rows, B transposed so
that both are one row per rank. A factor starts on a boundary of its own piece, the largest width
that divides both its row and the page, so that no piece straddles two pages. One page id serves all
layers: an adapter takes the pages of its largest layer. Where factors lie follows from the ranks
alone, so it is known before a tensor was read. B is stored as it is, bit for bit where the
dtypes agree; the scale stays a float32 beside it. Host only: no jax.
"""

import hashlib
import json
import math
import mmap
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32

from jslora.adapters.peft import Adapter, Factors
from jslora.adapters.tensors import all_finite
from jslora.errors import AdapterRejected
from jslora.model.config import GROUPS, MODULES, ModelConfig

LAYOUT = 1
"""Number of the rules below and of those by which folders are read; to be raised with either."""

POOL_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))

_COLUMN = {module: column for column, module in enumerate(MODULES)}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where an adapter's factors lie; arrays are read-only, columns are in `MODULES` order.

    Attributes:
        a_offset, b_offset: first number of a factor in its layer's blob; 0 where `rank` is 0.
        rank: 0 where a module is not targeted.
        scale: what the low-rank product is multiplied by.
        padding: share of the pages' numbers that are no weights.
    """

    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    n_pages: int
    padding: float


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter as the pool holds it: `blob`, in the pool's dtype, and what a `Layout` says."""

    digest: str
    blob: Float[np.ndarray, "L n E"]
    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    padding: float

    @property
    def n_pages(self) -> int:
        return self.blob.shape[1]


def layout_key(model: ModelConfig, page_elements: int, dtype: np.dtype) -> str:
    """A name for all that a blob depends on beside its adapter."""
    widths = [model.widths(module) for module in MODULES]
    facts = [LAYOUT, model.layers, widths, page_elements, np.dtype(dtype).name]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie in pages of `page` numbers."""
    return math.gcd(row, page)


def lay_out(
    rank: Int32[np.ndarray, "L 7"],
    scale: Float32[np.ndarray, "L 7"],
    model: ModelConfig,
    page_elements: int,
) -> Layout:
    """Place an adapter of these ranks in pages of `page_elements` numbers; keeps the arrays."""
    a_offset, b_offset = np.zeros_like(rank), np.zeros_like(rank)
    placed: dict[bytes, tuple[list[int], list[int], int]] = {}  # most layers are alike
    for layer, row in enumerate(rank):
        like = row.tobytes()
        if like not in placed:
            placed[like] = _place(model, page_elements, row.tolist())
        a_offset[layer], b_offset[layer], _ = placed[like]
    longest = max(end for _, _, end in placed.values())
    assert 0 < longest < 2**31, f"a layer's blob of {longest} numbers"
    n_pages = -(-longest // page_elements)
    used = rank.sum(axis=0, dtype=np.int64) @ [sum(model.widths(module)) for module in MODULES]
    a_offset.flags.writeable = b_offset.flags.writeable = False
    padding = 1 - int(used) / (model.layers * n_pages * page_elements)
    return Layout(a_offset, b_offset, rank, scale, n_pages, padding)


def empty_blob(shape: tuple[int, int, int], dtype: np.dtype) -> Float[np.ndarray, "L n E"]:
    """Zeros on a page boundary, where XLA:CPU takes them as they are; given back once unused."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def pack(
    adapter: Adapter, model: ModelConfig, page_elements: int, dtype: np.dtype
) -> PackedAdapter:
    """Lay an adapter out in pages of `page_elements` numbers of the pool's `dtype`.

    Raises:
        AdapterRejected: a weight is too large for `dtype`.
    """
    assert dtype in POOL_DTYPES, f"a pool of {dtype}"
    outline = adapter.outline(model)
    layout = lay_out(outline.rank, outline.scale, model, page_elements)
    blob = empty_blob((model.layers, layout.n_pages, page_elements), dtype)
    _fill(blob.reshape(model.layers, -1), adapter, layout.a_offset, layout.b_offset)
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


def unpack(packed: PackedAdapter, model: ModelConfig) -> dict[tuple[int, str], Factors]:
    """The factors that `pack` laid out, in the pool's dtype."""
    flat = packed.blob.reshape(model.layers, -1)
    factors = {}
    for layer, column in zip(*np.nonzero(packed.rank), strict=True):
        module, rank = MODULES[column], packed.rank[layer, column]
        wide_in, wide_out = model.widths(module)
        a, b = packed.a_offset[layer, column], packed.b_offset[layer, column]
        factors[int(layer), module] = Factors(
            flat[layer, a : a + rank * wide_in].reshape(rank, wide_in),
            flat[layer, b : b + rank * wide_out].reshape(rank, wide_out).T,
            packed.scale[layer, column],
        )
    return factors


def _place(model: ModelConfig, page: int, rank: list[int]) -> tuple[list[int], list[int], int]:
    """(offsets of A, offsets of B, end of the last factor) in one layer's blob."""
    offsets: tuple[list[int], list[int]] = ([0] * len(MODULES), [0] * len(MODULES))
    end = 0
    for group in GROUPS:
        for side in (0, 1):
            for module in group:
                column = _COLUMN[module]
                if rank[column] > 0:
                    row = model.widths(module)[side]
                    width = piece_width(row, page)
                    offsets[side][column] = -(-end // width) * width
                    end = offsets[side][column] + rank[column] * row
    return *offsets, end


def _fill(
    flat: Float[np.ndarray, "L nE"],
    adapter: Adapter,
    a_offset: Int32[np.ndarray, "L 7"],
    b_offset: Int32[np.ndarray, "L 7"],
) -> None:
    for (layer, module), factors in adapter.factors.items():
        column = _COLUMN[module]
        for rows, offset in ((factors.a, a_offset), (factors.b.T, b_offset)):
            first = offset[layer, column]
            place = flat[layer, first : first + rows.size]
            with np.errstate(over="ignore"):
                place.reshape(rows.shape)[...] = rows
            if rows.dtype != flat.dtype and not all_finite(place):
                raise AdapterRejected(
                    f"a weight of layer {layer}'s {module} is too large for {flat.dtype.name}"
                )
