"""Packing: nothing is lost, nothing overlaps, pieces lie where the kernels look for them."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from adapter_folders import DTYPES, MODEL, every_target
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.adapters.layout import PackedAdapter, lay_out, pack, unpack
from jslora.adapters.peft import Adapter, Factors
from jslora.adapters.quantize import quantize
from jslora.errors import AdapterRejected
from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.split import Split
from pallas_kernels.lora.pieces import STORAGES, packed_in_word, row_piece, scale_groups

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def _adapter(
    ranks: dict[tuple[int, str], int], model: ModelConfig, dtype: str = "float32", value: float = 0
) -> Adapter:
    """Normal factors, or `value` everywhere, with a scale of its own for each."""
    random = np.random.default_rng(len(ranks))
    factors = {}
    for number, ((layer, module), rank) in enumerate(ranks.items()):
        wide_in, wide_out = model.widths(module)
        a, b = random.normal(size=(rank, wide_in)), random.normal(size=(wide_out, rank))
        if value:
            a, b = np.full_like(a, value), np.full_like(b, value)
        factors[layer, module] = Factors(
            a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), np.float32(number + 0.5)
        )
    return Adapter(factors=factors, digest="d", base_model=None, bytes=0, warnings=())


def _model(
    heads: int, kv: int, dim: int, hidden: int, feed: int, layers: int, devices: int = 1
) -> ModelConfig:
    """One whose every width divides by `devices`."""
    return dataclasses.replace(
        MODEL,
        heads=heads * kv * devices,
        kv_heads=kv * devices,
        head_dim=dim,
        hidden=hidden * devices,
        feed_forward=feed * devices,
        layers=layers,
    )


DIMENSIONS = (
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 8, 16, 64]),
    st.sampled_from([6, 32, 48, 96]),
    st.sampled_from([10, 64, 176]),
    st.integers(1, 4),
)
splits = st.builds(Split, st.integers(1, 5), st.booleans())


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_packing_keeps_every_number_where_the_offsets_say(data: st.DataObject) -> None:
    split = data.draw(splits)
    model = _model(*data.draw(st.tuples(*DIMENSIONS)), devices=split.devices)
    part = split.local(model)
    page = 2 * data.draw(st.sampled_from([8, 16, 32])) * part.kv_heads * part.head_dim
    target = st.sampled_from(every_target(model.layers))
    ranks = data.draw(st.dictionaries(target, st.integers(1, 9), min_size=1))
    saved, pool = data.draw(st.sampled_from(list(DTYPES))), data.draw(st.sampled_from([BF16, F32]))
    storage = data.draw(st.sampled_from(_storages(model, split, pool)))
    adapter = _adapter(ranks, model, saved)
    packed = pack(adapter, model, page, pool, split, storage=storage)

    assert packed.blob.dtype == pool
    assert packed.blob.shape == (split.devices, model.layers, packed.n_pages, page)
    found = unpack(packed, model, split)
    assert found.keys() == ranks.keys()
    for t, factors in adapter.factors.items():
        own, rank = split.rank(t[1], ranks[t]), ranks[t]
        assert own == packed.rank[t[0], MODULES.index(t[1])]
        assert len(found[t].a) == found[t].b.shape[1] == own * split.peers(t[1]) < rank + 5
        a, b = _stored(factors, t[1], model, split, storage, pool)
        np.testing.assert_array_equal(found[t].a[:rank], a)
        np.testing.assert_array_equal(found[t].b[:, :rank], b)
        assert not found[t].a[rank:].any() and not found[t].b[:, rank:].any()
        assert found[t].scale == factors.scale
    for device in range(split.devices):
        alone = pack(adapter, model, page, pool, split, range(device, device + 1), storage)
        bits = f"u{pool.itemsize}"  # which may be those of a NaN
        np.testing.assert_array_equal(alone.blob[0].view(bits), packed.blob[device].view(bits))
        assert alone.error == packed.error < 0.3
    assert (packed.error > 0) == (storage != "full")
    _check_places(packed, model, page, split)


def _storages(model: ModelConfig, split: Split, pool: np.dtype) -> list[str]:
    """Those that rows of the model are whole words of."""
    rows = [row for module in MODULES for row in split.rows(model, module)]
    return [s for s in STORAGES if not any(row % packed_in_word(s, 8 * pool.itemsize)
                                           for row in rows)]  # fmt: skip


def _stored(
    factors: Factors, module: str, model: ModelConfig, split: Split, storage: str, pool: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a factor that are stored: of every device's columns as if they were alone."""
    if storage == "full":
        return factors.a.astype(pool), factors.b.astype(pool)
    sides = []
    for numbers, row in zip((factors.a, factors.b.T), split.rows(model, module), strict=True):
        parts = np.split(numbers, numbers.shape[1] // row, axis=1)
        rounded = [quantize(part, storage, pool).numbers for part in parts]
        sides.append(np.concatenate(rounded, axis=1))
    return sides[0], sides[1].T


def _check_places(packed: PackedAdapter, model: ModelConfig, page: int, split: Split) -> None:
    """Order of the groups, boundaries, no overlap, zeros between, and no page too many."""
    ends, storage = [], packed.storage
    k = packed_in_word(storage, 8 * packed.blob.itemsize)
    for layer in range(model.layers):
        taken = np.zeros(packed.n_pages * page, bool)
        end = 0
        for group in GROUPS:
            for side, offsets in enumerate((packed.a_offset, packed.b_offset)):
                for module in group:
                    column = MODULES.index(module)
                    rank, first = packed.rank[layer, column], offsets[layer, column]
                    numbers = split.rows(model, module)[side]
                    row, groups = numbers // k, scale_groups(numbers, storage)
                    if side == 1:
                        rank *= split.peers(module)
                    if rank == 0:
                        assert first == packed.scale[layer, column] == 0
                        continue
                    width = row_piece(numbers, storage, 8 * packed.blob.itemsize, page)
                    assert page % width == row % width == first % width == 0
                    assert end <= first < end + width
                    end = first + rank * row
                    assert not taken[first:end].any()
                    taken[first:end] = True
                    if storage == "full":
                        continue
                    width = math.gcd(groups, page)
                    first = -(-end // width) * width
                    end = first + rank * groups
                    assert not taken[first:end].any()
                    taken[first:end] = True
        flat = packed.blob[:, layer].reshape(split.devices, -1)
        assert not flat[:, ~taken].any()
        ends.append(end)
    assert packed.n_pages == math.ceil(max(ends) / page)


LLAMA3_8B = dataclasses.replace(
    MODEL, hidden=4096, layers=1, heads=32, kv_heads=8, head_dim=128, feed_forward=14336
)
SMOLLM2_135M = dataclasses.replace(
    MODEL, hidden=576, layers=1, heads=9, kv_heads=3, head_dim=64, feed_forward=1536
)


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.511), ("int4", 0.277)])
@pytest.mark.parametrize(
    ("model", "split"),
    [(SMOLLM2_135M, Split()), (SMOLLM2_135M, Split(3)), (SMOLLM2_135M, Split(3, True))]
    + [(LLAMA3_8B, Split(n, fully)) for n in (1, 2, 4, 8) for fully in (False, True)],
)  # fmt: skip
def test_rank_8_on_every_module_takes_so_much_of_its_bytes(
    model: ModelConfig, split: Split, storage: str, most: float
) -> None:
    """Scales included, in the fewest whole pages that so many words need, or one more."""
    rank, scale = np.full((1, 7), 8, np.int32), np.ones((1, 7), np.float32)
    page = split.page_numbers(model, 16)
    full, small = (lay_out(rank, scale, model, page, split, name) for name in ("full", storage))
    used, words = (layout.n_pages * (1 - layout.padding) for layout in (full, small))
    assert words / used <= most
    assert math.ceil(words) <= small.n_pages <= math.ceil(words) + 1
    if storage == "int4" or (split == Split() and model is SMOLLM2_135M):
        assert small.n_pages / full.n_pages <= {"int8": 0.52, "int4": 0.30}[storage]


