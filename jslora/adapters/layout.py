"""An adapter's numbers in pages: one blob a layer, at true rank, nothing padded to a maximum.

For each group of modules that read the same input come all A rows, then all B rows, B transposed so
that both are one row per rank. A factor starts on a boundary of its own piece, the largest width
that divides both its row and the page, so that no piece straddles two pages. One page id serves all
layers: an adapter takes the pages of its largest layer. B is stored as it is, bit for bit where the
dtypes agree; the scale stays a float32 beside it. Host only: no jax.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32

from jslora.adapters.peft import Adapter, Factors
from jslora.errors import AdapterRejected
from jslora.model.config import GROUPS, MODULES, ModelConfig

POOL_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter as the pool holds it; arrays are read-only, columns are in `MODULES` order.

    Attributes:
        blob: the numbers of every layer, in the pool's dtype; n pages of E numbers each.
        a_offset, b_offset: first number of a factor in its layer's blob; 0 where `rank` is 0.
        rank: 0 where a module is not targeted.
        scale: what the low-rank product is multiplied by.
        padding: share of `blob` that holds no weight.
    """

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


def piece_width(row: int, page: int) -> int:
    """Width of the pieces in which rows of `row` numbers lie in pages of `page` numbers."""
    return math.gcd(row, page)


def pack(
    adapter: Adapter, model: ModelConfig, page_elements: int, dtype: np.dtype
) -> PackedAdapter:
    """Lay an adapter out in pages of `page_elements` numbers of the pool's `dtype`.

    Raises:
        AdapterRejected: a weight is too large for `dtype`.
    """
    assert dtype in POOL_DTYPES, f"a pool of {dtype}"
    shape = (model.layers, len(MODULES))
    a_offset, b_offset, rank = (np.zeros(shape, np.int32) for _ in range(3))
    scale = np.zeros(shape, np.float32)
    for (layer, module), factors in adapter.factors.items():
        rank[layer, MODULES.index(module)] = factors.a.shape[0]
        scale[layer, MODULES.index(module)] = factors.scale
    longest = 0
    for layer in range(model.layers):
        end = _place(model, page_elements, rank[layer], a_offset[layer], b_offset[layer])
        longest = max(longest, end)
    assert 0 < longest < 2**31, f"a layer's blob of {longest} numbers"
    blob = np.zeros((model.layers, -(-longest // page_elements), page_elements), dtype)
    _fill(blob.reshape(model.layers, -1), adapter, a_offset, b_offset)
    used = sum(f.a.size + f.b.size for f in adapter.factors.values())
    for array in (blob, a_offset, b_offset, rank, scale):
        array.flags.writeable = False
    return PackedAdapter(
        digest=adapter.digest,
        blob=blob,
        a_offset=a_offset,
        b_offset=b_offset,
        rank=rank,
        scale=scale,
        padding=1 - used / blob.size,
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


def _place(
    model: ModelConfig,
    page: int,
    rank: Int32[np.ndarray, " 7"],
    a_offset: Int32[np.ndarray, " 7"],
    b_offset: Int32[np.ndarray, " 7"],
) -> int:
    """Set the offsets of one layer's factors; return the end of the last one."""
    end = 0
    for group in GROUPS:
        for offset, side in ((a_offset, 0), (b_offset, 1)):
            for column in (MODULES.index(module) for module in group):
                if rank[column] == 0:
                    continue
                row = model.widths(MODULES[column])[side]
                width = piece_width(row, page)
                offset[column] = -(-end // width) * width
                end = int(offset[column]) + int(rank[column]) * row
    return end


def _fill(
    flat: Float[np.ndarray, "L nE"],
    adapter: Adapter,
    a_offset: Int32[np.ndarray, "L 7"],
    b_offset: Int32[np.ndarray, "L 7"],
) -> None:
    for (layer, module), factors in adapter.factors.items():
        column = MODULES.index(module)
        for rows, offset in ((factors.a, a_offset), (factors.b.T, b_offset)):
            first = offset[layer, column]
            place = flat[layer, first : first + rows.size]
            with np.errstate(over="ignore"):
                place.reshape(rows.shape)[...] = rows
            if not np.isfinite(place).all():
                raise AdapterRejected(
                    f"a weight of layer {layer}'s {module} is too large for {flat.dtype.name}"
                )
