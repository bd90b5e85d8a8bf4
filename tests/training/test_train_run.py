"""A run goes on from where it was killed, over any number of devices; what is wrong is named."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers
import yaml
from goldens.cases import ROOT
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from jslora.adapters.peft import Limits, read_adapter
from jslora.errors import ConfigError
from jslora.fetch import load_config
from jslora.new_folder import locked
from jslora.progress import silent
from jslora.training.config import parse
from jslora.training.run import Report, make_mesh, prepare, train

REPOSITORY = Path(__file__).parents[2]
QUIET = Report(lambda line: None, lambda done, step: None, silent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a token for each byte, the last of which ends an answer."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((ROOT / "llama" / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 255}))
    weights = folder / "model.safetensors"
    weights.symlink_to(ROOT / "llama" / "model" / "model.safetensors")
    letters = sorted(ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> dict[str, Any]:
    lines = [{"prompt": f"{i}: ", "completion": "abcdefgh"[i % 5 :] * 2} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "cache_dir": str(tmp_path / "cache"),
        "model": {"source": str(model), "dtype": "float32", "name": "tiny"},
        "out": str(tmp_path / "out"),
        "defaults": {"data": str(data), "steps": 6, "held_out": 0.2, "dropout": 0.1},
        "adapters": {
            "one": {"rank": 2, "learning_rate": 0.01},
            "two": {"rank": 3, "targets": ["q_proj"], "steps": 5},
        },
        "batch": {"tokens": 48, "rows": 1, "accumulate": 2},
        "checkpoints": {"every": 2},
    }


def script(config: dict[str, Any], *flags: str) -> list[str]:
    path = Path(config["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    program = str(REPOSITORY / "scripts" / "train_lora.py")
    return [sys.executable, program, "--config", str(path), *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def digests(model: Path, folders: Sequence[Path]) -> list[str]:
    shape, limits = load_config(model), Limits(512, 2**30, 1000)
    return [read_adapter(folder, shape, limits).digest for folder in folders]


def in_process(config: dict[str, Any]) -> tuple[list[Path], list[str]]:
    said: list[str] = []
    report = Report(said.append, lambda done, step: None, silent)
    return [*train(parse(config), report).values()], said


def test_a_killed_run_goes_on_to_the_same_bits(config: dict[str, Any], model: Path) -> None:
    with subprocess.Popen(
        script(config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    ) as run:  # fmt: skip
        assert run.stdout is not None
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("step 3:"):
                run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, "".join(seen)
    killed, said = in_process(config)
    assert "going on from the checkpoint after step 2" in said
    whole, said = in_process({**config, "out": config["out"] + "-whole"})
    assert not any("going on" in line for line in said)
    assert digests(model, killed) == digests(model, whole)
    again, said = in_process(config)
    assert again == killed and any("there already" in line for line in said)


def test_rows_are_divided_over_devices(config: dict[str, Any], model: Path) -> None:
    """Three rows of two adapters over two devices, one of which has a row of padding."""
    config["defaults"]["steps"], config["adapters"]["two"]["steps"] = 2, 2
    subprocess.run(
        script(config, "--set", "devices=2", "--set", "batch.rows=3"), env=environment(),
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    config["batch"]["rows"] = 3
    alone, _ = in_process({**config, "out": config["out"] + "-alone"})
    shape, limits = load_config(model), Limits(512, 2**30, 1000)
    for folder in alone:
        found = read_adapter(Path(config["out"]) / folder.name, shape, limits).factors
        for target, (a, b, scale) in read_adapter(folder, shape, limits).factors.items():
            assert abs(found[target].a - a).max() < 1e-4 and abs(found[target].b - b).max() < 1e-4
            assert found[target].scale == scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": {"one": {"layers": [2]}}}, r"adapters\.one\.layers names 2;.*0 to 1"),
        ({"batch": {"tokens": 300}}, r"batch\.tokens is 300; the model has 256"),
        ({"adapters": {"one": {"rnak": 2}}}, r"adapters\.one\.rnak: unknown key.*'rank'"),
        ({"adapters": {"one": {"warmup_steps": 6}}}, "warmup_steps is 6; fewer than steps, 6"),
        ({"adapters": {"one": {"ranks": {"k_proj": 2}, "targets": ["q_proj"]}}}, "ranks names"),
        ({"adapters": {"one": {"held_out": 0.01}}}, "held-out share of 0.01"),
        ({"adapters": {"one": {"data": "nowhere.jsonl"}}}, "cannot read nowhere.jsonl"),
        ({"adapters": {"one": {"learning_rate": 1e38, "clip": None}}}, "loss of step [23] is nan"),
        ({"adapters": {"../up": {}}}, "adapters"),
        ({"adapters": {"checkpoints": {}}}, "adapters: .*checkpoints is something else in `out`"),
        ({"adapters": {"losses.jsonl": {}}}, r"adapters: .*losses\.jsonl is something else"),
        ({"adapters": {"one": {"alpha": math.inf}}}, r"adapters\.one\.alpha.*finite"),
        ({"adapters": {}}, "adapters"),
    ],
)
def test_what_is_wrong_is_named_and_no_adapter_is_written(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        in_process({**config, **change})
    assert not (Path(config["out"]) / "one").exists()


def test_two_runs_do_not_share_checkpoints(config: dict[str, Any]) -> None:
    folder = Path(config["out"]) / "checkpoints"
    folder.mkdir(parents=True)
    with locked(folder), pytest.raises(ConfigError, match="another process is writing checkpoints"):
        in_process(config)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("every", [1, 2])
def test_only_the_adapter_that_diverges_is_blamed_and_it_is_not_kept(
    config: dict[str, Any], every: int
) -> None:
    """Its factors make the losses of all the others not a number either."""
    config["adapters"]["two"] |= {"learning_rate": 1e38, "weight_decay": 100.0}
    config["checkpoints"]["every"] = every
    with pytest.raises(ConfigError, match=r"^adapters\.two: .* after step 1 are not finite"):
        in_process(config)
    assert [path.name for path in (Path(config["out"]) / "checkpoints").iterdir()] == ["run.json"]


@pytest.mark.parametrize("changed", ["held-out.jsonl", "config.json", "model.safetensors"])
def test_a_run_does_not_go_on_with_other_files(
    config: dict[str, Any], model: Path, tmp_path: Path, changed: str
) -> None:
    """Of the base, or of what is held out, which says how long examples are."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    held_out = Path(shutil.copy(config["defaults"]["data"], base / "held-out.jsonl"))
    config["model"]["source"], config["adapters"] = str(base), {"one": {}}
    config["defaults"] |= {"held_out": str(held_out), "steps": 1}
    trainer, checkpoints = prepare(parse(config), QUIET)
    checkpoints.save(trainer.start())
    checkpoints.close()
    prepare(parse(config), QUIET)[1].close()
    data = bytearray((base / changed).read_bytes())
    data[-1:] = b"\1" if changed == "model.safetensors" else data[-1:] + b"\n"
    (base / changed).write_bytes(data)
    with pytest.raises(ConfigError, match="another configuration"):
        prepare(parse(config), QUIET)


def test_more_devices_than_there_are() -> None:
    found = len(jax.devices())
    with pytest.raises(ConfigError, match=f"devices is {found + 1}; there are {found}"):
        make_mesh(found + 1)


def test_checkpoints_of_another_run_and_adapters_that_are_there_are_left_alone(
    config: dict[str, Any],
) -> None:
    in_process({**config, "defaults": {**config["defaults"], "steps": 1}, "adapters": {"one": {}}})
    with pytest.raises(ConfigError, match="another configuration"):
        in_process(config)
    data = Path(config["defaults"]["data"])
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match="another configuration"):
        in_process({**config, "defaults": {**config["defaults"], "steps": 1}})
    other = {**config, "out": config["out"] + "-other"}
    (Path(other["out"]) / "two").mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists already"):
        in_process(other)