def test_integers_of_a_weight_that_overflows_the_pool_are_refused() -> None:
    largest = _adapter({(1, "up_proj"): 2}, MODEL, value=float(np.finfo(np.float32).max))
    with pytest.raises(AdapterRejected, match="layer 1's up_proj is too large for bfloat16"):
        pack(largest, MODEL, 512, BF16, storage="int8")


def test_llama_3_8b_at_rank_16_takes_40_pages() -> None:
    """The figure of the design: 81,920 numbers a rank and layer, pages of 16 tokens."""
    model = dataclasses.replace(
        MODEL, hidden=4096, layers=1, heads=32, kv_heads=8, head_dim=128, feed_forward=14336
    )
    packed = pack(_adapter(dict.fromkeys(every_target(1), 16), model, value=1), model, 32768, BF16)
    assert packed.n_pages == 40
    assert packed.padding == 0


def test_parts_are_what_the_products_of_a_device_take() -> None:
    """Of a module split by outputs rows of B, of one split by inputs columns of A; and the rest."""
    model = _model(1, 1, 2, 6, 10, 1, devices=2)  # heads of 2, 4 kv; hidden 12, feed-forward 20
    adapter = _adapter({(0, "gate_proj"): 3, (0, "down_proj"): 3}, model)
    gate, down = (adapter.factors[0, name] for name in ("gate_proj", "down_proj"))
    for fully in (False, True):
        packed = pack(adapter, model, 8, F32, Split(2, fully), range(1, 2))
        a = np.vstack([gate.a[2:], np.zeros((1, 12))]) if fully else gate.a
        np.testing.assert_array_equal(
            _rows(packed, packed.a_offset, "gate_proj", a.size), a.ravel()
        )
        b = gate.b[10:].T
        np.testing.assert_array_equal(
            _rows(packed, packed.b_offset, "gate_proj", b.size), b.ravel()
        )
        a = down.a[:, 10:]
        np.testing.assert_array_equal(
            _rows(packed, packed.a_offset, "down_proj", a.size), a.ravel()
        )
        b = (down.b[6:] if fully else down.b).T
        np.testing.assert_array_equal(
            _rows(packed, packed.b_offset, "down_proj", b.size), b.ravel()
        )


