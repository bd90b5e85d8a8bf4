"""Steps of a training run on demand, for measurements: one process beside another that waits.

It writes the batches it will train on, in the form that any other trainer can read, then reads
words from standard input and answers each with one line of JSON:

- `step`: seconds, CPU seconds, tokens and loss of one update;
- `rate`: products a second (in FLOP) of a plain matrix product in the model's dtype, the largest
  of a layer;
- `memory`: the process's largest resident size so far, in bytes.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jslora.errors import JsloraError
from jslora.progress import silent
from jslora.training.config import TrainConfig, load
from jslora.training.heap import keep_freed_memory
from jslora.training.layers import Model
from jslora.training.run import Report, prepare
from jslora.training.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="of one adapter")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--batches", type=Path, required=True, help=".npz to write")
    options = parser.parse_args()
    keep_freed_memory()
    quiet = Report(lambda line: None, lambda done, step: None, silent)
    try:
        config = load(options.config, options.set)
        trainer, checkpoints = prepare(config, quiet)
    except JsloraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    checkpoints.close()
    write_batches(options.batches, config, trainer)
    print(json.dumps(facts(config, trainer.model)), flush=True)
    serve(trainer)
    return 0


def facts(config: TrainConfig, model: Model) -> dict[str, Any]:
    """What the measurement's table says of the work."""
    return {
        "model": config.model.source,
        "parameters": model.config.parameters,
        "trained": sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.zeros))),
        "batch": config.batch.model_dump(),
    }


def write_batches(path: Path, config: TrainConfig, trainer: Trainer) -> None:
    """The arrays of `Batch`, [steps, batches of a step, rows, tokens]."""
    steps = [trainer.batches(step) for step in range(config.steps)]

    def stacked(name: str) -> np.ndarray:
        return np.array([[getattr(batch, name) for batch in step] for step in steps])

    np.savez(
        path, tokens=stacked("tokens"), position=stacked("position"),
        segment=stacked("segment"), loss=stacked("loss"),
    )  # fmt: skip


def serve(trainer: Trainer) -> None:
    """Answer the words on standard input until it ends."""
    state = trainer.start()
    for line in sys.stdin:
        answer: dict[str, float]
        if line.strip() == "step":
            start, worked = time.perf_counter(), time.process_time()
            state, step = trainer.step(state)
            jax.block_until_ready(state.trained)
            (loss,) = step.losses.values()
            answer = {
                "seconds": time.perf_counter() - start, "cpu": time.process_time() - worked,
                "tokens": step.tokens, "loss": loss,
            }  # fmt: skip
        elif line.strip() == "rate":
            answer = {"rate": product_rate(trainer.model)}
        else:
            answer = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


def product_rate(model: Model, tokens: int = 2048, turns: int = 5) -> float:
    """FLOP a second of tokens times the fused gate and up weights, the best of some turns."""
    weight = model.leaves["layers.0.gate_up"]
    x = jnp.ones((tokens, model.config.hidden), weight.dtype)

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=jnp.float32)

    product(x, weight).block_until_ready()
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        product(x, weight).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * weight.size / best


if __name__ == "__main__":
    sys.exit(main())
