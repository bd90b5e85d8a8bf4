"""Synthetic PEFT adapters for demos and benchmarks: valid folders, drawn from a seed.

An adapter depends on its recipe and index only, not on how many others are made or in which order,
and is the same on every machine: draws are uniform, which no C library has a hand in. A folder
appears whole, by a rename; what a killed run left is removed by the next. Host only: no jax.
"""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jslora.adapters.peft import CONFIG, WEIGHTS, tensor_name
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig
from jslora.progress import Progress, silent

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# An adapter adds this share of its input's standard deviation to an output, whatever its rank and
# alpha; base layers have a gain of about 1. On SmolLM2-135M, 0.1 leaves half of the greedy answers
# as they are; 0.4 to 0.8 change nearly all of them, and they are still English.
_GAIN = 0.5
_VERSION = 1  # of the drawing; part of every recipe
_RECIPE = "synthetic.json"  # stands in every folder made here


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that one adapter's files depend on."""

    version: int
    seed: int
    index: int
    rank: int
    alpha: int
    targets: tuple[str, ...]
    dtype: str
    layers: int
    widths: tuple[tuple[int, int], ...]  # (in, out) of each target
    base_name: str

    def texts(self) -> dict[str, str]:
        """The JSON files, by name: the adapter's configuration, and this recipe."""
        config = {
            "base_model_name_or_path": self.base_name,
            "bias": "none",
            "inference_mode": True,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
        }
        return {CONFIG: json.dumps(config, indent=2), _RECIPE: json.dumps(asdict(self), indent=2)}

    def tensors(self) -> dict[str, np.ndarray]:
        """A and B of every layer, by the names PEFT gives them."""
        random = np.random.default_rng([self.seed, self.index])
        b_std = _GAIN * self.rank / self.alpha / math.sqrt(self.rank)
        drawn = {}
        for layer in range(self.layers):
            for module, (wide_in, wide_out) in zip(self.targets, self.widths, strict=True):
                a = _uniform(random, (self.rank, wide_in), 1 / math.sqrt(wide_in))
                b = _uniform(random, (wide_out, self.rank), b_std)
                drawn[tensor_name(layer, module, "A")] = a.astype(DTYPES[self.dtype])
                drawn[tensor_name(layer, module, "B")] = b.astype(DTYPES[self.dtype])
        return drawn


def make_adapters(
    root: Path,
    model: ModelConfig,
    *,
    count: int,
    ranks: Sequence[int],
    targets: Sequence[Sequence[str]],
    dtype: str = "float32",
    seed: int = 0,
    base_name: str,
    alpha: int | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Write adapter-000, adapter-001, … below `root`; folders that are right already are kept.

    Args:
        ranks, targets: taken in turn so that every pair of them occurs.
        dtype: "float32", "float16" or "bfloat16".
        base_name: what the adapters call their base.
        alpha: lora_alpha; by default twice the rank.
        progress: told of stage "adapters" after each one.

    Raises:
        ConfigError: an argument is not allowed, `root` cannot be written, or a folder of such a
            name is there that was not made here.
    """
    _check(count, ranks, targets, dtype, alpha)
    folders = []
    try:
        with _locked(root):
            for index in range(count):
                recipe = _recipe(index, model, ranks, targets, dtype, seed, base_name, alpha)
                folders.append(root / f"adapter-{index:03d}")
                if not _is_made(folders[-1], recipe):
                    _make(folders[-1], recipe)
                progress("adapters", index + 1, count, folders[-1].name)
    except OSError as error:
        raise ConfigError(f"cannot write adapters below {root}: {error.strerror}") from None
    return folders


def _check(
    count: int,
    ranks: Sequence[int],
    targets: Sequence[Sequence[str]],
    dtype: str,
    alpha: int | None,
) -> None:
    if count < 1 or (alpha is not None and alpha < 1):
        raise ConfigError(f"adapters: count is {count} and alpha {alpha}; both are at least 1")
    if not ranks or not all(1 <= rank <= 512 for rank in ranks):
        raise ConfigError(f"adapters: ranks are {list(ranks)}; each is from 1 to 512")
    for names in targets or [[]]:
        if not names or len(set(names)) < len(names) or not set(names) <= set(MODULES):
            raise ConfigError(f"adapters: targets {list(names)} are not among {', '.join(MODULES)}")
    if dtype not in DTYPES:
        raise ConfigError(f"adapters: dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")


def _recipe(
    index: int,
    model: ModelConfig,
    ranks: Sequence[int],
    targets: Sequence[Sequence[str]],
    dtype: str,
    seed: int,
    base_name: str,
    alpha: int | None,
) -> Recipe:
    rank = ranks[index % len(ranks)]
    names = tuple(targets[index // len(ranks) % len(targets)])
    return Recipe(
        version=_VERSION,
        seed=seed,
        index=index,
        rank=rank,
        alpha=alpha or 2 * rank,
        targets=names,
        dtype=dtype,
        layers=model.layers,
        widths=tuple(model.widths(name) for name in names),
        base_name=base_name,
    )


def _uniform(random: np.random.Generator, shape: tuple[int, int], std: float) -> np.ndarray:
    drawn = random.random(shape, np.float32)
    drawn -= np.float32(0.5)
    drawn *= np.float32(std * math.sqrt(12))
    return drawn


# Folders ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Be the only maker below `root`, and remove what a killed one left."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for partial in root.glob(".adapter-*.partial"):
            shutil.rmtree(partial)
        yield


def _make(folder: Path, recipe: Recipe) -> None:
    """Write a folder, in the place of one that another recipe made."""
    if folder.exists() and not (folder / _RECIPE).is_file():
        raise ConfigError(f"{folder.name} exists and is no synthetic adapter; it is left alone")
    partial = folder.with_name(f".{folder.name}.partial")
    new, old = partial / "new", partial / "old"
    try:
        new.mkdir(parents=True)
        for name, text in recipe.texts().items():
            (new / name).write_text(text)
        save_file(recipe.tensors(), new / WEIGHTS, {"format": "pt"})
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_made(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds what this recipe makes; a folder appears whole or not at all."""
    texts = recipe.texts()
    return (folder / WEIGHTS).is_file() and all(
        (folder / name).is_file() and (folder / name).read_text() == text
        for name, text in texts.items()
    )
