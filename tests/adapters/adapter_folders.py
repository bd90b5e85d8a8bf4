"""A tiny base model, and PEFT folders for it written with the safetensors library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jslora.model.config import MODULES, ModelConfig, from_hf

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = json.loads((GOLDENS / "golden.json").read_text())
MODEL = from_hf(GOLDEN["model"])
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"],
}


def key(layer: int, module: str) -> str:
    parent = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


def name(layer: int, module: str, factor: str) -> str:
    return f"base_model.model.{key(layer, module)}.lora_{factor}.weight"


def draw(
    ranks: Mapping[tuple[int, str], int],
    model: ModelConfig = MODEL,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Normal factors of the given rank for every (layer, module)."""
    random = np.random.default_rng(seed)
    tensors = {}
    for (layer, module), rank in ranks.items():
        wide_in, wide_out = model.widths(module)
        a, b = random.normal(size=(rank, wide_in)), random.normal(size=(wide_out, rank))
        tensors[name(layer, module, "A")] = a.astype(DTYPES[dtype])
        tensors[name(layer, module, "B")] = b.astype(DTYPES[dtype])
    return tensors


def tensors(rank: int = 2, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """What belongs to `CONFIG`."""
    targets = [
        (layer, module) for layer in range(MODEL.layers) for module in ("q_proj", "down_proj")
    ]
    return draw(dict.fromkeys(targets, rank), dtype=dtype, seed=seed)


def write(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors() if weights is None else weights), folder / "adapter_model.safetensors")
    return folder


def every_target(layers: int = MODEL.layers) -> list[tuple[int, str]]:
    return [(layer, module) for layer in range(layers) for module in MODULES]
