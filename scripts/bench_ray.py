"""How often Ray Serve's replicas load adapters: by their homes, and by Ray's own multiplexing.

    python scripts/bench_ray.py

Every way gets the same requests: each adapter once, to warm up, and then adapters drawn uniformly,
from several clients at once. A random model of no size is served, as only places matter. Loads are
those that the engines count.
"""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from jslora.config import EngineConfig, parse
from jslora.integrations.changes import HttpRequest
from jslora.integrations.exchange import Part
from jslora.integrations.local_ray import local_ray
from jslora.integrations.scale import Scale
from jslora.progress import silent
from jslora.server import frontend
from jslora.server.http import bind

PAGES_PER_ADAPTER = 4  # of rank 8 on all attention modules, with 2 layers of width 32
RUNNING = 4  # sequences in a replica, of a page each
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
    "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One way's figures; loads are of all replicas together."""

    warm_loads: int
    loads: int
    failed: int
    seconds: list[float]


def settings(folder: Path, adapters: int, room: int) -> EngineConfig:
    """A replica with room for so many adapters beside a page for each sequence that runs."""
    return parse(
        {
            "cache_dir": str(folder / "cache"),
            "model": {
                "source": "dummy", "architecture": ARCHITECTURE, "dtype": "float32",
                "max_model_len": 64,
            },
            "pool": {"pages": PAGES_PER_ADAPTER * room + RUNNING + 1, "prefix_cache": False},
            "adapters": {
                "roots": [str(folder / "adapters")], "max_rank": 8,
                "synthetic": {
                    "count": adapters, "ranks": [8],
                    "targets": [["q_proj", "k_proj", "v_proj", "o_proj"]],
                },
            },
            "scheduler": {"max_running": RUNNING, "max_step_tokens": 16},
            "logging": {"level": "warning"},
        }
    )  # fmt: skip


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="jslora-") as scratch:
        config = settings(Path(scratch), options.adapters, options.room)
        frontend.prepare(config, silent)
        with contextlib.closing(bind("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        print(
            f"{options.replicas} replicas with room for {options.room} adapters each, "
            f"{options.adapters} adapters, {options.requests} requests from {options.clients} "
            "clients\n\n"
            f"{'way':24} {'loads/adapter':>14} {'of it warm-up':>14} {'p50 ms':>8} {'p95 ms':>8}"
        )
        with local_ray(options.replicas, "127.0.0.1", port):
            for name, application in _ways(config, options).items():
                print(_line(name, _measure(application, options, port), options), flush=True)


def _ways(config: EngineConfig, options: argparse.Namespace) -> dict[str, Any]:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from jslora.integrations.ray_replica import Replica
    from jslora.integrations.ray_serve import build

    class Multiplexed(Replica):
        """Tells Ray of the adapters it was asked for, as Ray's documentation has it."""

        async def answer(self, call: HttpRequest) -> AsyncIterator[Part]:
            if adapter := serve.get_multiplexed_model_id():
                await self.note(adapter)
            async for part in super().answer(call):
                yield part

        @serve.multiplexed(max_num_models_per_replica=options.room)
        async def note(self, adapter: str) -> str:
            return adapter

    scale = Scale(min_replicas=options.replicas, max_replicas=options.replicas)
    theirs = RequestRouterConfig()
    return {
        "homes (AffinityRouter)": build(config, scale),
        "Ray's multiplexing": build(config, scale, replica=Multiplexed, router=theirs),
    }


def _measure(application: Any, options: argparse.Namespace, port: int) -> Measured:
    from ray import serve

    serve.run(application, name="bench")
    try:
        return asyncio.run(_load(options, f"http://127.0.0.1:{port}"))
    finally:
        serve.delete("bench")


async def _load(options: argparse.Namespace, url: str) -> Measured:
    names = [f"adapter-{index:03d}" for index in range(options.adapters)]
    drawn = random.Random(options.seed).choices(names, k=options.requests)
    async with aiohttp.ClientSession(url) as session:
        await _ask(session, names, options.clients)
        warm = await _loads(session)
        answers = await _ask(session, drawn, options.clients)
        loads = await _loads(session)
    return Measured(
        warm_loads=warm,
        loads=loads,
        failed=sum(status != 200 for status, _ in answers),
        seconds=sorted(seconds for _, seconds in answers),
    )


async def _ask(
    session: aiohttp.ClientSession, adapters: list[str], clients: int
) -> list[tuple[int, float]]:
    """Status and seconds of a request to each, so many at a time."""
    places = asyncio.Semaphore(clients)

    async def ask(adapter: str) -> tuple[int, float]:
        body = {"model": adapter, "prompt": "Hello!", "max_tokens": 8, "ignore_eos": True}
        async with places:
            began = time.perf_counter()
            async with session.post("/v1/completions", json=body) as answer:
                await answer.read()
            return answer.status, time.perf_counter() - began

    return await asyncio.gather(*map(ask, adapters))


async def _loads(session: aiohttp.ClientSession) -> int:
    """Adapters brought to the replicas' devices so far; their statistics come once a second."""
    await asyncio.sleep(1.5)
    async with session.get("/metrics") as answer:
        text = await answer.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return int(sum(sample.value for sample in families["jslora:lora_loads"].samples))


def _line(name: str, found: Measured, options: argparse.Namespace) -> str:
    ms = [1000 * seconds for seconds in found.seconds]
    failed = f"  {found.failed} requests failed" if found.failed else ""
    return (
        f"{name:24} {found.loads / options.adapters:14.2f} "
        f"{found.warm_loads / options.adapters:14.2f} {ms[len(ms) // 2]:8.1f} "
        f"{ms[len(ms) * 95 // 100]:8.1f}{failed}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--room", type=int, default=20, help="adapters that fit in one replica")
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
