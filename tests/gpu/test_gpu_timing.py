"""Timing, the budget of a section, and gaps in a profile."""

import jax.numpy as jnp
import numpy as np
import pytest

from jslora.gpu import gaps, hard_cases
from jslora.gpu.cases import TINY
from jslora.gpu.session import Session
from jslora.gpu.timing import MAX_CALLS, Timing, _timing, measure


def test_variants_take_turns_after_warming_up() -> None:
    order: list[str] = []

    def call(name: str) -> jnp.ndarray:
        order.append(name)
        return jnp.zeros(1)

    found = measure({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=3, sample_seconds=1e-9)
    assert order == ["a"] * 5 + ["b"] * 5 + ["a", "b"] * 3
    assert found["a"].samples == 3 and found["a"].calls == 1


def test_a_sample_never_outruns_the_runtime() -> None:
    found = measure({"a": lambda: jnp.zeros(1)}, rounds=1, sample_seconds=60)
    assert found["a"].calls == MAX_CALLS < 32


def test_the_median_and_its_spread() -> None:
    timing = _timing([(3.0, 0.1), (1.0, 0.9), (2.0, 1.9), (9.0, 0.1), (2.5, 0.1)], calls=4)
    assert (timing.seconds, timing.low, timing.high) == (2.5, 1.0, 9.0)
    assert not timing.host_bound
    assert timing.record(per=5)["seconds"] == 0.5


def test_a_time_that_is_the_hosts_is_said_to_be() -> None:
    timing = Timing(seconds=1.0, low=1, high=1, dispatch=0.95, samples=1, calls=1)
    assert timing.host_bound and timing.record()["host_bound"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_points_that_no_longer_fit_are_named() -> None:
    clock, records = Clock(), list[dict]()
    session = Session("x", records.append, seconds=10, clock=clock)
    done = []
    for point in session.points([64, 8, 256, 1]):
        done.append(point)
        clock.now += 4
    assert done == [64, 8], "a third would end at 12"
    assert records == [{"section": "x", "kind": "skipped", "points": ["256", "1"]}]


def test_points_are_named_shortly() -> None:
    records: list[dict] = []
    cases = hard_cases.lora_cases(TINY)[:1] + hard_cases.attention_cases(TINY)[:1]
    todo = [*cases, (8, TINY.step_mixes[0]), 64]
    assert list(Session("x", records.append, seconds=-1).points(todo)) == []
    assert records[0]["points"] == [
        "lora, every row its own adapter", "attention, decode", "8, 2 x 4", "64"
    ]  # fmt: skip


def test_what_is_no_number_is_recorded_as_none() -> None:
    records: list[dict] = []
    session = Session("x", records.append, seconds=10)
    session.emit("y", error=float("inf"), inside={"a": [float("nan"), 1.5]}, name="inf")
    assert records == [{"section": "x", "kind": "y", "error": None, "inside": {"a": [None, 1.5]},
                        "name": "inf"}]  # fmt: skip


def test_a_point_that_fails_is_recorded_and_the_next_runs() -> None:
    records: list[dict] = []
    session = Session("x", records.append, seconds=10)

    def fail() -> None:
        raise NotImplementedError("no such kernel")

    assert not session.attempt("first", fail)
    assert session.attempt("second", lambda: None)
    assert records[0]["what"] == "first" and "no such kernel" in records[0]["error"]


def test_gaps_between_kernels() -> None:
    # 0..10, 5..12 on another stream, 20..30, 22..25 inside it; two calls
    found = gaps.measure([(20e9, 30e9), (0.0, 10e9), (5e9, 12e9), (22e9, 25e9)], calls=2)
    assert found == gaps.Gaps(kernels=2, span=15, busy=11, idle=4)
    assert gaps.measure([], calls=2) is None


def test_a_profile_without_a_gpu_is_unreadable() -> None:
    assert gaps.profile(lambda: jnp.ones(8) + np.float32(1), calls=2) is None


@pytest.mark.parametrize("start", [0, 1e12])
def test_kernels_without_gaps(start: float) -> None:
    found = gaps.measure([(start, start + 1e9), (start + 1e9, start + 3e9)], calls=1)
    assert found is not None and found.idle == pytest.approx(0) and found.busy == pytest.approx(3)
