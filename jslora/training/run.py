"""A whole run: fetch, read, train, evaluate, keep, write.

Everything that can be wrong with the data or the configuration is found before the model is read.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jslora.adapters.synthetic import DTYPES
from jslora.adapters.writer import write_adapter
from jslora.errors import ConfigError
from jslora.fetch import load_config, resolve
from jslora.model.config import ModelConfig
from jslora.model.weights import load_weights
from jslora.new_folder import locked, refuse_existing
from jslora.program_cache import keep_programs
from jslora.progress import Progress
from jslora.sharding import prepare_devices
from jslora.tokenizer import Tokenizer
from jslora.training.adapters import Columns, plan
from jslora.training.checkpoint import Checkpoints
from jslora.training.config import CHECKPOINTS, LOSSES, TrainConfig
from jslora.training.data import read_parts
from jslora.training.layers import AXIS, Model
from jslora.training.packing import RowStream
from jslora.training.trainer import State, Step, Task, Trainer

_DECISIVE = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Suffixes of a base's files: weights, tokenizer and chat template."""


@dataclass(frozen=True)
class Report:
    """How a run is followed.

    Attributes:
        say: told a line at a time of what was found and done.
        stepped: told after each step: how many are done, and what it tells.
    """

    say: Callable[[str], None]
    stepped: Callable[[int, Step], None]
    progress: Progress


def train(config: TrainConfig, report: Report) -> dict[str, Path]:
    """Train all adapters of a configuration, from the newest checkpoint on; their folders by name.

    Raises:
        ConfigError: the configuration does not fit the model, the data or the device, an adapter
            is there already, or another process trains there.
        ModelError: the model's files are wrong.
    """
    trainer, checkpoints = prepare(config, report)
    with locked(checkpoints.folder.resolve()):
        state = _run(config, trainer, checkpoints, report)
        return _write(config, trainer, state, report)


def _write(config: TrainConfig, trainer: Trainer, state: State, report: Report) -> dict[str, Path]:
    """The adapters' folders by name, those written that are not there yet."""
    folders = {name: config.out / name for name in config.adapters}
    for name, folder in folders.items():
        if folder.exists():
            report.say(f"{folder} is there already")
            continue
        base = config.model.name or config.model.source
        rslora = config.adapters[name].rslora
        factors, dtype = trainer.factors(state, name), DTYPES[config.written]
        write_adapter(folder, factors, base, rslora=rslora, dtype=dtype)
        report.say(f"wrote {folder}")
    return folders


def prepare(config: TrainConfig, report: Report) -> tuple[Trainer, Checkpoints]:
    """All that a run needs, its first state or its newest checkpoint excepted.

    Raises:
        ConfigError, ModelError: as `train`.
    """
    source = resolve(config.model.source, config.cache_dir, report.progress)
    shape = load_config(source)
    columns = _columns(config, shape)
    tasks, longest = _tasks(config, shape, Tokenizer(source), report)
    mesh = make_mesh(config.devices)
    fingerprint, keep = _fingerprint(config, source), config.checkpoints.keep
    checkpoints = Checkpoints(config.out / CHECKPOINTS, fingerprint, keep)
    if checkpoints.step < config.steps:  # what is there cannot be this run's
        for name in config.adapters:
            refuse_existing(config.out / name)
    leaves = _leaves(config, shape, source, mesh, report.progress)
    model = Model(shape, leaves, columns, mesh, longest, config.recompute)
    return Trainer(model, tasks, config.batch), checkpoints


def _fingerprint(config: TrainConfig, source: Path) -> str:
    """What a checkpoint must have been made with to be gone on from: configuration, data, base."""
    whole = hashlib.sha256(config.decisive().encode())
    paths = sorted(path for path in source.iterdir() if path.suffix in _DECISIVE and path.is_file())
    for section in config.adapters.values():
        paths.append(section.data)
        if isinstance(section.held_out, Path):  # its longest example decides how attention is cut
            paths.append(section.held_out)
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _columns(config: TrainConfig, shape: ModelConfig) -> Columns:
    plans = []
    for name, section in config.adapters.items():
        try:
            plans.append(plan(section, shape))
        except ConfigError as error:
            raise ConfigError(f"adapters.{name}.{error.message}") from None
    return Columns(tuple(plans), shape.layers)


