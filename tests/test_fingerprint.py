"""The fingerprint model tells what it says it tells: by the oracle, and on the engine."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fingerprint
import numpy as np
import oracle
import pytest
from engine_helpers import Ask, small_engine, tokens_of
from fingerprint import ALARMS, CONFIG, FAMILIES, IDS, LENGTH, token

from jslora.batch import Applied, StepRows
from jslora.engine import Engine
from jslora.request import SamplingParams
from jslora.schedule.scheduler import Plan

PROMPT = [token(5, number) for number in range(40)]


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count)


def rank(number: int) -> int:
    return 1 + number % 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and every adapter, of the ranks 1 to 16."""
    folder = tmp_path_factory.mktemp("fingerprint")
    fingerprint.write_model(folder / "model")
    for number in range(1, IDS):
        fingerprint.write_adapter(folder / "adapters" / f"{number}", number, rank(number))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with small_engine(
        folder / "adapters", folder / "model",
        pool={"pages": 400, "page_size": 8}, adapters={"preload": "all"},
    ) as engine:  # fmt: skip
        yield engine


def test_every_adapter_writes_its_own_id_by_the_oracle(folder: Path) -> None:
    weights = oracle.load_tensors(folder / "model" / "model.safetensors")
    for number in range(IDS):
        adapter = oracle.load_adapter(folder / "adapters" / f"{number}") if number else None
        family, length = number % FAMILIES, LENGTH if number % 9 == 0 else 1 + number
        prompt = [token(family, (number * i) % IDS) for i in range(length)]
        logits = oracle.forward(weights, CONFIG, prompt, adapter)
        assert (logits.argmax(1) == token(family, number)).all()
        first, second = np.sort(logits, axis=1)[:, :-3:-1].T
        assert (second < 0.6 * first).all()
        assert np.abs(logits[:, ALARMS.start : ALARMS.stop]).max() < 0.01


def test_every_adapter_writes_its_own_id_in_every_mix(engine: Engine) -> None:
    asks = [
        Ask([token(family, (number + i) % IDS) for i in range(1 + number % 40)], greedy(6),
            str(number) if number else None)
        for number in range(IDS) for family in range(FAMILIES)
    ]  # fmt: skip
    wanted = [(token(ask.prompt[0] // IDS, int(ask.adapter or 0)),) * 6 for ask in asks]
    found = [
        tokens for i in range(0, len(asks), 128) for tokens in tokens_of(engine, asks[i : i + 128])
    ]
    assert found == wanted


def interfere(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, change: Callable[[Plan], Plan]
) -> None:
    execute = engine.core.runner.execute
    monkeypatch.setattr(engine.core.runner, "execute", lambda plan: execute(change(plan)))


def placed(engine: Engine, name: str) -> Any:
    """Where an adapter lies, after it was used."""
    tokens_of(engine, [Ask([token(0, 0)], greedy(1), name)])
    digest = next(info.digest for info in engine.adapters() if info.name == name)
    return engine.core.residency.residents[digest].placement


@pytest.mark.parametrize(("mine", "other"), [("7", "8"), ("16", "15"), ("1", None), (None, "9")])
def test_keys_written_under_another_adapter_raise_an_alarm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, mine: str | None, other: str | None
) -> None:
    """The first chunk of the prompt is computed under `other`, the rest under `mine`."""
    foreign = (Applied(placed(engine, other)),) if other else ()

    def change(plan: Plan) -> Plan:
        rows = [row._replace(applied=foreign) if row.position == 0 else row for row in plan.rows]
        return dataclasses.replace(plan, rows=StepRows.of(rows))

    interfere(engine, monkeypatch, change)
    (found,) = tokens_of(engine, [Ask(PROMPT, greedy(3), mine)])
    assert set(found) <= {*ALARMS}


def test_one_foreign_position_of_a_whole_context_raises_an_alarm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value cached by one layer for one position, marked by an adapter one sign away."""
    last = LENGTH - 2

    def change(plan: Plan) -> Plan:
        (row,) = plan.rows
        if row.position == last:
            device = engine.core.runner.devices
            value = (row.pages[0], 3, 1, 0, FAMILIES)
            device.pages = device.pages.at[value].multiply(-1)
        return plan

    interfere(engine, monkeypatch, change)
    prompt = [token(3, i % IDS) for i in range(last)]
    (found,) = tokens_of(engine, [Ask(prompt, greedy(2), "33")])
    assert found[0] == token(3, 33)
    assert found[1] in ALARMS


@pytest.mark.parametrize("page", ["zeros", "family"])
def test_a_page_that_was_not_written_or_is_another_prompts_raises_an_alarm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """The row's table names a page of zeros, or of the same adapter under another family."""

    def change(plan: Plan) -> Plan:
        rows = plan.rows
        if len(rows) == 2 and all(rows.position >= 16):
            rows.table[1, 0] = 0 if page == "zeros" else rows.table[0, 0]
        return plan

    interfere(engine, monkeypatch, change)
    prompts = [[token(family, 1)] * 16 for family in (2, 3)]
    one, two = tokens_of(engine, [Ask(prompt, greedy(4), "5") for prompt in prompts])
    assert one == (token(2, 5),) * 4
    assert two[0] == token(3, 5)
    assert set(two[1:]) <= {*ALARMS}
