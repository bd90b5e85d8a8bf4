"""Norms and singular values of products of thin factors, against dense matrices."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.adapters.peft import Factors
from jslora.adapters.tools.combine import Part, combine, common_base
from jslora.adapters.tools.fit import fit, total_error
from jslora.adapters.tools.low_rank import (
    distance,
    norm,
    relative_error,
    smallest_rank,
    svd,
    truncated,
)
from jslora.adapters.writer import Target
from jslora.errors import AdapterRejected, ConfigError

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 2**32 - 1)
Q: Target = (0, "q_proj")


class FakeAdapter:
    """The two things of an `Adapter` that sums look at."""

    def __init__(self, factors: dict[Target, Factors], base_model: str | None = None) -> None:
        self.factors, self.base_model = factors, base_model


def _draw(
    shape: tuple[int, int, int], seed: int, dtype: type = np.float32, decay: float = 1.0
) -> Factors:
    """[r, in] and [out, r]; each rank counts `decay` times the one before."""
    r, wide_in, wide_out = shape
    random = np.random.default_rng(seed)
    a = random.normal(size=(r, wide_in)) * decay ** np.arange(r)[:, None]
    b, scale = random.normal(size=(wide_out, r)), np.float32(random.uniform(-3, 3))
    return Factors(a.astype(dtype), b.astype(dtype), scale)


def _dense(factors: Factors) -> np.ndarray:
    a, b, scale = (np.asarray(part, np.float64) for part in factors)
    return scale * (b @ a)


@settings(deadline=None)
@given(SHAPES, SEEDS, st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_everything_is_that_of_the_dense_delta(
    shape: tuple[int, int, int], seed: int, dtype: type
) -> None:
    one, other = _draw(shape, seed, dtype), _draw((3, *shape[1:]), seed + 1)
    dense, off = _dense(one), _dense(one) - _dense(other)
    np.testing.assert_allclose(norm(one), np.linalg.norm(dense), rtol=1e-12)
    np.testing.assert_allclose(distance(one, other), np.linalg.norm(off), rtol=1e-12)
    expected = np.linalg.norm(off) / np.linalg.norm(dense)
    np.testing.assert_allclose(relative_error(one, other), expected, rtol=1e-12)
    values = np.linalg.svd(dense / np.float64(one.scale), compute_uv=False)
    found = svd(one)
    np.testing.assert_allclose(
        found.values, values[: len(found.values)], rtol=1e-9, atol=1e-12 * values[0]
    )
    for rank in range(1, len(found.values) + 1):
        cut = truncated(found, rank, one.scale)
        assert len(cut.a) == rank
        nearest = np.linalg.norm(values[rank:]) * abs(np.float64(one.scale))
        np.testing.assert_allclose(
            np.linalg.norm(_dense(cut) - dense), nearest, rtol=1e-6, atol=1e-12 * norm(one)
        )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(1e-6, 0.99))
def test_the_smallest_rank_is_smallest(values: list[float], error: float) -> None:
    ordered = np.sort(np.array(values))[::-1]

    def left_out(rank: int) -> float:
        whole = np.linalg.norm(ordered)
        return float(np.linalg.norm(ordered[rank:]) / whole) if whole else 0.0

    rank = smallest_rank(ordered, error)
    assert 1 <= rank <= len(values)
    assert left_out(rank) <= error * (1 + 1e-9)
    assert rank == 1 or left_out(rank - 1) >= error * (1 - 1e-9)


# Sums --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)),
        min_size=1,
        max_size=4,
    ),
    SEEDS,
)
def test_a_sum_is_that_of_the_dense_deltas(parts: list[tuple[int, float]], seed: int) -> None:
    drawn = [(_draw((rank, 9, 7), seed + i), weight) for i, (rank, weight) in enumerate(parts)]
    found = combine([Part("x", FakeAdapter({Q: f}), weight) for f, weight in drawn])[Q]
    assert len(found.a) == sum(rank for rank, _ in parts)
    expected = sum(weight * _dense(factors) for factors, weight in drawn)
    size = sum(abs(weight) * norm(factors) for factors, weight in drawn)
    rtol = 1e-7 if len(parts) == 1 else 1e-14  # one scale is rounded to float32
    assert np.linalg.norm(_dense(found) - expected) <= rtol * size


def test_a_sum_covers_what_any_part_targets_and_leaves_the_rest_as_it_was() -> None:
    k: Target = (1, "k_proj")
    one, other = _draw((2, 8, 8), 0, ml_dtypes.bfloat16), _draw((3, 8, 8), 1)
    found = combine(
        [Part("a", FakeAdapter({Q: one})), Part("b", FakeAdapter({Q: other, k: other}), 0.5)]
    )
    assert found.keys() == {Q, k} and len(found[Q].a) == 5
    assert found[k].a is other.a and found[k].b is other.b
    assert found[k].scale == other.scale / 2


@pytest.mark.parametrize("weight", [0.0, np.nan, np.inf, 1e4])
def test_weights_of_no_use_are_refused(weight: float) -> None:
    part = Part("sql", FakeAdapter({Q: _draw((1, 2, 2), 0)}), weight)
    with pytest.raises(ConfigError, match="the weight of sql is "):
        combine([part])


@pytest.mark.parametrize("scale", [0.0, 1e-42, 3e38])
def test_scales_by_which_nothing_can_be_divided_are_multiplied_in(scale: float) -> None:
    one = _draw((2, 4, 4), 0)._replace(scale=np.float32(scale))
    other = _draw((1, 4, 4), 1)
    found = combine([Part("a", FakeAdapter({Q: one}), 3.0), Part("b", FakeAdapter({Q: other}))])[Q]
    expected = 3 * _dense(one) + _dense(other)
    np.testing.assert_allclose(_dense(found), expected, rtol=1e-12)


def test_bases_of_other_names_do_not_meet() -> None:
    parts = [Part(name, FakeAdapter({}, base)) for name, base in (("a", "x"), ("b", None))]
    assert common_base(parts) == "x" and common_base(parts[1:]) is None
    with pytest.raises(AdapterRejected, match="several bases: a for x, c for y"):
        common_base([*parts, Part("c", FakeAdapter({}, "y"))])


# What is stored ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(SHAPES, SEEDS, st.floats(0.2, 1.0), st.floats(0.02, 0.9), st.sampled_from([None, "float16"]))
def test_the_error_told_is_that_of_what_is_stored_and_no_more_than_asked(
    shape: tuple[int, int, int], seed: int, decay: float, error: float, name: str | None
) -> None:
    meant = {Q: _draw(shape, seed, decay=decay), (1, "k_proj"): _draw(shape, seed + 1)}
    stored, layers = fit(meant, np.dtype(name) if name else None, error)
    offs = 0.0
    for target, layer in zip(meant, layers, strict=True):
        made, dense = stored[target], _dense(meant[target])
        off, whole = np.linalg.norm(_dense(made) - dense), np.linalg.norm(dense)
        assert layer.error <= error and layer.rank == len(made.a) <= layer.rank_before
        assert made.a.dtype == made.b.dtype == (name or "float32")
        assert abs(layer.error - off / whole) <= 1e-9
        offs += off**2
        values = np.linalg.svd(dense, compute_uv=False)
        nearest = np.linalg.norm(values[layer.rank - 1 :]) if layer.rank > 1 else whole
        # One rank less was too little, but for what rounding adds.
        assert layer.rank == 1 or nearest > (error - 2e-3) * whole
    wholes = sum(np.linalg.norm(_dense(f)) ** 2 for f in meant.values())
    assert abs(total_error(layers) - np.sqrt(offs / wholes)) <= 1e-9


def test_without_an_error_nothing_changes_but_the_dtype() -> None:
    meant = {Q: _draw((3, 8, 8), 0, ml_dtypes.bfloat16)}
    stored, (layer,) = fit(meant)
    assert stored[Q].a.tobytes() == meant[Q].a.tobytes() and layer.error == 0
    stored, (layer,) = fit(meant, np.dtype(np.float32))
    assert stored[Q].b.dtype == np.float32 and layer.error == 0
    assert np.array_equal(stored[Q].b, meant[Q].b.astype(np.float32))


def test_a_delta_of_zero_keeps_one_rank() -> None:
    zero = Factors(np.ones((4, 8), np.float32), np.zeros((8, 4), np.float32), np.float32(2))
    stored, (layer,) = fit({Q: zero}, error=0.1)
    assert layer.rank == 1 and layer.error == 0 and not stored[Q].b.any()


def test_errors_that_cannot_be_had_are_refused() -> None:
    meant = {(7, "down_proj"): _draw((4, 32, 32), 0)}
    for error in (0.0, 1.0, -0.5, np.nan):
        with pytest.raises(ConfigError, match="the error is "):
            fit(meant, error=error)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    with pytest.raises(
        ConfigError, match=r"0\.0001 cannot be had in bfloat16: .* layer 7's down_proj by 0\.00"
    ):
        fit(meant, bfloat16, 1e-4)
