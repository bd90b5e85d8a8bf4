"""The whole measurement against a stand-in of the server, which writes down what it was asked."""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jslora import config
from jslora.bench import adapters, server
from jslora.bench.adapters import SPARE, WIDE, Slice, measure_adapters, server_command
from jslora.bench.conditions import Experiment, Plan
from jslora.bench.server import Counters, serving
from jslora.errors import ConfigError, Unavailable
from jslora.progress import silent

FAKE = Path(__file__).with_name("fake_server.py")
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.EngineConfig:
    monkeypatch.setattr(server, "PULSE_SECONDS", 0.0)
    return config.parse(
        {
            "model": {"source": "dummy", "architecture": ARCHITECTURE},
            "adapters": {"roots": [str(tmp_path / "root")]},
        }
    )


def plan(**blocks: int) -> Plan:
    return Plan(
        blocks=blocks,  # type: ignore[arg-type]
        streams=2, requests=20, input_tokens=16, output_tokens=16, sweep=(2, 6), load_rate=200,
        load_rank=4,
    )  # fmt: skip


def measured(
    settings: config.EngineConfig, asked: Plan, log: Path
) -> tuple[dict[tuple[Experiment, int, str], Slice], list[dict[str, Any]]]:
    """The slices by place, and the calls that the server got."""
    slices: list[Slice] = []
    command = [sys.executable, str(FAKE), str(log)]
    asyncio.run(measure_adapters(command, settings, asked, silent, slices.append))
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    return {(s.experiment, s.block, s.condition): s for s in slices}, calls


def test_the_device_is_warm_and_loads_are_counted(
    settings: config.EngineConfig, tmp_path: Path
) -> None:
    found, calls = measured(settings, plan(room=2, sweep=1), tmp_path / "log")
    assert {key: (each.adapters, each.room) for key, each in found.items()} == {
        **{("room", block, "fits"): (4, 4) for block in (0, 1)},
        **{("room", block, "twice"): (8, 4) for block in (0, 1)},
        **{("room", block, "all"): (10, 4) for block in (0, 1)},
        ("sweep", 0, "2"): (2, 4),
        ("sweep", 0, "6"): (6, 4),
    }
    for (_, _, condition), each in found.items():
        assert len(each.run.records) == 20 and not each.probes
        assert all(record.error is None for record in each.run.records)
        assert (each.loads > 0) == (condition in ("twice", "all", "6")), condition
    # Only those that the cache of packed ones lacked were touched before the first slice.
    registered = [call for call in calls if "lora_path" in call]
    assert len(registered) == WIDE + SPARE
    first = calls[len(registered) + SPARE :][:5]
    assert {call["model"] for call in first} == {f"adapter-{i}" for i in range(0, 10, 2)}


def test_slices_of_a_block_draw_alike_and_no_prompt_comes_twice(
    settings: config.EngineConfig, tmp_path: Path
) -> None:
    found, calls = measured(settings, plan(sweep=2), tmp_path / "log")
    drawn = {
        key: [record.model for record in sorted(each.run.records, key=lambda r: r.index)]
        for key, each in found.items()
    }
    shares = {key: [int(name.split("-")[1]) for name in names] for key, names in drawn.items()}
    # One draw below 1 picks among 2 and among 6: where it picks the upper half, both do.
    for block in (0, 1):
        upper = [pick >= 3 for pick in shares["sweep", block, "6"]]
        assert [pick >= 1 for pick in shares["sweep", block, "2"]] == upper
    assert shares["sweep", 0, "6"] != shares["sweep", 1, "6"]
    prompts = Counter(tuple(call["prompt"]) for call in calls if len(call.get("prompt", ())) == 16)
    assert len(prompts) == 4 * 20 and set(prompts.values()) == {1}


def test_probes_run_beside_the_streams_and_their_failures_are_told(
    settings: config.EngineConfig, tmp_path: Path
) -> None:
    found, calls = measured(settings, plan(loads=1), tmp_path / "log")
    assert not found["loads", 0, "no probes"].probes
    resident = found["loads", 0, "resident"]
    assert resident.probes and {record.model for record in resident.probes} == {"wide-000"}
    absent = found["loads", 0, "absent"]
    assert absent.probes and "wide-000" not in {record.model for record in absent.probes}
    for each in found.values():
        assert not {record.model for record in each.run.records} & {r.model for r in each.probes}
    # Each called adapter is loaded, asked and unloaded, under a name of its own; the stand-in
    # refuses half of them.
    called = found["loads", 0, "called"]
    names = [record.model for record in called.probes]
    assert names and len(set(names)) == len(names)
    steps = Counter(call.get("lora_name", call.get("model")) for call in calls)
    assert {steps[name] for name in names} == {3}
    assert called.failures and all("HTTP 400" in message for message in called.failures)


def test_a_server_that_does_not_start_is_an_error() -> None:
    async def start() -> None:
        async with serving([sys.executable, "-c", "print('no'); raise SystemExit(3)"]):
            raise AssertionError("it is not ready")

    with pytest.raises(Unavailable, match="exit code 3"):
        asyncio.run(start())


def test_without_a_root_nothing_is_started(settings: config.EngineConfig) -> None:
    bare = settings.model_copy(update={"adapters": config.AdaptersSection()})
    with pytest.raises(ConfigError, match="roots is empty"):
        asyncio.run(measure_adapters(["false"], bare, plan(room=1), silent, print))


def test_counters_are_read_by_name() -> None:
    with pytest.raises(KeyError, match="lora_loads_total"):
        Counters.parse('jslora:cache_config_info{page_size="16",num_pages="4"} 1.0\n')


def test_the_servers_port_is_free_whatever_the_user_sets() -> None:
    command = server_command("python", Path("s"), Path("c"), ["server.port=80", "pool.pages=9"])
    assert command[:4] == ["python", "s", "--config", "c"]
    assert command.index("server.port=0") > command.index("server.port=80")
    assert "pool.pages=9" in command and adapters.WIDE_FOLDER not in command
