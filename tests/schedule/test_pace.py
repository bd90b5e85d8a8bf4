"""The pace of prompts beside decoding rows, on machines whose cost of a step is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.schedule.pace import Pace

LARGEST = 512

Machine = Callable[[int], float]

MACHINES: dict[str, Machine] = {
    "line": lambda tokens: 0.005 + 1e-4 * tokens,
    "powers of two": lambda tokens: 0.005 + 1e-4 * 2 ** math.ceil(math.log2(tokens)),
    "tiles of 64": lambda tokens: 0.005 + 1e-4 * 64 * math.ceil(tokens / 64),
    "memory, then arithmetic": lambda tokens: max(0.012, 0.002 + 1e-4 * tokens),
}


def serve(
    pace: Pace, machine: Machine, steps: int, *, mixed: float = 1.0, noise: float = 0.0,
    waits: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Steps with prompts in them, as fast as the pace allows: (tokens, seconds without waits).

    Args:
        mixed: share of steps for which there are prompts.
        noise: standard deviation of a step's time, as a share of it.
        waits: share of steps that take ten times as long for another reason.
    """
    random, told = np.random.default_rng(5), []
    for _ in range(steps):
        tokens = rows = int(random.integers(20, 60))
        if random.random() < mixed:
            tokens += pace.prefill_tokens(rows, LARGEST, 1)
        seconds = machine(tokens) * max(0.5, 1 + noise * random.standard_normal())
        pace.took(tokens, rows, seconds * (10 if random.random() < waits else 1))
        if tokens > rows:
            told.append((tokens, seconds))
    return np.array(told)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("target", [0.02, 0.03, 0.05])
@pytest.mark.parametrize(
    ("mixed", "noise", "waits"), [(1, 0, 0), (1, 0.05, 0.02), (0.2, 0.05, 0.02)]
)
def test_few_steps_are_late_and_little_is_left_unused(
    name: str, target: float, mixed: float, noise: float, waits: float
) -> None:
    machine = MACHINES[name]
    steps = serve(Pace(target), machine, 1500, mixed=mixed, noise=noise, waits=waits)
    tokens, seconds = steps[len(steps) // 10 :].T
    assert (seconds > 1.1 * target).mean() < 0.05
    best = max(n for n in range(1, LARGEST) if machine(n) <= target)
    assert tokens.mean() > 0.6 * best  # a line through steps may see the next step too early


@pytest.mark.parametrize("change", [3.0, 1 / 3])
def test_a_machine_that_changes_is_followed(change: float) -> None:
    machine = MACHINES["line"]
    pace = Pace(0.05)
    serve(pace, machine, 500)
    tokens, seconds = serve(pace, lambda n: change * machine(n), 500)[100:].T
    assert (seconds > 1.1 * 0.05).mean() < 0.05
    best = (0.05 / change - 0.005) / 1e-4
    assert tokens.mean() > 0.75 * min(best, LARGEST)


def test_a_first_step_that_compiles_is_forgotten() -> None:
    pace = Pace(0.03)
    pace.took(40, 40, 20.0)
    assert pace.prefill_tokens(40, LARGEST, 8) == 8
    tokens, seconds = serve(pace, MACHINES["line"], 100)[10:].T
    assert (seconds <= 1.1 * 0.03).all() and tokens.mean() > 180


def test_what_prompts_cost_outlives_a_time_without_them() -> None:
    pace = Pace(0.05)
    serve(pace, MACHINES["line"], 200)
    before = pace.prefill_tokens(40, LARGEST, 1)
    serve(pace, MACHINES["line"], 1000, mixed=0.0)
    assert pace.prefill_tokens(40, LARGEST, 1) == pytest.approx(before, rel=0.1)


def test_a_step_far_larger_than_any_before_is_not_tried() -> None:
    """Decoding steps of about one size tell nothing of what tokens cost, whatever their noise."""
    pace = Pace(10.0)
    for rows, seconds in [(40, 0.012), (41, 0.011), (42, 0.010)] * 20:
        pace.took(rows, rows, seconds)
    assert pace.prefill_tokens(40, 5000, 1) <= 2 * 42 - 40


def test_all_is_free_without_target_rows_or_knowledge() -> None:
    assert Pace(0.01).prefill_tokens(30, 300, 1) == 300
    slow, free = Pace(0.01), Pace(None)
    for pace in (slow, free):
        pace.took(100, 100, 5.0)
    assert slow.prefill_tokens(0, 300, 1) == 300
    assert slow.prefill_tokens(1, 300, 1) == 1
    assert free.prefill_tokens(30, 300, 1) == 300


STEP = st.tuples(st.integers(0, 600), st.integers(1, 64), st.floats(0, 1e3))


@settings(deadline=None)
@given(
    steps=st.lists(STEP, max_size=80), targets=st.lists(st.floats(1e-4, 1e3), min_size=2),
    rows=st.integers(0, 64), at_most=st.integers(0, 600), at_least=st.integers(0, 64),
)  # fmt: skip
def test_bounds_hold_and_a_larger_target_never_gives_less(
    steps: list[tuple[int, int, float]], targets: list[float], rows: int, at_most: int,
    at_least: int,
) -> None:  # fmt: skip
    given_out = []
    for target in sorted(targets):
        pace = Pace(target)
        for prompt, decoding, seconds in steps:
            pace.took(prompt + decoding, decoding, seconds)
        given_out.append(pace.prefill_tokens(rows, at_most, at_least))
        assert min(at_least, at_most) <= given_out[-1] <= at_most
    assert given_out == sorted(given_out)
