"""An engine over several devices answers as one over a single device does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import small_engine
from split_engine import ARCHITECTURE, answer_all, open_engine, write_adapters

from jslora.errors import ConfigError, ModelError

SCRIPT = Path(__file__).parent / "split_engine.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    write_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[dict[str, Any]]:
    """What one device answers."""
    with open_engine(folder, 1, "auto") as engine:
        yield answer_all(engine)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("devices", "lora", "processes"),
    [
        (2, "no_collective", 1), (2, "fully_sharded", 1), (4, "no_collective", 1),
        (4, "fully_sharded", 1), (2, "no_collective", 2), (4, "fully_sharded", 2),
    ],
)  # fmt: skip
def test_tokens_are_those_of_one_device(
    devices: int, lora: str, processes: int, folder: Path, alone: dict[str, Any]
) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if processes > 1:  # programs are compiled in each, and must not take long here
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        environment["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"
    run = [sys.executable, str(SCRIPT), str(devices), lora, str(folder), str(processes)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])  # Gloo talks too
    for outcome in (alone, found):
        counts = dict(outcome["counts"])
        assert counts.pop("recoveries") == 0
        assert min(counts.values()) > 0, counts
    for here, there in zip(alone["answers"], found["answers"], strict=True):
        assert here["tokens"] == there["tokens"]
        for name in ("logprobs", "scored"):
            np.testing.assert_allclose(there[name], here[name], atol=2e-4)


def test_what_cannot_be_split_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    odd = {"source": "dummy", "architecture": ARCHITECTURE | {"num_key_value_heads": 2}}
    with pytest.raises(ModelError, match="2 kv heads cannot be split over 4 devices"):
        small_engine(tmp_path, None, model=odd, mesh={"model": 4})


def test_devices_that_are_not_there_are_asked_for_by_number(tmp_path: Path) -> None:
    model = {"source": "dummy", "architecture": ARCHITECTURE}
    with pytest.raises(ConfigError, match=r"mesh\.model: 4 needs 4 devices in every process"):
        small_engine(tmp_path, None, model=model, mesh={"model": 4})
