"""Mixes, where their adapters lie, and the regions of a pool that timed calls walk."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.adapters.layout import lay_out
from jslora.bench.floor import Adapter
from jslora.gpu.cases import (
    FULL,
    LLAMA3_8B,
    TINY,
    TINY_MODEL,
    Mix,
    Regions,
    mix_pages,
    offsets,
    place,
    place_mix,
    pool_pages,
    share_out,
)
from jslora.model.config import MODULES, ModelConfig
from pallas_kernels.lora.pieces import STORAGES


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("model", "page"), [(LLAMA3_8B, 32768), (TINY_MODEL, 512)])
@given(ranks=st.tuples(*[st.integers(0, 70)] * len(MODULES)).filter(any))
def test_adapters_lie_where_the_engine_puts_them(
    model: ModelConfig, page: int, storage: str, ranks: tuple[int, ...]
) -> None:
    table = np.tile(np.array(ranks, np.int32), (model.layers, 1))
    layout = lay_out(table, np.ones(table.shape, np.float32), model, page, storage=storage)
    a, b, end = offsets(model, ranks, page, storage)
    np.testing.assert_array_equal(layout.a_offset, [a] * model.layers)
    np.testing.assert_array_equal(layout.b_offset, [b] * model.layers)
    assert -(-end // page) == layout.n_pages


def test_an_adapter_takes_the_pages_it_is_given() -> None:
    adapter = Adapter("a", (4,) * len(MODULES))
    placement = place(TINY_MODEL, adapter, 512, [9, 3, 7, 5, 1, 2, 11, 12, 13, 14], 0.5)
    assert placement.pages == (9, 3, 7, 5, 1, 2, 11, 12)  # 4 * 1024 numbers in pages of 512
    assert not placement.is_run and placement.rank.tolist() == [[4] * 7] * 2
    with pytest.raises(AssertionError, match="a needs 8 pages, there are 2"):
        place(TINY_MODEL, adapter, 512, [1, 2], 0.5)


def test_the_adapters_of_a_mix_take_turns_in_rank_and_lie_behind_each_other() -> None:
    mix = Mix(5, (8, 16))
    assert str(mix) == "5 x 8-16" and str(Mix(5, (8,))) == "5 x 8"
    assert [adapter.ranks[0] for adapter in mix.of()] == [8, 16, 8, 16, 8]
    placed = place_mix(TINY_MODEL, mix, 512, 1.0, first=100)
    # a rank is 1024 numbers, two pages
    assert [p.pages[0] for p in placed] == [100, 116, 148, 164, 196]
    assert mix_pages(TINY, mix) == 2 * (8 + 16 + 8 + 16 + 8)


@given(adapters=st.integers(1, 40), batch=st.integers(1, 300))
def test_rows_are_shared_out_as_the_floor_counts_them(adapters: int, batch: int) -> None:
    mix = Mix(adapters, (4,))
    parts = share_out(place_mix(TINY_MODEL, mix, 512, 1.0), batch)
    owners = [part.placement.digest for part in parts for _ in range(part.start, part.end)]
    assert owners == [row.adapter.name for row in mix.rows(batch, 7) if row.adapter]
    assert len(owners) == batch, "every row has an adapter"
    if adapters <= batch:
        counts = Counter(owners)
        assert len(counts) == adapters and max(counts.values()) - min(counts.values()) <= 1


def test_a_batch_of_the_base_model() -> None:
    assert all(row.adapter is None for row in Mix(0, (0,)).rows(4, 9))
    assert share_out([], 4) == []


@pytest.mark.parametrize("pages", [10, 40, 1280, 20480, 131072])
def test_calls_walk_cold_regions_that_do_not_overlap(pages: int) -> None:
    regions = Regions.of(pages, FULL, pool_pages(FULL))
    firsts = np.concatenate([np.asarray(call) for call in regions.firsts(FULL.chain)])
    assert firsts.max() + pages <= pool_pages(FULL), "within the pool"
    distinct = np.unique(firsts)
    assert (np.diff(distinct) >= pages).all()
    page_bytes = FULL.page_numbers * 2
    assert len(distinct) * pages * page_bytes >= min(FULL.cold_bytes, pool_pages(FULL) * page_bytes)


def test_the_full_plan_fits_the_smallest_device_it_is_for() -> None:
    """80 GB with 85 % of it for arrays: weights, the step's pool and its adapters."""
    rows = FULL.step_rows * -(-FULL.step_context // FULL.page_size)
    pages = rows + max(mix_pages(FULL, mix) for mix in FULL.step_mixes)
    step = 2 * (LLAMA3_8B.parameters + LLAMA3_8B.layers * pages * FULL.page_numbers)
    assert step < 0.85 * 80e9
    assert FULL.wide_numbers > 2**31, "offsets beyond 32 bits are checked"
    for batch, mix in FULL.baseline_points:
        assert batch % mix.adapters == 0 and len(mix.ranks) <= mix.adapters


def test_the_baselines_points_with_the_most_work_come_last() -> None:
    work = [batch * mix.adapters * max(mix.ranks) for batch, mix in FULL.baseline_points]
    assert sorted(work)[-5:] == work[-5:]
