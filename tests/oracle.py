"""Llama, Mistral, Qwen2 and Qwen3 with LoRA in float64 NumPy, read straight off their definitions.

Independent of jslora and of the libraries it is compared with: no cache, no batching, one sequence
at a time, the low-rank update added next to each linear layer.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

Adapter = Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray, float]]
"""(layer, module) → A [r, in], B [out, r], scale; a module that is absent is not adapted."""

_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64}


def forward(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokens: Sequence[int],
    adapter: Adapter | None = None,
) -> np.ndarray:
    """Logits [T, V] in float64.

    `weights` carry the names and the layout ([out, in]) of a Hugging Face checkpoint, `config` the
    fields of its `config.json`.
    """
    adapter = adapter or {}
    eps = config.get("rms_norm_eps", 1e-6)
    W = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    cos, sin = _rope(config, len(tokens))

    def linear(layer: int, parent: str, module: str, x: np.ndarray) -> np.ndarray:
        name = f"model.layers.{layer}.{parent}.{module}"
        y = x @ W[f"{name}.weight"].T + W.get(f"{name}.bias", 0.0)
        if (layer, module) in adapter:
            A, B, scale = adapter[layer, module]
            y += scale * (x @ A.T.astype(np.float64)) @ B.T.astype(np.float64)
        return y

    def attention(layer: int, x: np.ndarray) -> np.ndarray:
        def heads(module: str) -> np.ndarray:
            y = linear(layer, "self_attn", module, x)
            y = y.reshape(len(y), -1, _head_dim(config)).swapaxes(0, 1)  # [heads, T, D]
            norm = W.get(f"model.layers.{layer}.self_attn.{module[0]}_norm.weight")
            return y if norm is None else _rms_norm(y, norm, eps)

        q, k = (_rotate(heads(module), cos, sin) for module in ("q_proj", "k_proj"))
        v = heads("v_proj")
        k, v = (np.repeat(a, len(q) // len(a), axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(_head_dim(config))
        scores[:, ~np.tri(len(tokens), dtype=bool)] = -np.inf
        mixed = np.exp(log_softmax(scores)) @ v
        flat = mixed.swapaxes(0, 1).reshape(len(tokens), -1)
        return linear(layer, "self_attn", "o_proj", flat)

    def feed_forward(layer: int, x: np.ndarray) -> np.ndarray:
        gate, up = (linear(layer, "mlp", module, x) for module in ("gate_proj", "up_proj"))
        return linear(layer, "mlp", "down_proj", gate / (1 + np.exp(-gate)) * up)

    x = W["model.embed_tokens.weight"][list(tokens)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + attention(layer, _rms_norm(x, W[f"{name}.input_layernorm.weight"], eps))
        x = x + feed_forward(layer, _rms_norm(x, W[f"{name}.post_attention_layernorm.weight"], eps))
    tied = config.get("tie_word_embeddings", False)
    head = W["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return _rms_norm(x, W["model.norm.weight"], eps) @ head.T


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; −inf stays −inf."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; bfloat16 becomes the equal float32."""
    found = {}
    for name, spec in deserialize(path.read_bytes()):
        if spec["dtype"] == "BF16":
            value = (np.frombuffer(spec["data"], np.uint16).astype(np.uint32) << 16).view("f4")
        else:
            value = np.frombuffer(spec["data"], _STORED[spec["dtype"]])
        found[name] = value.reshape(spec["shape"])
    return found


def load_adapter(folder: Path) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray, float]]:
    """Read a PEFT folder for `forward`, scales worked out from its `adapter_config.json`."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_tensors(folder / "adapter_model.safetensors")
    adapter = {}
    for name in sorted(n for n in tensors if n.endswith(".lora_A.weight")):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
        alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        assert A.shape[0] == B.shape[1] == rank, f"{name}: rank {rank}, A {A.shape}, B {B.shape}"
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        _, _, layer, _, leaf = module.split(".")
        adapter[int(layer), leaf] = (A, B, scale)
    assert 2 * len(adapter) == len(tensors), f"{folder}: a tensor is no LoRA factor"
    return adapter


def compose(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter that adds the weighted updates of several: their factors side by side."""
    composed = {}
    for key in {key for adapter, _ in parts for key in adapter}:
        found = [(*adapter[key], weight) for adapter, weight in parts if key in adapter]
        A = np.concatenate([A * np.float64(scale * weight) for A, _, scale, weight in found])
        composed[key] = (A, np.concatenate([B for _, B, _, _ in found], axis=1), 1.0)
    return composed


def _by_pattern(patterns: Mapping[str, int] | None, module: str, default: int) -> int:
    """PEFT's rule: the first key that matches the module's full name, or its dotted ending."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn each pair (i, i + D/2) of the head by the position's angle; x is [heads, T, D]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rope(config: Mapping[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [T, D/2] of every position's angles."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    D = _head_dim(config)
    frequency = theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":
        # Turns made over the original context decide between the two frequencies.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope["factor"]
    else:
        assert kind == "default", kind
    angles = np.outer(np.arange(length), frequency)
    return np.cos(angles), np.sin(angles)
