"""adapter_config.json → rank and scale of every layer an adapter targets, exactly as PEFT has them.

Read against PEFT 0.21's `LoraConfig` and `LoraModel`. Invariant: a configuration means here what it
means to PEFT, or it is refused by the name of the key. Whatever PEFT would do beside adding
`scale · B A x` on linear layers is refused, and so is an unknown key that holds a value.
Host only: no jax.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jslora.adapters.patterns import PatternTable
from jslora.adapters.targets import module_key, targeted
from jslora.errors import AdapterRejected
from jslora.logs import printable
from jslora.model.config import ModelConfig

MAX_CONFIG = 2**20
_LARGEST = float(np.finfo(np.float32).max)
_DEFAULT = 8  # of r and of lora_alpha, when the file lacks them

# Keys whose true value changes outputs in a way that is not served.
_REFUSED = {
    "use_dora": "DoRA adapters are not supported",
    "lora_bias": "a bias on lora_B is not supported",
    "modules_to_save": "fully trained modules are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "fan_in_fan_out": "transposed base weights are not supported",
    "megatron_config": "Megatron layers are not supported",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "use_qalora": "QALoRA is not supported",
}
# Settings that switch a variant on by being there, even when empty.
_REFUSED_IF_PRESENT = {
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) is not supported",
    "velora_config": "VeLoRA is not supported",
}
# Bookkeeping, training, and the settings of initialisations that PEFT reads only together with a
# matching `init_lora_weights`.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip

# These leave the base weights alone, and the saved factors replace whatever they drew. The ranks
# that EVA redistributed are in the saved rank_pattern and alpha_pattern.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# These train against base weights they changed, so the saved factors mean something else on the
# plain base. PEFT's conversion on saving makes them plain, and writes `true` instead.
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter's configuration says; `ranks` and `scales` by targeted (layer, module)."""

    ranks: Mapping[tuple[int, str], int]
    scales: Mapping[tuple[int, str], np.float32]
    base_model: str | None
    warnings: tuple[str, ...]


def parse_config(data: bytes, model: ModelConfig, max_rank: int) -> LoraConfig:
    """Resolve the bytes of an adapter_config.json against the base model.

    Raises:
        AdapterRejected: it is not a JSON object, asks for something that is not served, targets
            nothing or something beside the linear layers, or holds a value of a wrong kind.
    """
    config = _json(data)
    _refuse_unsupported(config)
    keys = {target: module_key(*target) for target in targeted(config, model)}
    rank_of = _setting(config, "r", "rank_pattern", _check_rank)
    alpha_of = _setting(config, "lora_alpha", "alpha_pattern", _check_alpha)
    ranks = {target: rank_of.get(key) for target, key in keys.items()}
    for target, rank in ranks.items():
        if rank > max_rank:
            raise AdapterRejected(f"rank {rank} of {keys[target]}; at most {max_rank} is served")
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise AdapterRejected(f"use_rslora is {printable(rslora)}; true or false is expected")
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        ranks=ranks,
        scales={t: _scale(key, alpha_of.get(key), ranks[t], rslora) for t, key in keys.items()},
        base_model=printable(base) if isinstance(base, str) and base else None,
        warnings=(*rank_of.warnings(keys.values()), *alpha_of.warnings(keys.values())),
    )


def _json(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"adapter_config.json is not JSON: {printable(error)}") from None
    if not isinstance(config, dict):
        raise AdapterRejected(f"adapter_config.json holds a {type(config).__name__}, not an object")
    return config


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, default, served in (
        ("peft_type", None, ["LORA"]),
        ("task_type", None, ["CAUSAL_LM", None]),
        ("bias", "none", ["none"]),
    ):
        if config.get(key, default) not in served:
            shown = printable(config.get(key, default))
            raise AdapterRejected(f"{key} is {shown}; only {served[0]} is supported")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterRejected(f"{key} is set: {reason}")
    for key, reason in _REFUSED_IF_PRESENT.items():
        if config.get(key) is not None and config[key] is not False:
            raise AdapterRejected(f"{key} is set: {reason}")
    _refuse_init(config.get("init_lora_weights", True))
    known = _READ.union(_HARMLESS, _REFUSED, _REFUSED_IF_PRESENT)
    for key, value in config.items():
        if key not in known and value:
            raise AdapterRejected(f"the key {printable(key)} is not known and may change outputs")


def _refuse_init(init: object) -> None:
    if init is None or isinstance(init, bool):
        return
    shown = f"init_lora_weights is {printable(init)}"
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(_BASE_CHANGING_INITS):
        raise AdapterRejected(
            f"{shown}, which changes the base weights; saved by PEFT with "
            "path_initial_model_for_weight_conversion it becomes a plain LoRA adapter"
        )
    if init not in _PLAIN_INITS:
        raise AdapterRejected(f"{shown}; known are true, false and {', '.join(_PLAIN_INITS)}")


def _setting(
    config: Mapping[str, Any], key: str, patterns: str, check: Callable[[str, object], None]
) -> PatternTable[Any]:
    """The value of `key` for each module, which the map under `patterns` overrides."""
    default, table = config.get(key, _DEFAULT), config.get(patterns) or {}
    check(key, default)
    if not isinstance(table, dict):
        raise AdapterRejected(f"{patterns} is {printable(table)}; a map from patterns is expected")
    for pattern, value in table.items():
        check(f"{patterns} of {printable(pattern)}", value)
    return PatternTable(patterns, table, default)


def _check_rank(key: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise AdapterRejected(f"{key} is {printable(value)}; a rank is an integer from 1 on")


def _check_alpha(key: str, value: object) -> None:
    if type(value) not in (int, float):
        raise AdapterRejected(f"{key} is {printable(value)}; a number is expected")


def _scale(key: str, alpha: int | float, rank: int, rslora: bool) -> np.float32:
    try:
        scale = alpha / (math.sqrt(rank) if rslora else rank)
    except OverflowError:
        scale = math.inf
    if not abs(scale) <= _LARGEST:
        raise AdapterRejected(f"the scale of {key} is not a finite float32: {printable(scale)}")
    return np.float32(scale)
