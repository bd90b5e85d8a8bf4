"""Tiny models, tasks and runs for tests of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from goldens.cases import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from jslora.fetch import load_config
from jslora.model.weights import load_weights
from jslora.training.adapters import Columns, plan
from jslora.training.config import AdapterSection, BatchSection
from jslora.training.data import Example
from jslora.training.layers import Model
from jslora.training.packing import Row, RowStream
from jslora.training.run import make_mesh
from jslora.training.trainer import State, Task, Trainer


class Given:
    """Rows that are given, in the place of those that are drawn."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def take(self, first: int, count: int) -> Sequence[Row]:
        return self._rows[first : first + count]


def section(**wishes: Any) -> AdapterSection:
    return AdapterSection.model_validate({"data": "unused", **wishes})


def trainer(
    model: str,
    tasks: dict[str, Task],
    batch: dict[str, int],
    *,
    devices: int = 1,
    recompute: bool = False,
    dtype: str = "float32",
) -> Trainer:
    """Of one of the tiny golden models."""
    folder = ROOT / model / "model"
    shape, mesh = load_config(folder), make_mesh(devices)
    whole = NamedSharding(mesh, PartitionSpec())
    leaves = load_weights(folder, shape, jnp.dtype(dtype), lambda name, shape: whole)
    plans = tuple(plan(task.section, shape) for task in tasks.values())
    columns = Columns(plans, shape.layers)
    return Trainer(
        Model(shape, leaves, columns, mesh, batch["tokens"], recompute),
        tasks,
        BatchSection.model_validate(batch),
    )


def drawn_task(seed: int, length: int, **wishes: Any) -> Task:
    """A task whose tokens can be learnt: each follows from the one before it."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(12):
        n = int(rng.integers(5, length))
        tokens = ((rng.integers(256) + (3 + seed) * np.arange(n)) % 256).astype(np.int32)
        examples.append(Example(tokens, np.arange(n) >= n // 3))
    own = section(seed=seed, **wishes)
    return Task(own, RowStream(examples[:9], length, seed), examples[9:])


def run(trainer: Trainer, steps: int, state: State | None = None) -> tuple[State, list[Any]]:
    """The state after some steps, and the losses of each."""
    state, losses = state or trainer.start(), []
    for _ in range(steps):
        state, step = trainer.step(state)
        losses.append(step.losses)
    return state, losses


def flat(tree: Any) -> dict[str, np.ndarray]:
    """An adapter's factors by module and letter."""
    return {f"{m}.{k}": np.asarray(v) for m, p in tree.items() for k, v in p._asdict().items()}


GOLDENS = Path(__file__).parent / "goldens"
