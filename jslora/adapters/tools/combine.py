"""Several adapters as one: the sum of their weighted deltas, its ranks those of all together.

Nothing is approximated: rows of A stand below each other and columns of B beside each other. What
one scale, a float32, cannot say for all is multiplied into B, in float64. Host only: no jax.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jslora.adapters.peft import Adapter, Factors
from jslora.adapters.writer import Target
from jslora.errors import AdapterRejected, ConfigError

MAX_WEIGHT = 1000.0


class Part(NamedTuple):
    """An adapter of a sum; `name` is for errors."""

    name: str
    adapter: Adapter
    weight: float = 1.0


def combine(parts: Sequence[Part]) -> dict[Target, Factors]:
    """Factors of the sum: float64 where several meet, else as they were.

    Raises:
        ConfigError: a weight is zero, or not a number of a usable size.
    """
    assert parts, "a sum of nothing"
    for part in parts:
        if not 0 < abs(part.weight) <= MAX_WEIGHT:
            raise ConfigError(
                f"the weight of {part.name} is {part.weight:g}; at most {MAX_WEIGHT:g} either way, "
                "and not 0"
            )
    meeting: dict[Target, list[tuple[Factors, float]]] = {}
    for part in parts:
        for target, factors in part.adapter.factors.items():
            meeting.setdefault(target, []).append((factors, part.weight))
    return {target: _sum(met) for target, met in meeting.items()}


def common_base(parts: Sequence[Part]) -> str | None:
    """What all of them that name a base call it.

    Raises:
        AdapterRejected: they name several.
    """
    named = {part.adapter.base_model: part.name for part in parts if part.adapter.base_model}
    if len(named) > 1:
        told = ", ".join(f"{name} for {base}" for base, name in named.items())
        raise AdapterRejected(
            f"the adapters were trained for several bases: {told}; if these are one, name it"
        )
    return next(iter(named), None)


def _sum(met: Sequence[tuple[Factors, float]]) -> Factors:
    """The sum at one target; the scale is the first one's, rounded to float32."""
    scales = [np.float64(factors.scale) * weight for factors, weight in met]
    scale = _usable(scales[0])
    if len(met) == 1 and scale is not None:
        return Factors(met[0][0].a, met[0][0].b, scale)
    scale = np.float32(1) if scale is None else scale
    ups = [
        factors.b.astype(np.float64) * (own / np.float64(scale))
        for (factors, _), own in zip(met, scales, strict=True)
    ]
    downs = [factors.a.astype(np.float64) for factors, _ in met]
    return Factors(np.concatenate(downs), np.concatenate(ups, axis=1), scale)


def _usable(scale: np.float64) -> np.float32 | None:
    """As a float32, if others can be divided by that."""
    kind = np.finfo(np.float32)
    return np.float32(scale) if kind.tiny <= abs(scale) <= kind.max else None
