"""Answer lengths against distributions whose quantiles are known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.schedule import lengths
from jslora.schedule.lengths import Lengths

MOST = 100_000

Draw = Callable[[np.random.Generator, int], np.ndarray]

SHAPES: dict[str, Draw] = {
    "geometric": lambda random, n: random.geometric(1 / 150, n),
    "uniform": lambda random, n: random.integers(8, 513, n),
    "lognormal": lambda random, n: np.ceil(random.lognormal(5, 0.8, n)).astype(int),
    "short": lambda random, n: random.integers(1, 7, n),
    "two": lambda random, n: np.where(random.random(n) < 0.5, 10, 700),
}


def learned(draws: np.ndarray, limits: np.ndarray | None = None, quantile: float = 0.8) -> Lengths:
    """What is known after so many answers, each cut off at its limit."""
    model = Lengths(quantile)
    limits = np.full(len(draws), MOST) if limits is None else limits
    for length, limit in zip(draws.tolist(), limits.tolist(), strict=True):
        model.ended("a", min(length, limit), cut=length > limit)
    return model


def outlived(shape: str, length: int, given_above: int = 0) -> float:
    """Share of true answers above `given_above` that are longer than `length`."""
    draws = SHAPES[shape](np.random.default_rng(99), 200_000)
    return float((draws > length).sum() / (draws > given_above).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.9])
def test_the_quantile_is_found(shape: str, quantile: float) -> None:
    model = learned(SHAPES[shape](np.random.default_rng(1), 3000), quantile=quantile)
    estimate = model.expected("a", 0, MOST)
    # A bucket is 19 % wide; 512 answers tell shares to 2 %.
    assert outlived(shape, int(estimate * 1.19) + 1) <= 1 - quantile + 0.05
    assert outlived(shape, int(estimate / 1.19) - 1) >= 1 - quantile - 0.05


@pytest.mark.parametrize("shape", ["geometric", "uniform", "lognormal"])
def test_cut_answers_do_not_shorten_the_estimate(shape: str) -> None:
    """Most are cut, at random limits; the plain quantile of what was seen is far below."""
    random = np.random.default_rng(2)
    draws, limits = SHAPES[shape](random, 6000), np.ceil(random.exponential(130, 6000)).astype(int)
    assert (draws > limits).mean() > 0.5
    estimate = learned(draws, limits, 0.7).expected("a", 0, MOST)
    assert 0.2 < outlived(shape, estimate) < 0.4
    assert outlived(shape, int(np.quantile(np.minimum(draws, limits), 0.7))) > 0.45


@pytest.mark.parametrize("shape", ["geometric", "uniform", "lognormal"])
@pytest.mark.parametrize("generated", [1, 50, 130, 300])
def test_what_is_there_already_counts(shape: str, generated: int) -> None:
    model = learned(SHAPES[shape](np.random.default_rng(3), 3000), quantile=0.5)
    share = outlived(shape, model.expected("a", generated, MOST), generated)
    assert 0.4 < share < 0.6


def test_beyond_all_that_was_seen_the_limit_holds() -> None:
    model = learned(np.full(1000, 100))
    assert 84 < model.expected("a", 0, MOST) <= 119
    assert model.expected("a", 500, MOST) == MOST
    every_one_cut = learned(np.full(1000, 100), np.full(1000, 50))
    assert every_one_cut.expected("a", 0, MOST) == MOST


def test_within_a_bucket_only_what_is_left_of_it_counts() -> None:
    """Answers of 100 tokens end evenly over their bucket, as far as anybody knows."""
    model = learned(np.full(1000, 100), quantile=0.5)
    at = [model.expected("a", generated, MOST) for generated in (96, 100, 104, 108)]
    assert at[1] - at[0] == pytest.approx(2, abs=1) and at[3] - at[2] == pytest.approx(2, abs=1)
    assert at[1] > 104


def test_adapters_differ_and_a_new_one_is_as_all_are() -> None:
    model, random = Lengths(0.7), np.random.default_rng(4)
    for _ in range(600):
        model.ended("short", int(random.integers(5, 15)), cut=False)
        model.ended("long", int(random.integers(900, 1100)), cut=False)
    assert 10 <= model.expected("short", 0, MOST) <= 14
    assert 950 <= model.expected("long", 0, MOST) <= 1180
    assert 850 <= model.expected("new", 0, MOST) <= 1100
    assert model.expected("new", 20, MOST) >= model.expected("new", 0, MOST)
    for _ in range(40):
        model.ended("new", 200, cut=False)
    assert 180 <= model.expected("new", 0, MOST) <= 240


def test_news_of_itself_and_of_others_are_taken_in() -> None:
    model = learned(np.full(1000, 1000), quantile=0.5)
    model.ended("b", 1000, cut=False)
    assert model.expected("b", 0, MOST) > 800
    for _ in range(20):
        model.ended("b", 20, cut=False)
    assert model.expected("b", 0, MOST) <= 20
    model.ended("c", 1000, cut=False)
    assert model.expected("c", 0, MOST) > 800
    for _ in range(2000):
        model.ended("a", 20, cut=False)
    assert model.expected("c", 0, MOST) <= 20


def test_old_behaviour_is_forgotten() -> None:
    model = learned(np.full(5000, 1000))
    for _ in range(3000):
        model.ended("a", 20, cut=False)
    assert 17 <= model.expected("a", 0, MOST) <= 20
    for _ in range(3000):
        model.ended("a", 1000, cut=False)
    assert 900 <= model.expected("a", 0, MOST) <= 1100


def test_names_without_end_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "MAX_ADAPTERS", 3)
    model = Lengths(0.5)
    for n in range(40):
        model.ended(f"name {n}", 10, cut=False)
        model.ended("busy", 1000, cut=False)
        model.expected(f"asked {n}", 0, MOST)
    assert set(model._tables) == {"name 38", "name 39", "busy"}
    assert model._tables["busy"].count == 40, "it was forgotten between"


ANSWERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 2**20) | st.integers(0, 40), st.booleans()),
    max_size=30,
)


@settings(deadline=None)
@given(
    answers=ANSWERS, quantile=st.sampled_from([1e-18, 0.1, 0.5, 0.99, 1 - 1e-13]),
    most=st.integers(0, 60) | st.integers(0, 2**21), parts=st.lists(st.floats(0, 1), max_size=10),
)  # fmt: skip
def test_an_estimate_is_always_in_range(
    answers: list[tuple[str, int, bool]], quantile: float, most: int, parts: list[float]
) -> None:
    model = Lengths(quantile)
    assert model.expected("a", 0, most) == most
    for adapter, tokens, cut in answers:
        model.ended(adapter, tokens, cut=cut)
        before = 0
        for generated in sorted({int(part * most) for part in [*parts, 1.0]}):
            estimate = model.expected("a", generated, most)
            assert generated < estimate <= most or estimate == generated == most
            assert estimate >= before, "it shrank as the answer grew"
            before = estimate