def _rows(packed: PackedAdapter, offset: np.ndarray, module: str, n: int) -> np.ndarray:
    return packed.blob.ravel()[offset[0, MODULES.index(module)] :][:n]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_llama_3_8b_split_takes_1_over_n_only_if_fully(devices: int) -> None:
    """The figures of the design: 82 pages at 4 devices and 138 at 8, each a part of one's size."""
    model = dataclasses.replace(
        MODEL, hidden=4096, layers=1, heads=32, kv_heads=8, head_dim=128, feed_forward=14336
    )
    rank, scale = np.full((1, 7), 16, np.int32), np.ones((1, 7), np.float32)
    pages = [
        lay_out(rank, scale, model, 32768 // devices, Split(devices, fully)).n_pages
        for fully in (False, True)
    ]
    assert pages == [{2: 54, 4: 82, 8: 138}[devices], 40]


def test_padding_is_what_smaller_layers_leave_unused() -> None:
    page = 2 * 16 * MODEL.kv_heads * MODEL.head_dim  # 512
    ranks = {(0, "q_proj"): 16, (2, "q_proj"): 8}  # 64 numbers a rank
    packed = pack(_adapter(ranks, MODEL), MODEL, page, F32)
    assert packed.n_pages == 2
    assert packed.padding == 1 - 24 * 64 / (3 * 2 * 512)


def test_factors_are_bit_exact_where_the_dtypes_agree() -> None:
    ranks = dict.fromkeys(every_target(), 3)
    for dtype, pool, bits in (("bfloat16", BF16, np.uint16), ("float32", F32, np.uint32)):
        adapter = _adapter(ranks, MODEL, dtype)
        found = unpack(pack(adapter, MODEL, 512, pool), MODEL)
        for t, factors in adapter.factors.items():
            np.testing.assert_array_equal(found[t].b.view(bits), factors.b.view(bits))


def test_a_weight_that_overflows_the_pool_is_refused() -> None:
    ranks = {(1, "up_proj"): 2}
    largest = float(ml_dtypes.finfo(BF16).max)
    assert pack(_adapter(ranks, MODEL, value=largest), MODEL, 512, BF16).n_pages == 1
    too_large = _adapter(ranks, MODEL, value=float(np.finfo(np.float32).max))
    assert pack(too_large, MODEL, 512, F32).n_pages == 1
    with pytest.raises(AdapterRejected, match="layer 1's up_proj is too large for bfloat16"):
        pack(too_large, MODEL, 512, BF16)


def test_packed_arrays_cannot_be_written() -> None:
    packed = pack(_adapter({(0, "q_proj"): 1}, MODEL), MODEL, 512, F32)
    for array in (packed.blob, packed.a_offset, packed.b_offset, packed.rank, packed.scale):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


def test_a_pool_of_another_dtype_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="a pool of float16"):
        pack(_adapter({(0, "q_proj"): 1}, MODEL), MODEL, 512, np.dtype(np.float16))
