"""Training several adapters at once on one base, each as if it were alone.

An adapter's first factors, examples, their order, dropout, optimiser and schedule depend on its own
section only, and so do its losses: what is shared is the base, and the batches. All that changes
from step to step is in `State`, so a run goes on from a checkpoint exactly as it would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float

from jslora.adapters.peft import Factors
from jslora.training.adapters import Trained, export, first_factors
from jslora.training.config import AdapterSection, BatchSection
from jslora.training.data import Example
from jslora.training.layers import Model
from jslora.training.optimiser import optimiser
from jslora.training.packing import Batch, Row, RowStream, batch_of, held_out_batches


class State(NamedTuple):
    """What a checkpoint holds: steps done, and by adapter its factors and its optimiser's state."""

    step: int
    trained: dict[str, Trained]
    optimiser: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One adapter: how it is trained, on which rows, and what is held out to judge it."""

    section: AdapterSection
    source: RowStream
    held_out: Sequence[Example]


class Step(NamedTuple):
    """The mean loss of each adapter that a step trained, and how many tokens there were."""

    losses: dict[str, float]
    tokens: int


class Trainer:
    """Steps of training, from a state to the next.

    Args:
        tasks: by name, in the order of the model's columns.
    """

    def __init__(self, model: Model, tasks: Mapping[str, Task], batch: BatchSection) -> None:
        self.model, self._tasks, self._batch = model, dict(tasks), batch
        self._names = list(tasks)
        self._optimisers = {name: optimiser(task.section) for name, task in tasks.items()}

    def start(self) -> State:
        """The state before the first step."""
        plans = dict(zip(self._names, self.model.columns.plans, strict=True))
        trained = {
            name: first_factors(plans[name], self.model.config, task.section.seed)
            for name, task in self._tasks.items()
        }
        trained = self.model.everywhere(trained)
        states = {name: self._optimisers[name].init(own) for name, own in trained.items()}
        return State(0, trained, self.model.everywhere(states))

    def step(self, state: State) -> tuple[State, Step]:
        """One update of every adapter that is not done."""
        active = self._active(state.step)
        batches = self._batches(state.step, active)
        counts = np.sum([_counts(batch, len(self._names)) for batch, _ in batches], axis=0)
        together = self._side_by_side([state.trained[name] for name in self._names])
        sums, told = self.model.zeros(), []
        for batch, seeds in batches:
            packed = self.model.place(_arrays(batch, seeds, counts))
            each, sums = self.model.gradients(together, sums, packed)
            told.append(each)
        trained, states = dict(state.trained), dict(state.optimiser)
        for name in active:
            update = self._updates[name]
            trained[name], states[name] = update(trained[name], states[name], sums)
        losses = np.sum([np.asarray(each) for each in told], axis=0)
        tokens = sum(int((batch.segment > 0).sum()) for batch, _ in batches)
        named = {name: float(losses[self._names.index(name)]) for name in active}
        return State(state.step + 1, trained, states), Step(named, tokens)

    def evaluate(self, state: State) -> dict[str, float]:
        """The mean loss of each adapter over all that is held out for it."""
        together = self._side_by_side([state.trained[name] for name in self._names])
        sums, counts = np.zeros(len(self._names)), np.zeros(len(self._names))
        held_out = [self._tasks[name].held_out for name in self._names]
        rows = self._padded(self._batch.rows)
        for batch in held_out_batches(held_out, rows, self._batch.tokens):
            own = _counts(batch, len(self._names))
            seeds = np.zeros(len(batch.adapter), np.uint32)
            packed = self.model.place(_arrays(batch, seeds, np.ones_like(own)))
            sums += np.asarray(self.model.losses(together, packed))
            counts += own
        return dict(zip(self._names, (sums / counts).tolist(), strict=True))

    def factors(self, state: State, name: str) -> dict[tuple[int, str], Factors]:
        """An adapter as a file has it."""
        return export(self.model.columns.plans[self._names.index(name)], state.trained[name])

    def batches(self, step: int) -> list[Batch]:
        """What a step learns from."""
        return [batch for batch, _ in self._batches(step, self._active(step))]

    def _active(self, step: int) -> list[str]:
        """The adapters that a step trains."""
        return [name for name in self._names if self._tasks[name].section.steps > step]

    @cached_property
    def _side_by_side(self) -> Any:
        return jax.jit(self.model.columns.side_by_side)

    @cached_property
    def _updates(self) -> dict[str, Any]:
        """A program of each adapter: (factors, optimiser's state, gradients of all) to the new."""
        return {
            name: jax.jit(partial(self._update, number)) for number, name in enumerate(self._names)
        }

    def _update(self, number: int, own: Trained, state: Any, sums: Trained) -> tuple[Trained, Any]:
        gradients = self.model.columns.own(number, sums)
        rule = self._optimisers[self._names[number]]
        changes, state = rule.update(gradients, state, own)
        return optax.apply_updates(own, changes), state

    def _batches(self, step: int, active: Sequence[str]) -> list[tuple[Batch, np.ndarray]]:
        """The batches of a step, with a seed for each row."""
        rows, times = self._batch.rows, self._batch.accumulate
        found = []
        for turn in range(times):
            first = (step * times + turn) * rows
            taken: list[tuple[Row, int, int]] = []
            for name in active:
                task, number = self._tasks[name], self._names.index(name)
                numbered = enumerate(task.source.take(first, rows), start=first)
                taken += [(row, number, _seed(task.section.seed, at)) for at, row in numbered]
            taken += [((), 0, 0)] * (self._padded(len(taken)) - len(taken))
            parts = zip(*taken, strict=True)
            row_list, owners, seeds = (list(part) for part in parts)
            batch = batch_of(row_list, owners, self._batch.tokens)
            found.append((batch, np.array(seeds, np.uint32)))
        return found

    def _padded(self, rows: int) -> int:
        """So many rows that every device has as many."""
        devices = self.model.mesh.size
        return -(-rows // devices) * devices


def _seed(seed: int, row: int) -> int:
    """Of the dropout of one row of an adapter."""
    return int(np.random.SeedSequence([seed, 2, row]).generate_state(1)[0])


def _counts(batch: Batch, adapters: int) -> Float[np.ndarray, " adapters"]:
    """How many tokens of a batch are learnt, by adapter."""
    return np.bincount(batch.adapter, batch.loss.sum(1), adapters)


def _arrays(batch: Batch, seeds: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of `Packed`; each token's loss weighs one of its adapter's `counts`."""
    target = np.zeros_like(batch.tokens)
    target[:, :-1] = batch.tokens[:, 1:]
    share = 1 / np.maximum(counts, 1)[batch.adapter]
    weight = np.where(batch.loss, share[:, None], 0).astype(np.float32)
    return batch.tokens, batch.position, batch.segment, target, weight, batch.adapter, seeds
