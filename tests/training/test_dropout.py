"""Masks have the shares that were asked for, and a row's is its own."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.training.dropout import dropped

T, WIDTH = 96, 256


def masks(shares: list[float], seeds: list[int], number: int) -> np.ndarray:
    """True where something is left, by row."""
    ones = jnp.ones((len(seeds), T, WIDTH))
    share, seed = jnp.array(shares, jnp.float32), jnp.array(seeds, jnp.uint32)
    return np.asarray(dropped(ones, share, seed, jnp.int32(number))) > 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.floats(0.1, 0.9))
def test_the_share_is_met_in_every_row_and_column(seed: int, number: int, share: float) -> None:
    (kept,) = masks([share], [seed], number)
    for axis, n in ((None, T * WIDTH), (0, T), (1, WIDTH)):
        spread = np.sqrt(share * (1 - share) / n)
        assert np.abs(kept.mean(axis) - (1 - share)).max() <= 6 * spread + 1e-6


def test_masks_of_rows_modules_and_neighbours_are_independent() -> None:
    half = masks([0.5] * 3, [1, 2, 3], 0)
    others = masks([0.5] * 3, [1, 2, 3], 1)
    pairs = [(half[0], half[1]), (half[1], half[2]), (half[0], others[0]), (half[0], others[1])]
    pairs += [(half[0][1:], half[0][:-1]), (half[0][:, 1:], half[0][:, :-1])]
    for one, other in pairs:
        assert abs((one == other).mean() - 0.5) < 6 * 0.5 / np.sqrt(one.size)


def test_a_row_has_its_mask_beside_any_other() -> None:
    alone = masks([0.3], [7], 5)[0]
    assert (masks([0.9, 0.3], [3, 7], 5)[1] == alone).all()


def test_what_is_left_grows_and_without_dropout_nothing_changes() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)), jnp.float32)
    share, seed = jnp.array([0.0, 0.5]), jnp.array([1, 2], jnp.uint32)
    made = np.asarray(dropped(x, share, seed, jnp.int32(0)))
    assert (made[0] == x[0]).all()
    assert np.isin(made[1] / np.asarray(x[1]), (0, 2)).all()
