"""PEFT adapters drawn from a seed, the same bytes on every machine, so that no file is committed.

Only uniform draws and single float32 operations are used: they are exact, where normal draws go
through the C library's logarithm. Writes what PEFT's `save_pretrained` would; needs neither torch
nor jax. Shared by the script that makes the goldens and by the tests that use them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def widths(config: Mapping[str, Any], module: str) -> tuple[int, int]:
    """(input width, output width) of a linear layer, from the fields of `config.json`."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    feed_forward = config["intermediate_size"]
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, feed_forward),
        "up_proj": (hidden, feed_forward),
        "down_proj": (feed_forward, hidden),
    }[module]


def draw(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Uniform float32 numbers of mean zero and the given standard deviation."""
    return (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(std * math.sqrt(12))


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    targets: Sequence[str],
    rank: int,
    seed: int,
    scale: float,
    dtype: str,
) -> None:
    """Write a LoRA adapter for the model of `config` (its `config.json`) into a new folder.

    `lora_alpha` is twice the rank. For an input of unit variance the adapter adds numbers of
    standard deviation `scale`. `dtype`: "float32", "float16" or "bfloat16".
    """
    rng = np.random.default_rng(seed)
    alpha = 2 * rank
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in targets:
            wide_in, wide_out = widths(config, module)
            name = f"base_model.model.model.layers.{layer}.{PARENTS[module]}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw(rng, (rank, wide_in), 1 / math.sqrt(wide_in))
            std = scale / (math.sqrt(rank) * alpha / rank)
            tensors[f"{name}.lora_B.weight"] = draw(rng, (wide_out, rank), std)
    folder.mkdir(parents=True)
    _save(folder / "adapter_model.safetensors", tensors, dtype)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "target_modules": sorted(targets),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _save(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    # Numpy has no bfloat16: its tensors go to the file as uint16, under their true name.
    data = {
        name: _to_bfloat16(value) if dtype == "bfloat16" else value.astype(dtype)
        for name, value in tensors.items()
    }
    specs = {
        name: TensorSpec(
            dtype=dtype, shape=value.shape, data_ptr=value.ctypes.data, data_len=value.nbytes
        )
        for name, value in data.items()
    }
    serialize_file(specs, path, {"format": "pt"})


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
