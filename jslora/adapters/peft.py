"""A PEFT LoRA folder → an `Adapter` whose every tensor is bound to a layer of the base model.

Invariant: binding is exact or the load fails, naming the tensor and what was expected. Each layer
the configuration targets has its A and its B, of the rank the configuration gives it and the widths
of the base, and the file holds nothing else. Read against PEFT 0.21. Host only: no jax.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jslora.adapters.files import read_files
from jslora.adapters.lora_config import MAX_CONFIG, LoraConfig, parse_config
from jslora.adapters.targets import PARENTS, module_key
from jslora.adapters.tensors import parse
from jslora.errors import AdapterRejected
from jslora.logs import printable
from jslora.model.config import ModelConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# What a stray tensor's name tells about the feature it belongs to.
_FEATURES = {
    "lora_magnitude_vector": "belongs to DoRA, which is not supported",
    "lora_embedding_": "adapts the embedding, which is not supported",
    "modules_to_save": "belongs to a fully trained module, which is not supported",
    "token_adapter": "belongs to trained token embeddings, which are not supported",
    "lora_diag": "belongs to KaSA, which is not supported",
    "embed_tokens": "belongs to the embedding, which adapters cannot change",
    "lm_head": "belongs to the output head, which adapters cannot change",
    ".bias": "is a bias, and biases are not supported",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one adapter.

    Attributes:
        max_pages: most pages of the pool it may take; None does not bound it.
    """

    max_rank: int = 512
    max_file_bytes: int = 2 * 2**30
    max_pages: int | None = None


class Factors(NamedTuple):
    """One layer's LoRA, y += scale · (x Aᵀ) Bᵀ, in the dtypes it was saved in.

    `a` is [r, in], `b` is [out, r]; both are read-only.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.float32


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A checked adapter in host memory.

    Attributes:
        factors: by (layer, module); those of other layers are zero.
        digest: sha256 over the tensors and the scales, so over all that outputs depend on.
        base_model: what the configuration calls its base.
        bytes: size of the tensors as saved.
        warnings: what may be a mistake, in one line each.
    """

    factors: Mapping[tuple[int, str], Factors]
    digest: str
    base_model: str | None
    bytes: int
    warnings: tuple[str, ...]


def read_adapter(
    folder: Path, model: ModelConfig, limits: Limits, root: Path | None = None
) -> Adapter:
    """Read and check the PEFT folder `folder`.

    Args:
        root: links in the path may lead anywhere below this folder; by default below `folder`.

    Raises:
        AdapterRejected: a file is missing, too large or changed meanwhile; the configuration is not
            served; or a tensor is missing, is left over, or has a wrong shape, dtype or value.
    """
    _refuse_pickle(folder)
    files = read_files(root or folder, folder, {CONFIG: MAX_CONFIG, WEIGHTS: limits.max_file_bytes})
    config = parse_config(files[CONFIG], model, limits.max_rank)
    tensors = parse(files[WEIGHTS])
    factors = _bind(config, tensors, model)
    return Adapter(
        factors=factors,
        digest=_digest(factors),
        base_model=config.base_model,
        bytes=sum(f.a.nbytes + f.b.nbytes for f in factors.values()),
        warnings=config.warnings,
    )


def _refuse_pickle(folder: Path) -> None:
    """Say why a folder cannot be read that has its weights as a pickle only."""
    if os.path.exists(folder / WEIGHTS):
        return
    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        name = f"adapter_model{suffix}"
        if os.path.exists(folder / name):
            raise AdapterRejected(
                f"{name} is a pickle, which is never opened; save the adapter as {WEIGHTS}"
            )


# Binding ----------------------------------------------------------------------------------------


def _bind(
    config: LoraConfig, tensors: dict[str, np.ndarray], model: ModelConfig
) -> dict[tuple[int, str], Factors]:
    tensors = _canonical(tensors)
    factors = {}
    for (layer, module), rank in config.ranks.items():
        wide_in, wide_out = model.widths(module)
        a = _take(tensors, tensor_name(layer, module, "A"), (rank, wide_in), 0)
        b = _take(tensors, tensor_name(layer, module, "B"), (wide_out, rank), 1)
        factors[layer, module] = Factors(a, b, config.scales[layer, module])
    for name in tensors:
        raise AdapterRejected(_explain_stray(name, model))
    return factors


def tensor_name(layer: int, module: str, factor: str) -> str:
    """The name under which PEFT saves factor "A" or "B" of a layer."""
    return f"{_PREFIX}{module_key(layer, module)}.lora_{factor}.weight"


def _canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the adapter name "default" from tensor names, as PEFT's loader lets it stand there."""
    found = {}
    for name, tensor in tensors.items():
        plain = name
        for factor in "AB":
            if name.endswith(f".lora_{factor}.default.weight"):
                plain = name.removesuffix(".default.weight") + ".weight"
        if plain in found:
            raise AdapterRejected(f"tensor {printable(plain)} is there twice")
        found[plain] = tensor
    return found


def _take(
    tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], rank_axis: int
) -> np.ndarray:
    """Remove tensor `name` from `tensors` and check it."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise AdapterRejected(f"tensor {name} is missing; {CONFIG} targets its layer")
    if tensor.shape != shape:
        wrong_rank = len(tensor.shape) == 2 and all(
            tensor.shape[axis] == shape[axis] for axis in (0, 1) if axis != rank_axis
        )
        source = f"{CONFIG} gives it rank {shape[rank_axis]}" if wrong_rank else "the base's shape"
        raise AdapterRejected(
            f"tensor {name} has shape {list(tensor.shape)}; expected {list(shape)} ({source})"
        )
    if not np.isfinite(tensor).all():
        raise AdapterRejected(f"tensor {name} holds numbers that are not finite")
    return tensor


def _explain_stray(name: str, model: ModelConfig) -> str:
    """What is wrong with a tensor that no targeted layer takes."""
    shown = f"tensor {printable(name)}"
    for part, reason in _FEATURES.items():
        if part in name:
            return f"{shown} {reason}"
    path = name.removeprefix(_PREFIX).split(".")
    if path[:2] == ["model", "layers"] and len(path) > 4 and path[2].isdecimal():
        if int(path[2][:9]) >= model.layers:
            return f"{shown} is of layer {path[2][:9]}; the base has {model.layers} layers"
        if PARENTS.get(path[4]) == path[3]:
            return f"{shown} is of a layer that {CONFIG} does not target"
    example = tensor_name(0, "q_proj", "A")
    return f"{shown} belongs to no linear layer; names as {example} are expected"


def _digest(factors: Mapping[tuple[int, str], Factors]) -> str:
    digest = hashlib.sha256(b"jslora adapter 1\n")
    parts = {
        tensor_name(*target, name): (tensor, factor.scale)
        for target, factor in factors.items()
        for name, tensor in (("A", factor.a), ("B", factor.b))
    }
    for name, (tensor, scale) in sorted(parts.items()):
        fact = [name, tensor.dtype.name, tensor.shape, float(scale).hex()]
        digest.update(json.dumps(fact).encode() + b"\n")
        digest.update(tensor.view(np.uint8))
    return digest.hexdigest()
