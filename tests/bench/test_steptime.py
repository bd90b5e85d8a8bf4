"""Step-time models against the floor, sums worked out by hand, and what made the steps."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.bench.floor import Adapter, Device, Row, step_floor
from jslora.bench.hardware import HARDWARE, LLAMA3_8B, LLAMA_7B
from jslora.bench.steptime import (
    FloorTimes,
    Linear,
    Measured,
    Parts,
    Roofline,
    Shares,
    Work,
    fit_steps,
    load_steps,
)
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig

# q 8->8, k and v 8->4, o 8->8, gate and up 8->16, down 16->8; one layer has 576 linear weights.
TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=10, hidden=8, layers=2, heads=2, kv_heads=1,
    head_dim=4, feed_forward=16, max_positions=64,
)  # fmt: skip
SLOW = Device("slow", bandwidth=1000.0, flops=10000.0)
ROWS = st.lists(
    st.tuples(st.integers(0, 100), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=20
)


def adapter(rank: int) -> Adapter:
    return Adapter(f"r{rank}", (rank, 0, 2 * rank, 1, 0, rank, 0))


def work_of(rows: list[tuple[int, int, int]], model: ModelConfig) -> Work:
    """Of (positions before, tokens, rank; 0 is no adapter) rows."""
    work, seen = Work(), set()
    for position, tokens, rank in rows:
        work.add(tokens, position)
        if rank:
            ranks = zip(MODULES, adapter(rank).ranks, strict=True)
            numbers = model.layers * sum(r * sum(model.widths(m)) for m, r in ranks)
            work.lora_products += tokens * numbers
            work.adapter_numbers += 0 if rank in seen else numbers
            seen.add(rank)
    work.adapters = len(seen)
    return work


@given(ROWS, st.sampled_from([TINY, LLAMA3_8B]), st.sampled_from([2, 4]))
def test_the_parts_are_those_of_the_floor(
    rows: list[tuple[int, int, int]], model: ModelConfig, itemsize: int
) -> None:
    floor = step_floor(
        model, [Row(p + n, n, adapter(r) if r else None) for p, n, r in rows], itemsize
    )
    parts, work = Parts(model, itemsize), work_of(rows, model)
    assert parts.linear(work) == floor.weights + floor.embedding + floor.head
    assert parts.attention(work) == floor.kv_read + floor.kv_write
    assert parts.lora(work) == floor.lora
    assert FloorTimes(Parts(model, itemsize), SLOW, 3.0).seconds(work) == pytest.approx(
        3 * floor.total.seconds(SLOW)
    )


def test_a_roofline_step_by_hand() -> None:
    shares = Shares(overhead=100.0, memory=0.5, compute=0.25, lora_overhead=7.0, lora_compute=0.01)
    model = Roofline(Parts(TINY), SLOW, shares)
    work = work_of([(5, 1, 1)], TINY)
    work.written = 250
    # Linear: 2 * 576 weights, 5 norms of 8, 80 of the head and 8 of the embedding: 1280 numbers,
    # 2560 bytes at 500/s; arithmetic, 2 * (1152 + 80) at 2500/s, is less.
    # Attention: keys and values of 6 positions, 2 layers of 2 * 4, are 192 bytes; 6 * 4 * 2 * 8
    # products are less.
    # LoRA: ranks 1, 0, 2, 1, 0, 1, 0 of widths 16, 12, 12, 16, 24, 24, 24: 80 numbers a layer,
    # 160 in all, 320 bytes at 500/s, which is less than 2 * 160 products at 100/s.
    assert model.seconds(work) == pytest.approx(
        100 + 2560 / 500 + 192 / 500 + 320 / 100 + 7 + 2 * 250 / 500
    )
    base = work_of([(5, 1, 0)], TINY)
    assert model.seconds(base) == pytest.approx(100 + 2560 / 500 + 192 / 500)


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 400), st.integers(1, 3)), min_size=1),
    st.sampled_from(["a10g", "a100-80"]),
)
def test_no_step_is_faster_than_the_sums_below(
    rows: list[tuple[int, int, int]], device: str
) -> None:
    model, work = HARDWARE[device].step_time(LLAMA_7B), work_of(rows, LLAMA_7B)
    assert isinstance(model, Roofline)
    smallest = work_of([(0, 1, 1)], LLAMA_7B).adapter_numbers
    for numbers in (0, smallest):
        for below in model.below(numbers):
            assert 0 < below.seconds(work) <= model.seconds(work) * (1 + 1e-12)


def test_the_sums_below_are_reached() -> None:
    model = HARDWARE["a10g"].step_time(LLAMA_7B)
    assert isinstance(model, Roofline)
    memory, arithmetic = model.below()
    decode, prefill = work_of([(300, 1, 0)] * 8, LLAMA_7B), work_of([(0, 512, 0)], LLAMA_7B)
    assert memory.seconds(decode) == pytest.approx(model.seconds(decode))
    assert arithmetic.seconds(prefill) == pytest.approx(model.seconds(prefill), rel=0.02)


def test_an_a10g_decodes_llama_7b_at_what_was_measured() -> None:
    # S-LoRA at 1 request/s: 11 rows on average, 45 ms from one token to the next.
    rows = [(380, 1, 0)] * 11
    seconds = HARDWARE["a10g"].step_time(LLAMA_7B).seconds(work_of(rows, LLAMA_7B))
    assert 0.03 < seconds < 0.045


def measured(model: Linear, rows: list[tuple[int, int, int]]) -> list[Measured]:
    steps = []
    for tokens, count, kv in rows:
        work = Work(rows=count, tokens=tokens, cached=kv)
        steps.append(Measured(tokens, count, kv, model.seconds(work)))
    return steps


SIZES = [(1, 1, 10), (64, 64, 9000), (300, 2, 50), (512, 40, 8000), (16, 16, 70000), (8, 8, 0)]


def test_a_fit_finds_what_made_the_steps() -> None:
    made = Linear(constant=0.004, token=1e-4, row=3e-5, position=2e-7)
    found = fit_steps(measured(made, SIZES))
    assert found.residual < 1e-9
    for name in ("constant", "token", "row", "position"):
        assert getattr(found, name) == pytest.approx(getattr(made, name))


def test_no_fitted_number_is_negative() -> None:
    # A row that seems to save time: the nearest model without such a thing has none for rows.
    made = Linear(constant=0.004, token=1e-4, row=-3e-5, position=2e-7)
    found = fit_steps(measured(made, SIZES))
    assert min(found.constant, found.token, found.row, found.position) >= 0
    assert found.row == 0 and found.residual > 0


def test_measured_steps_are_read_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    step = '{"tokens": 8, "rows": 8, "kv": 100, "seconds": 0.01}'
    path.write_text(f"[{', '.join([step] * 4)}]")
    assert load_steps(path).seconds(Work(rows=8, tokens=8, cached=100)) == pytest.approx(0.01)
    for text in ("[]", f"[{step}]", "{}", "[", step.replace("8", "-")):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_steps(path)
    with pytest.raises(ConfigError, match="no-such"):
        load_steps(tmp_path / "no-such.json")


def test_hardware_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="H100"):
        HARDWARE["h100"].step_time(LLAMA3_8B)
    with pytest.raises(ConfigError, match="does not hold"):
        HARDWARE["a10g"].pages(replace(LLAMA_7B, layers=100), 16)
    # 21.6e9 bytes less 13.48e9 of weights, over 32 * 2 * 16 * 4096 * 2 a page
    assert HARDWARE["a10g"].pages(LLAMA_7B, 16) == (21_600_000_000 - 13_476_831_232) // 8_388_608
