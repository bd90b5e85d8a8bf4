"""What is trained: each adapter's factors, and all of them side by side as the model uses them.

An adapter's factors are float32, by module stacked over its layers, B transposed: [layers, r, in]
and [layers, r, out]. The forward pass has the ranks of all adapters side by side in one matrix a
module, [model layers, C, width], and each row of a batch sees the ranks of its own adapter only;
what belongs to a layer that an adapter leaves alone is zero there and stays zero, since a factor
beside a zero factor has no gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jslora.adapters.peft import Factors
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig
from jslora.training.config import AdapterSection


class Pair(NamedTuple):
    """The factors of a module in several layers."""

    a: Float[Array, "L R in"]
    b: Float[Array, "L R out"]


Trained = dict[str, Pair]
"""The factors of one adapter, by module."""


@dataclass(frozen=True)
class Plan:
    """Where an adapter goes: `ranks` and `scales` by module, in `layers` of the model."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    layers: tuple[int, ...]
    dropout: float


def plan(section: AdapterSection, model: ModelConfig) -> Plan:
    """Resolve an adapter's section against the model.

    Raises:
        ConfigError: a layer is none of the model's.
    """
    layers = range(model.layers) if section.layers is None else sorted(section.layers)
    if layers[-1] >= model.layers:
        raise ConfigError(f"layers names {layers[-1]}; the model's are 0 to {model.layers - 1}")
    modules = [module for module in MODULES if module in section.targets]
    ranks = {str(m): section.ranks.get(m, section.rank) for m in modules}
    divisors = {m: math.sqrt(r) if section.rslora else r for m, r in ranks.items()}
    scales = {m: section.alpha / divisors[m] for m in ranks}
    return Plan(ranks, scales, tuple(layers), section.dropout)


def first_factors(plan: Plan, model: ModelConfig, seed: int) -> Trained:
    """A drawn evenly from ±1/√in, as PEFT and `torch.nn.Linear` do, and B zero."""
    found = {}
    for module, rank in plan.ranks.items():
        wide_in, wide_out = model.widths(module)
        draw = np.random.default_rng([seed, 3, MODULES.index(module)])
        a = draw.uniform(-1, 1, (len(plan.layers), rank, wide_in)) / math.sqrt(wide_in)
        b = np.zeros((len(plan.layers), rank, wide_out), np.float32)
        found[module] = Pair(jnp.asarray(a, jnp.float32), jnp.asarray(b))
    return found


def export(plan: Plan, trained: Trained) -> dict[tuple[int, str], Factors]:
    """An adapter's factors by (layer, module), as files have them."""
    found = {}
    for module, (a, b) in jax.device_get(trained).items():
        scale = np.float32(plan.scales[module])
        for row, layer in enumerate(plan.layers):
            found[layer, module] = Factors(a[row], np.ascontiguousarray(b[row].T), scale)
    return found


@dataclass(frozen=True)
class Columns:
    """How the ranks of several adapters lie side by side.

    Attributes:
        plans: of the adapters, in the order that batches number them.
        layers: of the model.
    """

    plans: Sequence[Plan]
    layers: int

    @property
    def modules(self) -> list[str]:
        """Those that an adapter targets, in order."""
        return [m for m in MODULES if any(m in plan.ranks for plan in self.plans)]

    def scales(self, module: str) -> Float[np.ndarray, "adapters C"]:
        """Each adapter's scale at its own columns of a module, zero at the others'."""
        ranks = [plan.ranks.get(module, 0) for plan in self.plans]
        found = np.zeros((len(ranks), sum(ranks)), np.float32)
        for number, plan in enumerate(self.plans):
            if module in plan.ranks:
                found[number, self._place(number, module)] = plan.scales[module]
        return found

    def side_by_side(self, trained: Sequence[Trained]) -> Trained:
        """The factors of all adapters in one array for A and one for B of each module."""
        return {
            m: jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *self._parts(m, trained))
            for m in self.modules
        }

    def own(self, number: int, together: Trained) -> Trained:
        """The part of one adapter in what `side_by_side` makes, or in gradients of it."""
        plan, found = self.plans[number], {}
        layers = np.array(plan.layers)
        for module in plan.ranks:
            (a, b), at = together[module], self._place(number, module)
            found[module] = Pair(a[layers, at], b[layers, at])
        return found

    def _parts(self, module: str, trained: Sequence[Trained]) -> list[Pair]:
        """Each adapter's factors of a module, spread over all layers."""
        found = []
        for plan, own in zip(self.plans, trained, strict=True):
            if module in own:
                at = np.array(plan.layers)
                found.append(jax.tree.map(lambda x, at=at: self._spread(x, at), own[module]))
        return found

    def _spread(self, x: Float[Array, "own R w"], at: np.ndarray) -> Float[Array, "L R w"]:
        if len(at) == self.layers:
            return x
        return jnp.zeros((self.layers, *x.shape[1:]), x.dtype).at[at].set(x)

    def _place(self, number: int, module: str) -> slice:
        start = sum(plan.ranks.get(module, 0) for plan in self.plans[:number])
        return slice(start, start + self.plans[number].ranks[module])
