"""Both operations straight off their definitions, in float64 on the host."""

import numpy as np
from jaxtyping import Float, Float64


def delta(
    x: Float[np.ndarray, "t in"],
    a: Float[np.ndarray, "R in"],
    b: Float[np.ndarray, "R out"],
    scale: float,
) -> Float64[np.ndarray, "t out"]:
    """What one adapter adds to a module's output for tokens of its own."""
    low = x.astype(np.float64) @ a.astype(np.float64).T
    return scale * (low @ b.astype(np.float64))


def gated(y: Float[np.ndarray, "t twice"]) -> Float64[np.ndarray, "t half"]:
    """SiLU of the first half of the columns, times the second."""
    gate, up = np.split(y.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def attend(
    q: Float[np.ndarray, "t N D"], kv: Float[np.ndarray, "s 2 K D"], scale: float
) -> Float64[np.ndarray, "t N D"]:
    """Causal attention of the last t tokens of a sequence of s."""
    t, (s, _, kv_heads, _) = len(q), kv.shape
    keys, values = np.moveaxis(kv.astype(np.float64), 1, 0)
    query = q.astype(np.float64).reshape(t, kv_heads, -1, q.shape[2])
    scores = scale * np.einsum("tkgd,skd->kgts", query, keys, optimize=True)
    hidden = np.arange(s)[None] > (s - t + np.arange(t))[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("kgts,skd->tkgd", weights, values, optimize=True).reshape(q.shape)


def worst(found: np.ndarray, wanted: np.ndarray, tokens: np.ndarray) -> float:
    """Largest relative error of a token, by the norm of all its numbers; NaN is infinite."""
    if not tokens.size:
        return 0.0
    off = found.astype(np.float64)[tokens] - wanted[tokens]
    flat = off.reshape(len(tokens), -1), wanted[tokens].reshape(len(tokens), -1)
    norms = [np.linalg.norm(each, axis=1) for each in flat]
    return float(np.nan_to_num(np.max(norms[0] / norms[1]), nan=np.inf))
