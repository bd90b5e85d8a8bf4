"""Run as `split_engine.py DEVICES LORA FOLDER PROCESSES`: an engine over virtual devices, which one
process has or two, answers everything.

What it is asked makes rows wait, be preempted and found in the prefix cache, and adapters leave and
come back: the pool is too small for all of them. The answers are printed as JSON.
"""

import contextlib
import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from distributed.loopback import TOKEN, free_ports
from engine_helpers import (
    EVERYTHING,
    Ask,
    answers,
    assert_nothing_leaked,
    small_config,
    small_engine,
)  # fmt: skip
from goldens.adapters import write_adapter
from short_answers import QUANTILE, expect_short_answers

from jslora.config import parse
from jslora.engine import Completion, Engine
from jslora.programs import Catalog
from jslora.request import SamplingParams
from jslora.server.process import start_line
from jslora.sharding import make_mesh

ARCHITECTURE = dict(
    architectures=["Qwen2ForCausalLM"], vocab_size=256, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=96,
    max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
ADAPTERS = {
    "r1": (EVERYTHING, 1), "r3": (EVERYTHING, 3), "r16": (EVERYTHING, 16),
    "r5": (["q_proj", "o_proj", "down_proj"], 5), "r7": (["k_proj", "up_proj"], 7),
    "r9": (EVERYTHING, 9),
}  # fmt: skip
"""Targets and ranks, some of which no number of devices divides."""


def write_adapters(folder: Path) -> None:
    for seed, (name, (targets, rank)) in enumerate(ADAPTERS.items()):
        write_adapter(folder / name, ARCHITECTURE, targets, rank, seed, 1.0, "float32")


def open_engine(folder: Path, devices: int, lora: str, **sections: Any) -> Engine:
    """An engine over a dummy model and the adapters in `folder`, with little room."""
    engine = small_engine(folder, None, **(little_room(devices, lora) | sections))
    engine.core.run_on_engine(lambda: expect_short_answers(engine.core.scheduler))
    return engine


def little_room(devices: int, lora: str) -> dict[str, Any]:
    return {
        "model": {"source": "dummy", "architecture": ARCHITECTURE}, "pool": {"pages": 32},
        "adapters": {"preload": "all"}, "mesh": {"model": devices, "lora": lora},
        "scheduler": {"max_step_tokens": 16, "reserve": QUANTILE},
    }  # fmt: skip


@contextlib.contextmanager
def open_group(folder: Path, devices: int, lora: str) -> Iterator[Engine]:
    """The same over two processes with half of the devices each; this one leads."""
    coordinator, control = free_ports(2)
    group = {
        "coordinator": f"127.0.0.1:{coordinator}", "control_port": control, "num_processes": 2,
        "token": TOKEN, "heartbeat_seconds": 20, "digest_every": 4,
    }  # fmt: skip
    sections = little_room(devices, lora) | {"distributed": group | {"process_id": 1}}
    command = [sys.executable, "-m", "jslora.distributed.follower"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr) as follower:
        try:
            assert follower.stdin is not None
            follower.stdin.write(start_line(parse(small_config(folder, None, **sections)), None))
            follower.stdin.flush()
            with open_engine(folder, devices, lora, distributed=group) as engine:
                yield engine
            assert follower.wait(20) == 0, "it is told to stop"
        finally:
            follower.kill()


def asks() -> list[list[Ask]]:
    """Batches: greedy and drawn, with all adapters and none, long and short, and some again."""
    names, batches = deque([None, *ADAPTERS]), []
    for _ in range(2):
        names.rotate(1)
        batches.append([Ask(prompt(i), settings(i), names[i % len(names)]) for i in range(14)])
    together = [Ask(prompt(i), settings(14), "r1") for i in range(8)]  # 39 pages
    again = Ask(prompt(7) * 3, settings(3), "r3")
    return [together, *batches, [again], [again, Ask(prompt(7) * 3, settings(1), "r3")]]


def prompt(i: int) -> list[int]:
    return [(7 * i + 3 * j) % 256 for j in range(3 + 5 * i % 37)]


def settings(i: int) -> SamplingParams:
    """Some are drawn, and of some the prompt is scored."""
    drawn = {"temperature": 0.8, "seed": i, "top_p": 0.9, "presence_penalty": 0.4}
    return SamplingParams(
        max_tokens=6 + 3 * i, logprobs=3, prompt_logprobs=None if i % 4 else 2,
        **(drawn if i % 3 == 1 else {"temperature": 0}),
    )  # fmt: skip


def answer_all(engine: Engine) -> dict[str, Any]:
    """What was answered, and how often what must happen did."""
    found = [record(done) for batch in asks() for done in answers(engine, batch)]
    assert_nothing_leaked(engine)
    stats = engine.stats()
    counts = {
        name: getattr(stats, name)
        for name in ("preemptions", "adapter_evictions", "prefix_hit_tokens", "recoveries")
    }
    return {"answers": found, "counts": counts}


def record(done: Completion) -> dict[str, Any]:
    scored = [entry.logprob for entry in (done.prompt_logprobs or ())[1:] if entry is not None]
    chosen = [entry.logprob for entry in done.logprobs]
    return {"tokens": [*done.tokens], "logprobs": chosen, "scored": scored}


def main() -> None:
    devices, lora, folder, processes = sys.argv[1:]
    start = {"1": open_engine, "2": open_group}[processes]
    with start(Path(folder), int(devices), lora) as engine:
        catalog = engine.core.runner.catalog
        assert catalog.split.devices == int(devices)
        assert catalog.split.fully == (lora == "fully_sharded")
        assert catalog.programs.vocabulary_axis == "model"
        if processes == "1":  # others would have to compile them too
            assert_pool_stays(catalog)
        print(json.dumps(answer_all(engine)))


def assert_pool_stays(small: Catalog) -> None:
    """No program copies a pool that is large: it is aliased on every device, and there is no other.

    The programs are those that take it, one layer's for any layer.
    """
    catalog = replace(small, sizes=replace(small.sizes, pages=4096))
    mesh, pool = make_mesh(catalog.split.devices), catalog.pool()
    own = pool.size * pool.dtype.itemsize
    jobs, bucket = catalog.jobs(), catalog.buckets[-1]
    for job in (jobs["write"], jobs["layer", bucket]):
        job = job.over(mesh)
        lowered = jax.jit(job.function, donate_argnums=job.donated).lower(*job.arguments)
        memory = lowered.compile().memory_analysis()
        assert own <= memory.alias_size_in_bytes < 1.1 * own, job.name
        assert memory.temp_size_in_bytes < own / 2, job.name


if __name__ == "__main__":
    main()
