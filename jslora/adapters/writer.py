"""LoRA factors → a PEFT folder that says exactly where they go.

Invariant: `peft` and `read_adapter` get from the folder the layers, ranks and scales that were
given, and the numbers as they were but for a cast that was asked for. What most layers have stands
under `r` and `lora_alpha`; the others are in the patterns, by names that no other layer matches, so
the order of a pattern's keys says nothing. Host only: no jax.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jslora.adapters.peft import CONFIG, WEIGHTS, Factors, tensor_name
from jslora.adapters.targets import module_key
from jslora.adapters.tensors import DTYPES, all_finite
from jslora.errors import AdapterRejected
from jslora.model.config import MODULES
from jslora.new_folder import new_folder

Target = tuple[int, str]


def write_adapter(
    folder: Path,
    factors: Mapping[Target, Factors],
    base_model: str | None,
    *,
    rslora: bool = False,
    dtype: np.dtype | None = None,
) -> None:
    """Write `folder`, which appears whole or not at all.

    Args:
        factors: by (layer, module); at least one.
        base_model: what the adapter calls its base.
        rslora: say the scales as alpha / √r; they are the same.
        dtype: of the tensors in the file; by default each has its own.

    Raises:
        AdapterRejected: a number is not finite, or not as a `dtype`.
        ConfigError: `folder` is there already, or cannot be written.
    """
    _check_shapes(factors)
    tensors = _tensors(factors, dtype)
    config = adapter_config(factors, base_model, rslora=rslora)
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))


def adapter_config(
    factors: Mapping[Target, Factors], base_model: str | None, *, rslora: bool = False
) -> dict[str, Any]:
    """What stands in adapter_config.json for these factors."""
    ranks = {target: f.a.shape[0] for target, f in factors.items()}
    alphas = {target: _alpha(f.scale, ranks[target], rslora) for target, f in factors.items()}
    rank, rank_pattern = _most_and_others(ranks)
    alpha, alpha_pattern = _most_and_others(alphas)
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "task_type": "CAUSAL_LM",
        "use_rslora": rslora,
        **_targeting(factors),
    }


def _targeting(factors: Mapping[Target, Factors]) -> dict[str, Any]:
    """Modules and layers where every pair of them has factors; else the layers' whole names."""
    layers = sorted({layer for layer, _ in factors})
    modules = [module for module in MODULES if any(found == module for _, found in factors)]
    if len(factors) == len(layers) * len(modules):
        return {"target_modules": modules, "layers_to_transform": layers}
    return {"target_modules": [module_key(*target) for target in _ordered(factors)]}


def _ordered(factors: Mapping[Target, Any]) -> list[Target]:
    return sorted(factors, key=lambda target: (target[0], MODULES.index(target[1])))


def _alpha(scale: np.float32, rank: int, rslora: bool) -> int | float:
    """What PEFT divides to get `scale`: the shortest number of those that do."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = float(scale) * divisor
    for short in (round(alpha), float(str(np.float32(alpha)))):
        if np.float32(short / divisor) == scale:
            return short
    return alpha


def _most_and_others[Value: (int, int | float)](
    values: Mapping[Target, Value],
) -> tuple[Value, dict[str, Value]]:
    """The commonest value, and pattern → value of what has another.

    A pattern is a module's name if the module has one value in all layers.
    """
    most = Counter(values[target] for target in _ordered(values)).most_common(1)[0][0]
    of_module: dict[str, set[Value]] = {}
    for (_, module), value in values.items():
        of_module.setdefault(module, set()).add(value)
    others = {}
    for target in _ordered(values):
        if values[target] != most:
            alike = len(of_module[target[1]]) == 1
            others[target[1] if alike else module_key(*target)] = values[target]
    return most, others


def _check_shapes(factors: Mapping[Target, Factors]) -> None:
    assert factors, "an adapter without a layer"
    for target, (a, b, scale) in factors.items():
        fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0
        assert fits, f"factors {a.shape} and {b.shape} of {target}"
        assert np.isfinite(scale), f"scale {scale} of {target}"


def _tensors(factors: Mapping[Target, Factors], dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """Tensors by their names in the file."""
    found = {}
    for target in _ordered(factors):
        for letter, tensor in (("A", factors[target].a), ("B", factors[target].b)):
            name = tensor_name(*target, letter)
            found[name] = as_stored(name, tensor, tensor.dtype if dtype is None else dtype)
    return found


def as_stored(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor cast, contiguous and checked.

    Raises:
        AdapterRejected: a number of it is not finite as a `dtype`.
    """
    assert dtype in DTYPES.values(), f"{name} as {dtype}"
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor, dtype)
    if not all_finite(stored):
        raise AdapterRejected(f"tensor {name} holds numbers that are not finite in {dtype.name}")
    return stored
