"""Make `trained.json` and `trained.safetensors`: what torch and PEFT come to, in float32.

Runs where torch, transformers and peft are installed at the versions of `tests/goldens/make.py`:

    python tests/training/goldens/make_trained.py

Every example is run alone, without packing or padding, and a step's loss is the mean over all its
learnt tokens. Models are the tiny ones of `tests/goldens`; a second run writes the same bytes.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "goldens"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Keys as in the sections of a training configuration.
CASES: dict[str, dict[str, Any]] = {
    "adamw": {
        "model": "llama",
        "adapter": {
            "targets": ALL, "rank": 5, "alpha": 10, "optimizer": "adamw", "learning_rate": 5e-3,
            "schedule": "cosine", "warmup_steps": 2, "steps": 10, "clip": 0.5, "weight_decay": 0.1,
        },
        "batch": {"tokens": 64, "rows": 2, "accumulate": 2},
    },
    "sgd": {
        "model": "qwen3",
        "adapter": {
            "targets": ["q_proj", "v_proj", "down_proj"], "rank": 4, "ranks": {"down_proj": 9},
            "alpha": 6, "rslora": True, "layers": [1], "optimizer": "sgd", "learning_rate": 0.5,
            "schedule": "linear", "warmup_steps": 0, "steps": 8, "clip": None, "weight_decay": 0.0,
        },
        "batch": {"tokens": 48, "rows": 3, "accumulate": 1},
    },
    "biased": {
        "model": "qwen2",
        "adapter": {
            "targets": ["k_proj", "o_proj", "up_proj"], "rank": 3, "alpha": 3, "optimizer": "adamw",
            "learning_rate": 2e-2, "schedule": "constant", "warmup_steps": 0, "steps": 6,
            "clip": 1.0, "weight_decay": 0.0,
        },
        "batch": {"tokens": 64, "rows": 1, "accumulate": 1},
    },
}  # fmt: skip


def main() -> None:
    told, arrays = {}, {}
    for seed, (name, case) in enumerate(CASES.items()):
        rows = draw_rows(np.random.default_rng(seed), case)
        losses, factors = train(case, rows, seed)
        told[name] = {**case, "rows": rows, "losses": losses}
        arrays |= {f"{name}.{key}": value for key, value in factors.items()}
    (HERE / "trained.json").write_text(json.dumps(told) + "\n")
    save_file(arrays, HERE / "trained.safetensors")


def draw_rows(rng: np.random.Generator, case: dict[str, Any]) -> list[Any]:
    """Rows of examples, each [tokens, how many of the first are not learnt]."""
    batch = case["batch"]
    rows = []
    for _ in range(case["adapter"]["steps"] * batch["rows"] * batch["accumulate"]):
        row, room = [], batch["tokens"]
        while room >= 6 and len(row) < 4:
            length = int(rng.integers(5, min(room, 30) + 1))
            # Each token follows from the one before, so that there is something to learn.
            tokens = (int(rng.integers(256)) + 7 * np.arange(length)) % 256
            row.append([tokens.tolist(), int(rng.integers(1, length - 1))])
            room -= length
        rows.append(row)
    return rows


def train(
    case: dict[str, Any], rows: list[Any], seed: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """(loss of each step, first and last factors by name)."""
    model = adapted(case)
    draw_factors(model, np.random.default_rng([seed, 1]))
    arrays = factors(model, "first")
    own = case["adapter"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if own["optimizer"] == "adamw":
        rule = torch.optim.AdamW(
            parameters, own["learning_rate"], weight_decay=own["weight_decay"], eps=1e-8
        )
    else:
        rule = torch.optim.SGD(parameters, own["learning_rate"])
    rates = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: rate(own, step))
    each = case["batch"]["rows"] * case["batch"]["accumulate"]
    losses = []
    for step in range(own["steps"]):
        losses.append(gradients(model, rows[step * each : (step + 1) * each]))
        if own["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(parameters, own["clip"])
        rule.step()
        rule.zero_grad()
        rates.step()
    return losses, arrays | factors(model, "last")


def gradients(model: Any, rows: list[Any]) -> float:
    """Leave the gradients of a step's mean loss in the model, and return it."""
    examples = [example for row in rows for example in row]
    count = sum(len(tokens) - unlearnt for tokens, unlearnt in examples)
    total = 0.0
    for tokens, unlearnt in examples:
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids).logits[0, unlearnt - 1 : -1]
        targets = ids[0, unlearnt:]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def rate(own: dict[str, Any], step: int) -> float:
    """Share of the peak learning rate."""
    warmup, steps = own["warmup_steps"], own["steps"]
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shapes[own["schedule"]]


def adapted(case: dict[str, Any]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(
        MODELS / case["model"] / "model", dtype=torch.float32, attn_implementation="eager"
    )
    own = case["adapter"]
    config = LoraConfig(
        r=own["rank"], lora_alpha=own["alpha"], target_modules=own["targets"],
        rank_pattern=own.get("ranks", {}), use_rslora=own.get("rslora", False),
        layers_to_transform=own.get("layers"), task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, config)


def draw_factors(model: Any, rng: np.random.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.02 if "lora_B" in name else 0.1
            drawn = size * rng.standard_normal(parameter.shape)
            parameter.data = torch.tensor(drawn, dtype=torch.float32)


def factors(model: Any, when: str) -> dict[str, np.ndarray]:
    """`when`.layer.module.A or .B to numbers."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            layer, module, letter = parts[4], parts[6], parts[7][-1]
            found[f"{when}.{layer}.{module}.{letter}"] = parameter.detach().numpy().copy()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
