"""The same training steps with torch and PEFT, in an environment of their own, for measurements.

Reads the batches that `jslora.evaluation.training_speed` writes, and answers the same words. Rows
are packed as there, with a mask that keeps examples apart; the base is bfloat16 and the factors
float32, their products in bfloat16 by autocast, as is usual with PEFT. Imports nothing of jslora.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    model, rule = prepare(options)
    batches = dict(np.load(options.batches))
    print(json.dumps({"ready": True}), flush=True)
    done = 0
    for line in sys.stdin:
        if line.strip() == "step":
            start, worked = time.perf_counter(), time.process_time()
            loss = step(model, rule, {name: x[done] for name, x in batches.items()})
            answer = {
                "seconds": time.perf_counter() - start, "cpu": time.process_time() - worked,
                "tokens": int((batches["segment"][done] > 0).sum()), "loss": loss,
            }  # fmt: skip
            done += 1
        else:
            answer = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)
    return 0


def prepare(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model with its adapter, and AdamW over the factors."""
    import torch  # type: ignore[import-not-found]
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

    base = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if options.recompute:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, options.rate)


def step(model: Any, rule: Any, batches: dict[str, np.ndarray]) -> float:
    """One update; its mean loss."""
    import torch

    count, total = int(batches["loss"].sum()), 0.0
    for turn in range(len(batches["tokens"])):
        tokens, position, segment, loss = (
            torch.from_numpy(np.asarray(batches[name][turn], np.int64))
            for name in ("tokens", "position", "segment", "loss")
        )
        mask = segment[:, None, :, None] == segment[:, None, None, :]
        mask &= torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        labels = torch.full_like(tokens, -100)
        labels[:, 1:] = torch.where(loss[:, :-1] > 0, tokens[:, 1:], -100)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(
                input_ids=tokens, position_ids=position, attention_mask=mask, labels=labels,
                num_items_in_batch=count, use_cache=False,
            )  # fmt: skip
        found.loss.backward()
        total += found.loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    rule.step()
    rule.zero_grad()
    return total


if __name__ == "__main__":
    sys.exit(main())
