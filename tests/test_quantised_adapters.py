"""Adapters stored as integers, in engines: they answer what their numbers answer in full."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import (
    CONFIG,
    EVERYTHING,
    LLAMA3,
    PROMPT,
    Ask,
    answers,
    assert_nothing_leaked,
    greedy,
    small_engine,
)
from goldens.adapters import write_adapter
from quantised_engine import write_numbers

from jslora.engine import Engine
from jslora.errors import ConfigError
from jslora.model.config import from_hf

STORED = {"eight": "int8", "four": "int4", "narrow": "int4"}
PARAMS = dataclasses.replace(greedy(10, ignore_eos=True), logprobs=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    tmp = tmp_path_factory.mktemp("engine")
    for seed, (name, targets, rank) in enumerate([
        ("eight", EVERYTHING, 16), ("four", EVERYTHING, 5), ("narrow", ["v_proj"], 3),
        ("plain", ["q_proj", "down_proj"], 9),
    ]):  # fmt: skip
        write_adapter(tmp / name, CONFIG, targets, rank, seed, 1.0, "float32")
    for name, storage in STORED.items():
        write_numbers(tmp / name, tmp / f"{name}-numbers", from_hf(CONFIG), storage)
    adapters = {"storage_of": STORED, "preload": "all"}
    with small_engine(tmp, LLAMA3 / "model", adapters=adapters) as engine:
        yield engine
        assert_nothing_leaked(engine)


def same(one: Any, other: Any) -> None:
    assert one.tokens == other.tokens
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, rtol=0, atol=1e-5)


def test_integers_answer_as_their_numbers_in_batches_of_everything(engine: Engine) -> None:
    names = [*STORED, *(f"{name}-numbers" for name in STORED), "plain", None]
    prompts = [PROMPT, list(range(40)), [9, 8]]
    asks = [Ask(prompt, PARAMS, name) for prompt in prompts for name in names]
    found = dict(zip([(len(a.prompt), a.adapter) for a in asks], answers(engine, asks),
                     strict=True))  # fmt: skip
    for prompt in prompts:
        for name in STORED:
            same(found[len(prompt), name], found[len(prompt), f"{name}-numbers"])
    tokens = {found[40, name].tokens for name in ("eight", "four", "plain", None)}
    assert len(tokens) == 4, "each of them changes what is answered"


def test_composed_with_scales(engine: Engine) -> None:
    integers = {"eight": 0.5, "four": 1.5, "plain": 1.0}
    numbers = {"eight-numbers": 0.5, "four-numbers": 1.5, "plain": 1.0}
    same(*answers(engine, [Ask(PROMPT, PARAMS, names) for names in (integers, numbers)]))


def test_reports_tell_how_an_adapter_is_stored(engine: Engine) -> None:
    answers(engine, [Ask(PROMPT, PARAMS, name) for name in STORED])
    infos = {info.name: info for info in engine.adapters()}
    errors = [infos[name].output_error for name in ("plain", "eight", "four")]
    assert [infos[name].storage for name in ("plain", "eight", "four")] == ["full", "int8", "int4"]
    assert errors[1] and errors[2] and 0 < errors[1] < 0.02 < errors[2] < 0.3
    whole = infos["eight-numbers"]
    assert infos["eight"].pages < 0.4 * whole.pages and infos["eight"].digest != whole.digest
    # Words of float32 hold four of them.
    assert infos["eight"].bytes_host < 0.4 * whole.bytes_host


def test_rows_that_cannot_be_stored_so_are_refused_at_the_start(tmp_path: Path) -> None:
    odd = {**CONFIG, "intermediate_size": 98}
    model = {"source": "dummy", "architecture": odd}
    with pytest.raises(ConfigError, match=r"int8 cannot be had for gate_proj.* 98 numbers"):
        small_engine(tmp_path, None, model=model, adapters={"storage": "int8"})


@pytest.mark.parametrize(("devices", "lora"), [(2, "fully_sharded")])
def test_over_several_devices(tmp_path: Path, devices: int, lora: str) -> None:
    script = Path(__file__).with_name("quantised_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(devices), lora, str(tmp_path / "adapters")],
        capture_output=True, text=True, check=False, cwd=script.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
