"""The golden cases, read from the committed files: numpy, json and safetensors only.

A case is one model with or without one adapter, and what transformers or PEFT answered in float32
for each of its prompts. `cases` are the tiny random models in this folder; `smollm2_cases` need the
real model, and write their adapters where they are told to.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from goldens.adapters import write_adapter
from safetensors.numpy import load_file

ROOT = Path(__file__).parent
MODELS = ("llama", "llama-linear", "llama3", "mistral", "qwen2", "qwen3")
ADAPTERS = ("r1", "r5", "r8-rslora", "r64-regex", "layer1", "patterns")

# Model → name → how much of each adapter's update is added. PEFT makes the first one's settings
# those of the sum, so that must not be rsLoRA, nor leave out layers; it takes no pattern among
# lists of modules, and nothing of one adapter alone, whose scale is changed instead.
COMPOSED: dict[str, dict[str, dict[str, float]]] = {
    "llama3": {
        "two": {"r5": 0.7, "r8-rslora": 1.3},
        "three": {"patterns": 0.8, "layer1": 1.7, "r1": 0.4},
        "four": {"r1": 1.0, "r5": 0.25, "r8-rslora": 0.5, "patterns": 1.0},
        "half": {"r8-rslora": 0.5},
        "double": {"r64-regex": 2.0},
        "none": {"r5": 0.0},
    },
    "qwen3": {
        "two": {"r1": 2.0, "r8-rslora": 0.6},
        "three": {"r5": 1.1, "patterns": 0.3, "layer1": 0.9},
        "half": {"patterns": 0.5},
    },
}

SMOLLM2_ADAPTERS: dict[str, dict[str, Any]] = {
    "r4": dict(targets=["q_proj", "v_proj"], rank=4, seed=1, scale=0.6, dtype="float32"),
    "r16": dict(
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
        rank=16,
        seed=2,
        scale=0.4,
        dtype="bfloat16",
    ),
    "r64": dict(
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank=64,
        seed=3,
        scale=0.2,
        dtype="float16",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """n prompts to one model; `gaps` separate the two likeliest tokens of each greedy step.

    `adapter_dir` is a PEFT folder or None for the base. End tokens do not end the greedy text.
    """

    name: str
    model_dir: Path
    adapter_dir: Path | None
    prompts: list[list[int]]
    greedy: list[list[int]]  # [n, steps]
    gaps: np.ndarray  # [n, steps]
    logprobs: np.ndarray  # [n, steps], of the greedy tokens
    first_ids: np.ndarray  # [n, k]: all of the vocabulary, or the likeliest tokens
    first_logprobs: np.ndarray  # [n, k], of `first_ids` as the first token of the answer
    prompt_logprobs: list[np.ndarray]  # [len(prompt) - 1] each: of its tokens after the first
    texts: list[str] = field(default_factory=list)  # of `greedy`, where there is a tokenizer


@dataclass(frozen=True)
class Composed:
    """Adapters of a model by name, how much of each one's update is added, and the answers."""

    weights: Mapping[str, float]
    case: Case


def cases() -> list[Case]:
    """Every tiny model, alone and with each of its adapters."""
    found = []
    for model in MODELS:
        golden = load_file(ROOT / model / "golden.safetensors")
        for name in ("base", *ADAPTERS):
            adapter_dir = None if name == "base" else ROOT / model / "adapters" / name
            found.append(_case(golden, model, name, ROOT / model / "model", adapter_dir))
    return found


def composed() -> list[Composed]:
    """`COMPOSED`: different ranks, over modules and layers that are shared and that are not."""
    found = []
    for model, sums in COMPOSED.items():
        golden = load_file(ROOT / model / "golden.safetensors")
        for name, weights in sums.items():
            case = _case(golden, model, f"composed-{name}", ROOT / model / "model", None)
            found.append(Composed(weights, case))
    return found


def smollm2_cases(model_dir: Path, adapters_dir: Path) -> list[Case]:
    """SmolLM2-135M-Instruct in `model_dir`, alone and with adapters written to `adapters_dir`."""
    golden = load_file(ROOT / "smollm2" / "golden.safetensors")
    texts = json.loads((ROOT / "smollm2" / "texts.json").read_text())
    write_smollm2_adapters(adapters_dir)
    folders = {"base": None} | {name: adapters_dir / name for name in SMOLLM2_ADAPTERS}
    return [
        _case(golden, "smollm2", name, model_dir, folder, texts["greedy"][name])
        for name, folder in folders.items()
    ]


def write_smollm2_adapters(folder: Path) -> None:
    """Write the adapters of `SMOLLM2_ADAPTERS`, each into a new folder of its name."""
    config = json.loads((ROOT / "smollm2" / "config.json").read_text())
    for name, options in SMOLLM2_ADAPTERS.items():
        write_adapter(folder / name, config, **options)


def digests(root: Path) -> dict[str, str]:
    """Relative path → sha256 of every data file below `root`; code, prose and manifest excepted."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.suffix in (".json", ".safetensors") and path != root / "manifest.json"
    }


def _case(
    golden: Mapping[str, np.ndarray],
    model: str,
    name: str,
    model_dir: Path,
    adapter_dir: Path | None,
    texts: list[str] | None = None,
) -> Case:
    prompts = _prompts(golden)
    first = golden[f"{name}/first_logprobs"]
    everything = np.tile(np.arange(first.shape[1], dtype=np.int32), (len(first), 1))
    return Case(
        name=f"{model}/{name}",
        model_dir=model_dir,
        adapter_dir=adapter_dir,
        prompts=prompts,
        greedy=golden[f"{name}/greedy"].tolist(),
        gaps=golden[f"{name}/gaps"],
        logprobs=golden[f"{name}/logprobs"],
        first_ids=golden.get(f"{name}/first_ids", everything),
        first_logprobs=first,
        prompt_logprobs=[golden[f"{name}/prompt_logprobs.{i}"] for i in range(len(prompts))],
        texts=texts or [],
    )


def _prompts(golden: Mapping[str, np.ndarray]) -> list[list[int]]:
    count = sum(key.startswith("prompt.") for key in golden)
    return [golden[f"prompt.{i}"].tolist() for i in range(count)]