def _tasks(
    config: TrainConfig, shape: ModelConfig, tokenizer: Tokenizer, report: Report
) -> tuple[dict[str, Task], int]:
    """The data of every adapter, and how long its longest example is."""
    length = config.batch.tokens
    if length > shape.max_positions:
        raise ConfigError(
            f"batch.tokens is {length}; the model has {shape.max_positions} positions"
        )
    tasks, longest = {}, 0
    for name, section in config.adapters.items():
        kept, held_out = read_parts(
            section.data, section.held_out, section.seed, tokenizer, shape.eos_token_ids, length
        )
        report.say(f"{name}: {kept.told()}; held out: {held_out.told()}")
        rows = RowStream(kept.examples, length, section.seed)
        tasks[name] = Task(section, rows, held_out.examples)
        longest = max(longest, *map(len, kept.examples), *map(len, held_out.examples))
    return tasks, longest


def _leaves(
    config: TrainConfig, shape: ModelConfig, source: Path, mesh: Mesh, progress: Progress
) -> dict[str, jax.Array]:
    """The base, whole on every device."""
    keep_programs(config.cache_dir)
    whole = NamedSharding(mesh, PartitionSpec())
    dtype = jnp.dtype(config.model.dtype)
    return load_weights(source, shape, dtype, lambda name, shape: whole, progress=progress)


def make_mesh(devices: int) -> Mesh:
    """The devices that share a batch; on a CPU there are as many as are wanted.

    Raises:
        ConfigError: there are not so many.
    """
    prepare_devices(devices)
    found = jax.devices()
    if len(found) < devices:
        raise ConfigError(f"devices is {devices}; there are {len(found)}")
    return Mesh(np.array(found[:devices]), (AXIS,))


def _run(config: TrainConfig, trainer: Trainer, checkpoints: Checkpoints, report: Report) -> State:
    """All steps that are left, with evaluations and checkpoints between them."""
    state = trainer.start()
    found = checkpoints.newest(state)
    if found is not None:
        state = found
        report.say(f"going on from the checkpoint after step {state.step}")
    if state.step == 0:
        _tell_losses(config, trainer, state, report)
    while state.step < config.steps:
        before, (state, step) = state, trainer.step(state)
        _check_losses(step, before)
        report.stepped(state.step, step)
        last = state.step == config.steps
        # Told before it is kept: what is killed in between is told once more, and not never.
        if last or state.step % config.evaluation.every == 0:
            _tell_losses(config, trainer, state, report)
        if last or state.step % config.checkpoints.every == 0:
            _check_factors(state)
            checkpoints.save(state)
    checkpoints.close()
    return state


def _check_losses(step: Step, before: State) -> None:
    for name, loss in step.losses.items():
        if not math.isfinite(loss):
            _check_factors(before)  # those of one adapter make the losses of all so
            raise _diverged(name, f"the loss of step {before.step + 1} is {loss}")


def _check_factors(state: State) -> None:
    for name, own in state.trained.items():
        if not all(jnp.isfinite(factor).all() for factor in jax.tree.leaves(own)):
            raise _diverged(name, f"factors after step {state.step} are not finite")


def _diverged(name: str, how: str) -> ConfigError:
    return ConfigError(
        f"adapters.{name}: {how}; a lower learning_rate, a longer warm-up or a smaller clip may "
        "help"
    )


def _tell_losses(config: TrainConfig, trainer: Trainer, state: State, report: Report) -> None:
    """Evaluate, tell, and append to `losses.jsonl`."""
    losses = trainer.evaluate(state)
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    report.say(f"held-out loss after {state.step} steps: {shown}")
    line = {"step": state.step, "held_out": losses, "time": time.time()}
    with (config.out / LOSSES).open("a") as file:
        file.write(json.dumps(line) + "\n")
