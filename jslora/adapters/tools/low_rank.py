"""Linear algebra of weight deltas that are products of thin factors; no delta is ever made dense.

All is float64, and of Δ = scale · B A, with B [out, r] and A [r, in]. Norms are Frobenius norms, by
the triangular factors of QR decompositions, which hold everything of a product but its directions:
‖B A‖ = ‖R_B R_Aᵀ‖. The singular values of a product are those of that small core (so Golub and
Van Loan, "Matrix Computations", section 5.4, of a tall matrix). Host only: no jax.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jslora.adapters.peft import Factors


class Svd(NamedTuple):
    """B A = left · diag(values) · right; columns of `left` and rows of `right` are orthonormal."""

    left: Float64[np.ndarray, "out k"]
    values: Float64[np.ndarray, "k"]
    right: Float64[np.ndarray, "k in"]


def norm(factors: Factors) -> float:
    """‖Δ‖."""
    return _norm(factors.b * np.float64(factors.scale), factors.a.astype(np.float64))


def distance(one: Factors, other: Factors) -> float:
    """‖Δ₁ − Δ₂‖, of deltas of the same shape; exactly 0 where all numbers are equal."""
    factors_equal = np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
    if factors_equal and one.scale == other.scale:
        return 0.0
    ups = [one.b * np.float64(one.scale), other.b * -np.float64(other.scale)]
    downs = [one.a.astype(np.float64), other.a.astype(np.float64)]
    return _norm(np.concatenate(ups, axis=1), np.concatenate(downs))


def relative_error(meant: Factors, made: Factors) -> float:
    """‖Δ_made − Δ_meant‖ / ‖Δ_meant‖."""
    return share(distance(meant, made), norm(meant))


def share(off: float, whole: float) -> float:
    """off / whole; of a whole that is zero, 0 or infinite."""
    return off / whole if whole > 0 else (math.inf if off > 0 else 0.0)


def svd(factors: Factors) -> Svd:
    """The singular value decomposition of B A, without the scale."""
    q_up, r_up = np.linalg.qr(factors.b.astype(np.float64))
    q_down, r_down = np.linalg.qr(factors.a.astype(np.float64).T)
    left, values, right = np.linalg.svd(r_up @ r_down.T)
    return Svd(q_up @ left[:, : len(values)], values, right[: len(values)] @ q_down.T)


def smallest_rank(values: Float64[np.ndarray, "k"], error: float) -> int:
    """The least rank, from 1 on, that leaves out at most the share `error` of the norm."""
    squares = np.square(values)
    left_out = squares[::-1].cumsum()[::-1]  # by rank: what the values from there on hold
    fits = left_out <= error**2 * left_out[0]
    return max(1, int(fits.argmax()) if fits.any() else len(values))


def truncated(whole: Svd, rank: int, scale: np.float32) -> Factors:
    """The nearest delta of this rank, shared evenly between A and B."""
    root = np.sqrt(whole.values[:rank])
    return Factors(root[:, None] * whole.right[:rank], whole.left[:, :rank] * root, scale)


def _norm(up: Float64[np.ndarray, "out r"], down: Float64[np.ndarray, "r in"]) -> float:
    core = np.linalg.qr(up, mode="r") @ np.linalg.qr(down.T, mode="r").T
    return float(np.linalg.norm(core))
