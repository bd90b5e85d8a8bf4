"""The configuration of a training run: a YAML file and `--set a.b=c`, validated before it starts.

What stands under `defaults` holds for every adapter that does not say otherwise. Relative paths
are relative to the working folder, as on a command line. Host only: no jax.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jslora import config as shared
from jslora.config import UserPath
from jslora.errors import ConfigError
from jslora.model.config import MODULES
from jslora.section import NAME, STRICT, Positive

Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rank = Annotated[int, Field(ge=1, le=512)]

CHECKPOINTS, LOSSES = "checkpoints", "losses.jsonl"
"""What lies beside the adapters in `out`."""


def _held_out(value: object) -> object:
    if isinstance(value, str):
        return Path(value).expanduser()
    if isinstance(value, Path) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("a share between 0 and 1, or a file of examples, is expected")


HeldOut = Annotated[float | Path, BeforeValidator(_held_out)]


class _Section(BaseModel):
    model_config = ConfigDict(**STRICT, allow_inf_nan=False)


class BaseSection(_Section):
    """`source`: as of a server. `name`: what adapters call their base; by default the source."""

    source: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    name: str | None = None


class AdapterSection(_Section):
    """What is trained, on what, and how; each adapter is trained as if it were alone.

    Attributes:
        data: a file as `jslora.training.data` reads it.
        held_out: share of its examples that is never trained on, or another file of such.
        ranks: by module, where one has another than `rank`.
        layers: of the model, from 0; all by default.
        dropout: share of the adapter's inputs that is zeroed.
        steps: updates; `warmup_steps` of them raise the rate from zero, the rest follow `schedule`.
        clip: largest norm of the gradient of all of the adapter's factors together.
        seed: of the first factors, the order of examples, the held-out part and the dropout.
    """

    data: UserPath
    held_out: HeldOut = 0.05
    rank: Rank = 8
    ranks: dict[Module, Rank] = {}
    alpha: Annotated[float, Field(gt=0)] = 16
    rslora: bool = False
    targets: Annotated[list[Module], Field(min_length=1)] = list(MODULES)  # type: ignore[arg-type]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    steps: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Annotated[int, Field(ge=0)] = 0

    @pydantic.model_validator(mode="after")
    def _check(self) -> "AdapterSection":
        if strangers := sorted(self.ranks.keys() - set(self.targets)):
            raise ValueError(f"ranks names {strangers[0]}, which is not among targets")
        for name, values in (("targets", self.targets), ("layers", self.layers or [])):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; fewer than steps, {self.steps}, are possible"
            )
        return self


class BatchSection(_Section):
    """`tokens`: places in a row. `rows`: of each adapter in a batch. `accumulate`: batches a step.

    What an adapter's step learns from is thus up to `tokens` times `rows` times `accumulate`.
    """

    tokens: Annotated[int, Field(ge=2)] = 512
    rows: Positive = 4
    accumulate: Positive = 1


class EvaluationSection(_Section):
    """`every`: steps between evaluations of what is held out; there is one before and one after."""

    every: Positive = 100


class CheckpointSection(_Section):
    """`every`: steps between checkpoints. `keep`: how many of them stay on the disk."""

    every: Positive = 100
    keep: Positive = 2


class TrainConfig(_Section):
    """A whole run.

    Attributes:
        out: folder that the adapters are written to, each below its name, with the checkpoints.
        devices: over which the rows of a batch are divided.
        recompute: keep only what enters each layer for the backward pass and compute the rest
            again there: a third more work, a small part of the memory.
        written: type of the numbers in the files of the finished adapters.
    """

    cache_dir: UserPath = Path("~/.cache/jslora").expanduser()
    model: BaseSection
    out: UserPath
    defaults: dict[str, Any] = {}
    adapters: Annotated[
        dict[Annotated[str, Field(pattern=rf"^{NAME}$")], AdapterSection], Field(min_length=1)
    ]
    batch: BatchSection = BatchSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointSection = CheckpointSection()
    devices: Positive = 1
    recompute: bool = False
    written: Literal["float32", "bfloat16"] = "float32"

    @pydantic.field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, AdapterSection]) -> dict[str, AdapterSection]:
        for name in (CHECKPOINTS, LOSSES):
            if name in adapters:
                raise ValueError(f"{name} is something else in `out`; choose another name")
        return adapters

    @property
    def steps(self) -> int:
        """Of the adapter that is trained longest."""
        return max(adapter.steps for adapter in self.adapters.values())

    def decisive(self) -> str:
        """All that decides what a step does, as text."""
        without = {"cache_dir", "out", "defaults", "evaluation", "checkpoints", "written"}
        return self.model_dump_json(exclude=without)


def load(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate the whole.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, a value is not allowed.
    """
    return parse(shared.read(path, overrides))


def parse(data: Mapping[str, Any]) -> TrainConfig:
    """Validate a configuration given as nested dicts.

    Raises:
        ConfigError: as `load`.
    """
    defaults, adapters = data.get("defaults"), data.get("adapters")
    if isinstance(defaults, dict) and isinstance(adapters, dict):
        full = {n: {**defaults, **own} if isinstance(own, dict) else own
                for n, own in adapters.items()}  # fmt: skip
        data = {**data, "adapters": full}
    try:
        return TrainConfig.model_validate(data)
    except pydantic.ValidationError as error:
        told = (shared.explain(each, TrainConfig) for each in error.errors())
        raise ConfigError("; ".join(told)) from None
