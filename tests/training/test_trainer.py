"""Losses and factors are those of torch and PEFT, and those of each adapter alone."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from training_world import GOLDENS, Given, drawn_task, flat, run, section, trainer

from jslora.training.adapters import Pair
from jslora.training.data import Example
from jslora.training.trainer import State, Task, Trainer

TOLD: dict[str, Any] = json.loads((GOLDENS / "trained.json").read_text())
ARRAYS = load_file(GOLDENS / "trained.safetensors")
TWO = {"rows": 2, "tokens": 32}


def golden_trainer(name: str, **wishes: Any) -> Trainer:
    case = TOLD[name]
    rows = [
        [
            Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= unlearnt)
            for tokens, unlearnt in row
        ]
        for row in case["rows"]
    ]
    task = Task(section(**case["adapter"]), Given(rows), [])  # type: ignore[arg-type]
    return trainer(case["model"], {"it": task}, case["batch"], **wishes)


def golden_factors(name: str, when: str) -> dict[str, np.ndarray]:
    """By layer, module and letter."""
    start = f"{name}.{when}."
    return {key.removeprefix(start): x for key, x in ARRAYS.items() if key.startswith(start)}


def begin(trainer: Trainer, factors: dict[str, np.ndarray]) -> State:
    """A start from given factors."""
    state = trainer.start()
    trained = {}
    for module, pair in state.trained["it"].items():
        layers = sorted({key.split(".")[0] for key in factors if f".{module}." in key}, key=int)
        a, b = ([factors[f"{layer}.{module}.{x}"] for layer in layers] for x in "AB")
        assert np.shape(a) == pair.a.shape
        trained[module] = Pair(jnp.stack(a), jnp.stack([x.T for x in b]))
    return state._replace(trained={"it": trained})


@pytest.mark.parametrize(
    ("name", "recompute"), [("adamw", False), ("sgd", True), ("biased", False)]
)
def test_losses_and_factors_are_those_of_torch_and_peft(name: str, recompute: bool) -> None:
    made = golden_trainer(name, recompute=recompute)
    first, last = golden_factors(name, "first"), golden_factors(name, "last")
    state, losses = run(made, len(TOLD[name]["losses"]), begin(made, first))
    np.testing.assert_allclose([x["it"] for x in losses], TOLD[name]["losses"], rtol=0, atol=1e-4)
    found = {
        f"{layer}.{module}.{letter}": x
        for (layer, module), (a, b, _) in made.factors(state, "it").items()
        for letter, x in (("A", a), ("B", b))
    }
    assert found.keys() == last.keys()
    moved = max(np.abs(last[key] - first[key]).max() for key in last)
    worst = max(np.abs(found[key] - last[key]).max() for key in last)
    assert worst < 2e-3 * moved, (worst, moved)


def test_in_bfloat16_losses_are_near_those() -> None:
    made, told = golden_trainer("adamw", dtype="bfloat16"), TOLD["adamw"]["losses"]
    _, losses = run(made, len(told), begin(made, golden_factors("adamw", "first")))
    np.testing.assert_allclose([x["it"] for x in losses], told, rtol=0, atol=0.1)


def test_adapters_trained_together_are_those_trained_alone() -> None:
    sgd: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
    part = ["v_proj", "up_proj"]
    tasks = {
        "whole": drawn_task(1, 32, rank=3, steps=6, warmup_steps=2, dropout=0.2, **sgd),
        "part": drawn_task(2, 32, rank=6, steps=4, targets=part, layers=[1], rslora=True),
    }
    together = trainer("llama3", tasks, TWO)
    state, losses = run(together, 6)
    assert [set(step) for step in losses[3:5]] == [set(tasks), {"whole"}]
    held_out = together.evaluate(state)
    for name, task in tasks.items():
        alone = trainer("llama3", {name: task}, TWO)
        own, own_losses = run(alone, task.section.steps)
        both = [(step[name], mine[name]) for step, mine in zip(losses, own_losses, strict=False)]
        assert np.abs(np.diff(both)).max() < 1e-4
        assert abs(held_out[name] - alone.evaluate(own)[name]) < 1e-4
        found, expected = flat(state.trained[name]), flat(own.trained[name])
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-5)


def test_what_is_trained_on_is_learnt() -> None:
    task = drawn_task(1, 32, rank=8, steps=30, learning_rate=3e-2)
    seen = [example for row in task.source.epoch(0) for example in row]
    made = trainer("llama", {"it": Task(task.section, task.source, seen)}, TWO)
    state = made.start()
    before = made.evaluate(state)["it"]
    state, _ = run(made, 30, state)
    assert made.evaluate(state)["it"] < before - 1


def test_dropout_is_drawn_anew_for_each_row_and_not_when_evaluating() -> None:
    plain = drawn_task(1, 32, steps=3)
    dropped = drawn_task(1, 32, steps=3, dropout=0.5)
    state = trainer("llama", {"it": plain}, TWO).start()
    trained = {
        m: Pair(p.a, p.a[..., :1] + jnp.zeros_like(p.b)) for m, p in state.trained["it"].items()
    }
    state = state._replace(trained={"it": trained})
    makers = [trainer("llama", {"it": task}, TWO) for task in (plain, dropped)]
    assert len({made.evaluate(state)["it"] for made in makers}) == 1
    losses = [made.step(state)[1].losses["it"] for made in makers]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert losses[1] == makers[1].step(state)[1].losses["it"]


def test_layers_and_modules_that_are_not_targeted_stay_as_they_are() -> None:
    task = drawn_task(1, 32, steps=3, targets=["q_proj"], layers=[1])
    made = trainer("llama", {"it": task}, TWO)
    state, _ = run(made, 3)
    assert list(made.factors(state, "it")) == [(1, "q_proj")]
