"""A PEFT LoRA folder → an `Adapter` whose every tensor is bound to a layer of the base model.

Invariant: binding is exact or the load fails, naming the tensor and what was expected. Each layer
the configuration targets has its A and its B, of the rank the configuration gives it and the widths
of the base, and the file holds nothing else. An outline binds by the configuration and the header
alone; it passes the same checks but for the numbers. Read against PEFT 0.21. Host only: no jax.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jslora.adapters.files import Identity, OpenFile, snapshot
from jslora.adapters.lora_config import MAX_CONFIG, LoraConfig, parse_config
from jslora.adapters.targets import PARENTS, module_key
from jslora.adapters.tensors import Span, all_finite, header_end, parse_header, view
from jslora.errors import AdapterRejected
from jslora.logs import printable
from jslora.model.config import MODULES, ModelConfig

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
        files: what its two files were when they were read; None if it came from elsewhere.
    """

    factors: Mapping[tuple[int, str], Factors]
    digest: str
    base_model: str | None
    bytes: int
    warnings: tuple[str, ...]
    files: tuple[Identity, Identity] | None = None

    def outline(self, model: ModelConfig) -> "Outline":
        """All of it but its numbers."""
        ranks = {target: factors.a.shape[0] for target, factors in self.factors.items()}
        scales = {target: factors.scale for target, factors in self.factors.items()}
        rank, scale = _tables(ranks, scales, model)
        return Outline(rank, scale, self.base_model, self.bytes, self.warnings, self.files)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What an adapter's configuration and header say; arrays are read-only, columns as `MODULES`.

    Attributes:
        rank: 0 where a module is not targeted.
        scale: what the low-rank product is multiplied by.
        base_model, bytes, warnings, files: as in `Adapter`.
    """

    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    base_model: str | None
    bytes: int
    warnings: tuple[str, ...]
    files: tuple[Identity, Identity] | None = None

    def same_as(self, other: "Outline") -> bool:
        """Whether both say the same, of whichever files."""
        return (
            np.array_equal(self.rank, other.rank)
            and np.array_equal(self.scale, other.scale)
            and (self.base_model, self.bytes, self.warnings)
            == (other.base_model, other.bytes, other.warnings)
        )


def _tables(
    ranks: Mapping[tuple[int, str], int],
    scales: Mapping[tuple[int, str], np.float32],
    model: ModelConfig,
) -> tuple[Int32[np.ndarray, "L 7"], Float32[np.ndarray, "L 7"]]:
    """Ranks and scales by targeted (layer, module), as arrays."""
    shape = (model.layers, len(MODULES))
    rank, scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for (layer, module), number in ranks.items():
        column = MODULES.index(module)
        rank[layer, column] = number
        scale[layer, column] = scales[layer, module]
    rank.flags.writeable = scale.flags.writeable = False
    return rank, scale


def read_outline(
    folder: Path, model: ModelConfig, limits: Limits, root: Path | None = None
) -> Outline:
    """Check all of the PEFT folder `folder` that can be checked without reading its tensors.

    Raises:
        AdapterRejected: as `read_adapter`, but for numbers that are not finite.
    """
    _refuse_pickle(folder)
    with snapshot(root or folder, folder, (CONFIG, WEIGHTS)) as (settings, weights):
        bound = _bind_files(settings, weights, model, limits)
    config = bound.config
    rank, scale = _tables(config.ranks, config.scales, model)
    return Outline(
        rank=rank,
        scale=scale,
        base_model=config.base_model,
        bytes=bound.nbytes,
        warnings=config.warnings,
        files=(settings.identity, weights.identity),
    )


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
    with snapshot(root or folder, folder, (CONFIG, WEIGHTS)) as (settings, weights):
        bound = _bind_files(settings, weights, model, limits)
        data = weights.read(limits.max_file_bytes)
        if len(data) != weights.identity.size or not data.startswith(bound.head):
            raise AdapterRejected(f"{WEIGHTS} changed while it was read")
    config = bound.config
    factors = {
        target: Factors(view(data, a), view(data, b), config.scales[target])
        for target, (a, b) in bound.spans.items()
    }
    _check_finite(factors)
    return Adapter(
        factors=factors,
        digest=_digest(factors),
        base_model=config.base_model,
        bytes=bound.nbytes,
        warnings=config.warnings,
        files=(settings.identity, weights.identity),
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


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """A configuration, and where (A, B) of every targeted (layer, module) lie in the other file."""

    config: LoraConfig
    spans: Mapping[tuple[int, str], tuple[Span, Span]]
    head: bytes  # what the file begins with, header and all

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.spans.values())


def _bind_files(
    settings: OpenFile, weights: OpenFile, model: ModelConfig, limits: Limits
) -> _Bound:
    """Read what is small, and refuse by it before anything large is read."""
    text = settings.read(MAX_CONFIG)
    weights.check_size(limits.max_file_bytes)
    total = weights.identity.size
    head = weights.read_start(header_end(weights.read_start(8), total))
    config = parse_config(text, model, limits.max_rank)
    return _Bound(config, _bind(config, parse_header(head, total), model), head)


def _bind(
    config: LoraConfig, tensors: dict[str, Span], model: ModelConfig
) -> dict[tuple[int, str], tuple[Span, Span]]:
    tensors = _canonical(tensors)
    bound = {}
    for (layer, module), rank in config.ranks.items():
        wide_in, wide_out = model.widths(module)
        a = _take(tensors, tensor_name(layer, module, "A"), (rank, wide_in), 0)
        b = _take(tensors, tensor_name(layer, module, "B"), (wide_out, rank), 1)
        bound[layer, module] = (a, b)
    for name in tensors:
        raise AdapterRejected(_explain_stray(name, model))
    return bound


def _check_finite(factors: Mapping[tuple[int, str], Factors]) -> None:
    for target, (a, b, _) in factors.items():
        for letter, tensor in (("A", a), ("B", b)):
            if not all_finite(tensor):
                name = tensor_name(*target, letter)
                raise AdapterRejected(f"tensor {name} holds numbers that are not finite")


def tensor_name(layer: int, module: str, factor: str) -> str:
    """The name under which PEFT saves factor "A" or "B" of a layer."""
    return f"{_PREFIX}{module_key(layer, module)}.lora_{factor}.weight"


def _canonical(tensors: Mapping[str, Span]) -> dict[str, Span]:
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


def _take(tensors: dict[str, Span], name: str, shape: tuple[int, int], rank_axis: int) -> Span:
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
