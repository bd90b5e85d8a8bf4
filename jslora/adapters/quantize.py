"""Weights as small integers with a scale for each group, and the words in which they are kept.

Rounding is to the nearest, symmetric about zero. A group's scale is the one of a few that leaves
the least squared error: the largest weight over the largest integer, and for 4 bits somewhat less
than that, which cuts the largest off and rounds all others more finely. How words hold integers
`pallas_kernels.lora.pieces` says. Host only: no jax.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from pallas_kernels.lora.pieces import BITS, LARGEST, packed_in_word, scale_groups

_TRIED = {"int8": (1.0,), "int4": (1.0, 0.92, 0.84, 0.76)}
"""Shares of the largest weight that the largest integer may stand for."""

_UNSIGNED: dict[int, np.dtype] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


class Quantized(NamedTuple):
    """Rows of integers, and their groups' scales in the dtype of what they stand for."""

    integers: Int8[np.ndarray, "r n"]
    scales: Float[np.ndarray, "r G"]

    @property
    def numbers(self) -> Float[np.ndarray, "r n"]:
        """What they stand for: in float32, rounded once to the scales' dtype."""
        grouped = self.integers.reshape(*self.scales.shape, -1).astype(np.float32)
        grouped *= self.scales.astype(np.float32)[..., None]
        return grouped.reshape(self.integers.shape).astype(self.scales.dtype)


def quantize(
    rows: Float[np.ndarray, "r n"], storage: str, dtype: np.dtype, parts: int = 1
) -> Quantized:
    """Round rows of finite numbers.

    Args:
        dtype: the pool's.
        parts: equal ones that a row is split into, each of which has groups of its own.
    """
    r, n = rows.shape
    groups, largest = parts * scale_groups(n // parts, storage), LARGEST[storage]
    grouped = rows.astype(np.float32).reshape(r, groups, n // groups)
    most = np.abs(grouped).max(axis=2, initial=0)
    best = _round(grouped, most, largest, dtype)
    if len(_TRIED[storage]) > 1:
        error = _squared_error(grouped, *best)
        for share in _TRIED[storage][1:]:
            other = _round(grouped, share * most, largest, dtype)
            found = _squared_error(grouped, *other)
            better = found < error
            best[0][better], best[1][better] = other[0][better], other[1][better]
            error = np.minimum(error, found)
    integers, scales = best
    return Quantized(integers.reshape(r, n), scales)


def _round(
    grouped: Float[np.ndarray, "r G c"], most: Float[np.ndarray, "r G"], largest: int,
    dtype: np.dtype,
) -> tuple[Int8[np.ndarray, "r G c"], Float[np.ndarray, "r G"]]:  # fmt: skip
    """(integers, scales) where the largest integer stands for `most`.

    A scale below the smallest normal number is zero: devices need not tell such numbers from it.
    """
    scales = (most / np.float32(largest)).astype(dtype)
    exact = scales.astype(np.float32)
    scales[exact < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(1, exact, out=np.zeros_like(exact), where=scales != 0)
    integers = np.rint(grouped * inverse[..., None])
    return np.clip(integers, -largest, largest, out=integers).astype(np.int8), scales


def _squared_error(
    grouped: Float[np.ndarray, "r G c"], integers: np.ndarray, scales: np.ndarray
) -> Float[np.ndarray, "r G"]:
    left = grouped - integers.astype(np.float32) * scales.astype(np.float32)[..., None]
    return np.einsum("rgc,rgc->rg", left, left)


class Changes:
    """What rounding changes the deltas of an adapter by, added up over its modules."""

    def __init__(self) -> None:
        self._changed = self._total = 0.0

    def add(
        self, given: Sequence[np.ndarray], rounded: Sequence[np.ndarray], scale: np.float32
    ) -> None:
        """Note (A, B transposed) of one module and what they became.

        The squared norm of B A is the sum over the products of the two Gram matrices. That of the
        difference is taken of (B - B') A + B' (A - A'), where nothing large cancels. Factors are
        divided by their largest weights first, whose fourth powers float32 might not hold.
        """
        most = [float(np.abs(f).max(initial=0)) or 1.0 for f in given]
        a, b, a_after, b_after = (
            f.astype(np.float32) / np.float32(size)
            for f, size in zip((*given, *rounded), 2 * most, strict=True)
        )
        left, right = np.concatenate([b - b_after, b_after]), np.concatenate([a, a - a_after])
        weight = (float(scale) * most[0] * most[1]) ** 2
        self._changed += weight * float(np.sum((left @ left.T) * (right @ right.T)))
        self._total += weight * float(np.sum((b @ b.T) * (a @ a.T)))

    @property
    def error(self) -> float:
        """Root mean square of the change as a share of the deltas', for independent inputs."""
        return math.sqrt(max(self._changed, 0.0) / self._total) if self._total > 0 else 0.0


def to_words(integers: Int8[np.ndarray, "r n"], storage: str, dtype: np.dtype) -> np.ndarray:
    """Integers packed into words, [r, n / k], which are called numbers of the pool's dtype."""
    kind, bits = _UNSIGNED[dtype.itemsize], BITS[storage]
    k = packed_in_word(storage, 8 * dtype.itemsize)
    lanes = integers.view(np.uint8).reshape(len(integers), k, -1).astype(kind)
    lanes &= kind.type(2**bits - 1)
    words = lanes[:, 0]
    for lane in range(1, k):
        words = words | lanes[:, lane] << kind.type(lane * bits)
    return words.view(dtype)


def from_words(words: np.ndarray, storage: str) -> Int8[np.ndarray, "r n"]:
    """What `to_words` packed; `words` are contiguous."""
    kind, bits = _UNSIGNED[words.dtype.itemsize], BITS[storage]
    k = packed_in_word(storage, 8 * words.dtype.itemsize)
    raw = words.view(kind)
    lanes = [(raw >> kind.type(lane * bits)).astype(np.uint8) << (8 - bits) for lane in range(k)]
    return np.concatenate(lanes, axis=1).view(np.int8) >> (8 - bits)
