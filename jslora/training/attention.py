"""Attention of packed rows: causal, and within each token's own example.

Scores are made anew for the gradient, so that what is kept is one number a query and head, not one
a pair of tokens. Queries are taken in tiles, each with the keys that an example can have which
reaches into it: with short examples the cost is in proportion to their length and not to the row's,
or to a tile, which is a 32nd of a row of more than 2,048 tokens.
Operands of products are rounded to the dtype of q, k and v; scores and sums are float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jslora.training.products import dot

_TILE = 64  # queries; tiles of long rows are larger
_TILES = 32  # of a row at most: each is compiled on its own
_NEVER = -1e30


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segment: Int32[Array, "B T"],
    longest: int,
) -> Float[Array, "B T N D"]:
    """Heads' outputs; those of padding, segment 0, are finite.

    Heads of a group share a kv head (arXiv 2305.13245).

    Args:
        longest: tokens in the longest example.
    """
    return _forward(q, k, v, segment, longest)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, longest: int
) -> tuple[Array, tuple[Array, ...]]:
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
    outs, sums = [], []
    for first, start, end in _tiles(q.shape[1], longest):
        own, mask = queries[..., start:end, :], _mask(segment, first, start, end)
        scores = _scores(own, keys[:, :, first:end], mask)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top).astype(q.dtype)
        total = weights.astype(jnp.float32).sum(-1, keepdims=True)
        out = _weighted(weights, values[:, :, first:end]) / total
        outs.append(out.astype(q.dtype))
        sums.append(top + jnp.log(total))
    out, log_sum = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
    return _by_token(out), (queries, keys, values, segment, out, log_sum)


def _backward(longest: int, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segment, out, log_sum = kept
    g = _by_head(g, k.shape[1])
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, start, end in _tiles(q.shape[3], longest):
        own, keys, values = q[..., start:end, :], k[:, :, first:end], v[:, :, first:end]
        g_own = g[..., start:end, :]
        scores = _scores(own, keys, _mask(segment, first, start, end))
        weights = jnp.exp(scores - log_sum[..., start:end, :])
        slopes = dot("bkgtd,bksd->bkgts", g_own, values) - mean[..., start:end, :]
        slopes = (weights * slopes * _scale(q)).astype(q.dtype)
        dq.append(_weighted(slopes, keys).astype(q.dtype))
        dk = dk.at[:, :, first:end].add(dot("bkgts,bkgtd->bksd", slopes, own))
        dv = dv.at[:, :, first:end].add(dot("bkgts,bkgtd->bksd", weights.astype(q.dtype), g_own))
    flat = [_by_token(x[:, :, None].astype(q.dtype)) for x in (dk, dv)]
    return _by_token(jnp.concatenate(dq, 3)), flat[0], flat[1], None


attention.defvjp(_forward, _backward)


def _tiles(length: int, longest: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each tile of queries."""
    tile = -(-length // (_TILES * _TILE)) * _TILE
    back = -(-(longest - 1) // tile) * tile
    starts = range(0, length, tile)
    return [(max(0, start - back), start, min(start + tile, length)) for start in starts]


def _mask(segment: Int32[Array, "B T"], first: int, start: int, end: int) -> Float[Array, "B t S"]:
    """What is added to a score: nothing where a query may see the key, else `_NEVER`."""
    same = segment[:, start:end, None] == segment[:, None, first:end]
    seen = same & (jnp.arange(start, end)[:, None] >= jnp.arange(first, end))
    # Made once for all heads: fused into what reads it, comparing takes longer than exponentials.
    return lax.optimization_barrier(jnp.where(seen, 0.0, _NEVER))


def _scores(
    q: Float[Array, "B K G t D"], k: Float[Array, "B K S D"], mask: Float[Array, "B t S"]
) -> Float[Array, "B K G t S"]:
    """Scaled and masked."""
    return dot("bkgtd,bksd->bkgts", q, k) * _scale(q) + mask[:, None, None]


def _scale(q: Array) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _weighted(weights: Float[Array, "B K G t S"], v: Array) -> Float[Array, "B K G t D"]:
    return dot("bkgts,bksd->bkgtd", weights, v)


def _by_head(x: Float[Array, "B T h D"], groups: int | None = None) -> Array:
    """[B, h, T, D], or [B, K, h/K, T, D] for `groups` kv heads."""
    x = jnp.swapaxes(x, 1, 2)
    if groups is None:
        return x
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _by_token(x: Float[Array, "B K G T D"]) -> Float[Array, "B T h D"]:
    B, K, G, T, D = x.shape
    return jnp.swapaxes(x.reshape(B, K * G, T, D), 1, 2)
