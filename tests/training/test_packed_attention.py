"""Attention of packed rows, and its gradients, against all scores at once in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.training.attention import attention

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def rows(lengths: list[list[int]], T: int) -> np.ndarray:
    """Segments of rows with examples of these lengths, then padding."""
    found = np.zeros((len(lengths), T), np.int32)
    for row, examples in zip(found, lengths, strict=True):
        row[: sum(examples)] = np.repeat(np.arange(1, len(examples) + 1), examples)
    return found


def shares(q: np.ndarray, k: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """What each token takes of each other, all heads with keys of their own."""
    scores = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(WIDTH)
    seen = (segment[:, :, None] == segment[:, None]) & np.tri(segment.shape[1], dtype=bool)
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segment: np.ndarray, g: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What the definition says, and by hand its gradients by q, k and v."""
    group = HEADS // KV_HEADS
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    weights = shares(q, wide_k, segment)
    of_weights = np.einsum("btnd,bsnd->bnts", g, wide_v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    of_scores /= np.sqrt(WIDTH)
    of_k = np.einsum("bnts,btnd->bsnd", of_scores, q)
    of_v = np.einsum("bnts,btnd->bsnd", weights, g)
    summed = [x.reshape(*x.shape[:2], KV_HEADS, group, WIDTH).sum(3) for x in (of_k, of_v)]
    out = np.einsum("bnts,bsnd->btnd", weights, wide_v)
    return out, [np.einsum("bnts,bsnd->btnd", of_scores, wide_k), *summed]


@pytest.mark.parametrize(
    ("T", "lengths"),
    [
        (64, [[64], [1, 63]]),
        (65, [[65], [30, 30]]),
        (130, [[66, 64], [130]]),
        (130, [[10] * 13, [17, 40, 60]]),
        (200, [[65] * 3, [129, 1, 64]]),
        (2049, [[300, 65, 130, 700], [64] * 32]),
    ],
)
def test_as_all_scores_at_once(T: int, lengths: list[list[int]]) -> None:
    random, segment = np.random.default_rng(T), rows(lengths, T)
    shapes = [(len(segment), T, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, g = (random.normal(size=shape) for shape in shapes)
    g[segment == 0] = 0  # nothing is learnt from padding
    longest = max(max(examples) for examples in lengths)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, pullback = jax.vjp(lambda *x: attention(*x, jnp.asarray(segment), longest), *arrays)
    (expected, slopes), real = dense(q, k, v, segment, g), segment > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)
    assert np.isfinite(np.asarray(out)).all()
    found = pullback(jnp.asarray(g, jnp.float32))
    for mine, right in zip(found, slopes, strict=True):
        np.testing.assert_allclose(np.asarray(mine), right, atol=2e-5)
