"""The memory plan: everything has its share, nothing is promised twice."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.config import EngineConfig, parse
from jslora.errors import ConfigError, ModelError
from jslora.memory.budget import (
    COARSE,
    MemoryPlan,
    gib,
    host_memory_available,
    max_model_len,
    plan_memory,
)  # fmt: skip
from jslora.model.config import ModelConfig
from jslora.split import Split

GIB = 2**30

# Llama-3-8B.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden=4096, layers=32, heads=32,
    kv_heads=8, head_dim=128, feed_forward=14336, max_positions=8192,
)  # fmt: skip


def configure(**sections: object) -> EngineConfig:
    return parse({"model": {"source": "m"} | sections.pop("model", {}), **sections})


def test_the_numbers_of_a_known_model() -> None:
    plan = plan_memory(configure(), MODEL, 80 * GIB)
    assert plan.weights == 2 * 8_030_261_248
    assert plan.page_bytes == 16 * 128 * 1024, "128 KiB of KV a token"
    assert plan.slots == 64 * 128256 * 4
    affordable = int((80 * GIB - plan.weights - plan.slots) * 0.85) // plan.page_bytes
    assert plan.pages == affordable // COARSE * COARSE > 20000
    assert plan.pool == plan.pages * plan.page_bytes


def test_weights_and_slots_come_first() -> None:
    config = configure(pool={"memory_fraction": 1})
    fixed = 2 * MODEL.parameters + 64 * 128256 * 4
    page = 16 * 128 * 1024
    assert plan_memory(config, MODEL, fixed + 5 * page).pages == 5
    assert plan_memory(config, MODEL, fixed + 5 * page - 1).pages == 4


def test_float32_doubles_weights_and_pages() -> None:
    half = plan_memory(configure(), MODEL, 200 * GIB)
    full = plan_memory(configure(model={"dtype": "float32"}), MODEL, 200 * GIB)
    assert (full.weights, full.page_bytes) == (2 * half.weights, 2 * half.page_bytes)


def test_given_pages_are_taken_as_they_are() -> None:
    plan = plan_memory(configure(pool={"pages": 77, "page_size": 32}), MODEL, 80 * GIB)
    assert (plan.pages, plan.page_size, plan.page_bytes) == (77, 32, 32 * 128 * 1024)


def test_more_memory_than_can_be_used_is_left_alone() -> None:
    config = configure(
        scheduler={"max_running": 8}, adapters={"host_cache_bytes": 3 * 2**21 + 1}
    )  # fmt: skip
    plan = plan_memory(config, MODEL, 10**15)
    useful = 8 * (8192 // 16) + 4
    assert useful - COARSE < plan.pages <= useful


@given(
    st.integers(0, 200 * GIB),
    st.floats(0.01, 1),
    st.integers(1, 512),
    st.sampled_from([8, 16, 32, 64]),
)
def test_what_is_planned_fits(available: int, fraction: float, running: int, size: int) -> None:
    config = configure(
        pool={"memory_fraction": fraction, "page_size": size}, scheduler={"max_running": running}
    )
    try:
        plan = plan_memory(config, MODEL, available)
    except ConfigError as error:
        left = available - 2 * MODEL.parameters - running * MODEL.vocab_size * 4
        assert left * fraction < 2 * 2 * size * 64 * 1024, "a page beside the null page would fit"
        assert gib(available) in error.message
        return
    assert plan.pages >= 2
    assert plan.weights + plan.slots + plan.pool <= available
    assert plan.pages < COARSE or plan.pages % COARSE == 0


def test_too_little_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"8\.00 GiB of memory leave no page beside 14\.96 GiB"):
        plan_memory(configure(), MODEL, 8 * GIB)


def test_the_longest_sequence_is_the_models_or_what_was_asked_for() -> None:
    assert max_model_len(configure(), MODEL) == 8192
    assert max_model_len(configure(model={"max_model_len": 100}), MODEL) == 100
    assert max_model_len(configure(model={"max_model_len": 8192}), MODEL) == 8192
    with pytest.raises(ConfigError, match=r"max_model_len is 8193; the model was made for 8192"):
        plan_memory(configure(model={"max_model_len": 8193}), MODEL, 80 * GIB)


def test_the_report_says_what_was_planned() -> None:
    plan = MemoryPlan(
        available=3 * GIB, weights=300 * 2**20, slots=2**20, page_bytes=360 * 1024, pages=1024,
        page_size=16, host_cache=GIB, max_model_len=2048,
    )  # fmt: skip
    lines = [line.split("  ") for line in plan.report().splitlines()]
    found = {words[0] or words[1]: words[-1].strip() for words in lines}
    assert found == {
        "memory available to the device": "3.00 GiB",
        "weights": "300.0 MiB",
        "per-slot sampling state": "1.0 MiB",
        "pool (KV cache and adapters)": "360.0 MiB",
        "1024 pages of 16 tokens": "0.4 MiB",
        "tokens, were no adapter loaded": "16,368",
        "host memory for packed adapters, at most": "1.00 GiB",
        "longest sequence": "2,048 tokens",
    }


# Several devices ---------------------------------------------------------------------------------


def over(devices: int, lora: str = "auto", **sections: object) -> EngineConfig:
    return configure(mesh={"model": devices, "lora": lora}, **sections)


def test_a_device_holds_its_part_and_what_every_one_has() -> None:
    one, four = (plan_memory(over(n), MODEL, 80 * GIB) for n in (1, 4))
    whole = 2 * (65 * 4096)  # norms
    assert four.weights - whole == (one.weights - whole) / 4
    assert four.page_bytes == one.page_bytes / 4
    assert four.slots == one.slots, "every device samples alike"
    odd = replace(MODEL, vocab_size=MODEL.vocab_size + 1)
    embeddings = 2 * 2 * 4096 * odd.vocab_size
    assert plan_memory(over(4), odd, 80 * GIB).weights > four.weights + 0.7 * embeddings


@given(st.sampled_from([1, 2, 4, 8]), st.integers(20 * GIB, 80 * GIB))
def test_what_is_planned_fits_on_every_device(devices: int, available: int) -> None:
    plan = plan_memory(over(devices), MODEL, available)
    assert plan.weights + plan.slots + plan.pool <= available
    assert plan.split.devices == devices


@pytest.mark.parametrize("lora", ["auto", "no_collective", "fully_sharded"])
def test_what_does_not_divide_is_refused(lora: str) -> None:
    with pytest.raises(ModelError, match="8 kv heads cannot be split over 3 devices"):
        plan_memory(over(3, lora), MODEL, 80 * GIB)


def test_adapters_are_fully_sharded_when_they_would_fill_half_of_the_pool() -> None:
    """On four devices 41,984 numbers a rank and layer, 8,192 a page: 82 pages at rank 16."""
    just, over_half = (
        plan_memory(over(4, pool={"pages": pages}, scheduler={"max_running": 10}), MODEL, 80 * GIB)
        for pages in (1640, 1639)
    )
    assert (just.split, over_half.split) == (Split(4), Split(4, fully=True))
    assert just.reason == (
        "10 adapters of rank 16 on every module take 820 of 1640 pages, no more than half"
    )
    assert "fully_sharded: 10 adapters of rank 16 on every module would take 820" in (
        over_half.report()
    )


def test_the_split_that_is_asked_for_is_taken() -> None:
    few = over(4, "no_collective", pool={"pages": 10})
    assert plan_memory(few, MODEL, 80 * GIB).split == Split(4)
    full = plan_memory(over(4, "fully_sharded"), MODEL, 80 * GIB)
    assert full.split == Split(4, fully=True) and "mesh.lora asks for it" in full.report()
    assert plan_memory(over(1, "fully_sharded"), MODEL, 80 * GIB).split == Split()
    assert "adapters are" not in plan_memory(over(1), MODEL, 80 * GIB).report()


def test_low_ranks_are_counted_as_they_are() -> None:
    low = over(
        4, pool={"pages": 2 * 10 * 6}, adapters={"max_rank": 1}, scheduler={"max_running": 10}
    )
    plan = plan_memory(low, MODEL, 80 * GIB)
    assert plan.split == Split(4) and "of rank 1 on" in plan.reason


def test_this_machine_has_memory() -> None:
    assert 2**20 < host_memory_available() < 2**50
