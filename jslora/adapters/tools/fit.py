"""Factors that were worked out → those that a file will hold: rank reduced, cast, and measured.

The error told of a layer is the share of its delta's norm by which what is stored differs from what
was meant, rounding and all, and measured on what is stored. Host only: no jax.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jslora.adapters.peft import Factors, tensor_name
from jslora.adapters.tools.low_rank import (
    distance,
    norm,
    relative_error,
    share,
    smallest_rank,
    svd,
    truncated,
)
from jslora.adapters.writer import Target, as_stored
from jslora.errors import ConfigError
from jslora.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of one layer.

    Attributes:
        rank_before, rank: of what was meant, and stored.
        error: ‖stored − meant‖ / ‖meant‖, of the weight deltas.
        norm, off: ‖meant‖ and ‖stored − meant‖.
    """

    layer: int
    module: str
    rank_before: int
    rank: int
    error: float
    norm: float
    off: float


def fit(
    meant: Mapping[Target, Factors],
    dtype: np.dtype | None = None,
    error: float | None = None,
    progress: Progress = silent,
) -> tuple[dict[Target, Factors], list[Fitted]]:
    """Factors as stored, and what that changed, by target.

    Args:
        dtype: of the stored numbers; by default each tensor keeps its own.
        error: most that a layer may be off, for which it gets the least rank that will do; where
            no lower rank will, and by default, factors are kept.
        progress: told of stage "fit" after each layer.

    Raises:
        ConfigError: `error` is not between 0 and 1, or rounding to `dtype` alone is more.
        AdapterRejected: a number is not finite as a `dtype`.
    """
    if error is not None and not 0 < error < 1:
        raise ConfigError(f"the error is {error:g}; a share above 0 and below 1 is expected")
    stored, told = {}, []
    for done, (target, factors) in enumerate(meant.items(), start=1):
        made = stored[target] = _fit(target, factors, dtype, error)
        told.append(_measured(target, factors, made))
        progress("fit", done, len(meant), "")
    return stored, told


def total_error(layers: Sequence[Fitted]) -> float:
    """The same share of the deltas of all layers together."""
    whole = math.hypot(*(layer.norm for layer in layers))
    off = math.hypot(*(layer.off for layer in layers))
    return share(off, whole)


def _fit(target: Target, meant: Factors, dtype: np.dtype | None, error: float | None) -> Factors:
    kept = _cast(target, meant, dtype or meant.a.dtype, dtype or meant.b.dtype)
    if error is None:
        return kept
    least = relative_error(meant, kept)
    if least > error:
        raise ConfigError(
            f"an error of {error:g} cannot be had in {kept.b.dtype.name}: rounding alone changes "
            f"layer {target[0]}'s {target[1]} by {least:.2g}"
        )
    whole = svd(meant)
    for rank in range(smallest_rank(whole.values, error), len(meant.a)):
        made = _cast(target, truncated(whole, rank, meant.scale), kept.a.dtype, kept.b.dtype)
        if relative_error(meant, made) <= error:
            return made
    return kept


def _cast(target: Target, factors: Factors, a: np.dtype, b: np.dtype) -> Factors:
    return Factors(
        as_stored(tensor_name(*target, "A"), factors.a, a),
        as_stored(tensor_name(*target, "B"), factors.b, b),
        factors.scale,
    )


def _measured(target: Target, meant: Factors, made: Factors) -> Fitted:
    off, whole = distance(meant, made), norm(meant)
    return Fitted(
        *target, rank_before=len(meant.a), rank=len(made.a), error=share(off, whole), norm=whole,
        off=off,
    )  # fmt: skip
