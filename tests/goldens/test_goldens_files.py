"""The committed goldens are whole, agree with an independent oracle, and could catch a mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.cases import (
    MODELS,
    ROOT,
    SMOLLM2_ADAPTERS,
    Case,
    Composed,
    cases,
    composed,
    digests,
    smollm2_cases,
    write_smollm2_adapters,
)
from oracle import Adapter, compose, forward, load_adapter, load_tensors, log_softmax

TOLERANCE = 1e-4  # float32 against float64
CASES = {case.name: case for case in cases()}
SUMS = {composed.case.name: composed for composed in composed()}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def assert_agrees(case: Case, adapter: Adapter | None) -> None:
    """All that is recorded of a case is what the oracle finds for the model with an adapter."""
    assert [len(prompt) for prompt in case.prompts] == [5, 23, 61]
    weights = load_tensors(case.model_dir / "model.safetensors")
    for i, prompt in enumerate(case.prompts):
        whole = prompt + case.greedy[i]
        logprobs = log_softmax(forward(weights, read_config(case.model_dir), whole, adapter))
        answer = logprobs[len(prompt) - 1 : -1]
        assert answer.argmax(-1).tolist() == case.greedy[i]

        chosen = np.take_along_axis(logprobs[:-1], np.array(whole)[1:, None], axis=1)[:, 0]
        first = answer[0][case.first_ids[i]]
        second, best = np.sort(answer, axis=-1)[:, -2:].T
        assert_close(case.first_logprobs[i], first)
        assert_close(case.prompt_logprobs[i], chosen[: len(prompt) - 1])
        assert_close(case.logprobs[i], chosen[len(prompt) - 1 :])
        assert_close(case.gaps[i], best - second)


def test_files_are_those_the_manifest_lists() -> None:
    manifest = json.loads((ROOT / "manifest.json").read_text())
    assert digests(ROOT) == manifest["sha256"]


def test_goldens_stay_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 4 * 2**20


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_oracle_agrees(case: Case) -> None:
    assert_agrees(case, load_adapter(case.adapter_dir) if case.adapter_dir else None)


@pytest.mark.parametrize(
    "case", [*CASES.values(), *(found.case for found in SUMS.values())], ids=lambda case: case.name
)
def test_no_greedy_step_is_near_a_tie(case: Case) -> None:
    assert case.gaps.shape == (3, 16)
    assert case.gaps.min() > 1e-3


@pytest.mark.parametrize("found", SUMS.values(), ids=SUMS.keys())
def test_oracle_agrees_on_composed_adapters(found: Composed) -> None:
    folder = found.case.model_dir.parent / "adapters"
    parts = [(load_adapter(folder / name), weight) for name, weight in found.weights.items()]
    assert_agrees(found.case, compose(parts))


@pytest.mark.parametrize("found", SUMS.values(), ids=SUMS.keys())
def test_composed_adapters_share_some_modules_and_not_others(found: Composed) -> None:
    folder = found.case.model_dir.parent / "adapters"
    first, *others = (set(load_adapter(folder / name)) for name in found.weights)
    for other in others:
        assert first & other and first ^ other


def without(suffix: str) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def drop(weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        for name in [name for name in weights if name.endswith(suffix)]:
            del weights[name]

    return drop


def plain_rope(weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    config["rope_scaling"] = config["rope_parameters"] = None


def default_theta(weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["rope_theta"] = 10000.0


def wider_eps(weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-2


@pytest.mark.parametrize(
    ("model", "mistake"),
    [
        ("llama", wider_eps),
        ("llama3", plain_rope),
        ("llama3", default_theta),
        ("llama-linear", plain_rope),
        ("qwen2", without("_proj.bias")),
        ("qwen2", default_theta),
        ("qwen3", without("q_norm.weight")),
        ("qwen3", without("k_norm.weight")),
    ],
)
def test_a_mistake_in_the_architecture_shows(
    model: str, mistake: Callable[[dict[str, np.ndarray], dict[str, Any]], None]
) -> None:
    case = CASES[f"{model}/base"]
    weights = load_tensors(case.model_dir / "model.safetensors")
    config = read_config(case.model_dir)
    mistake(weights, config)
    found = log_softmax(forward(weights, config, case.prompts[2]))[-1]
    assert np.abs(found - case.first_logprobs[2]).max() > 0.02


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["r8-rslora", "patterns", "layer1"])
def test_a_mistake_in_reading_an_adapter_shows(model: str, name: str) -> None:
    """Plain scaling instead of rsLoRA's or the patterns', or the next layer's weights."""
    case = CASES[f"{model}/{name}"]
    assert case.adapter_dir is not None
    settings = json.loads((case.adapter_dir / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    adapter = load_adapter(case.adapter_dir)
    mistaken = {
        ((layer - 1) if name == "layer1" else layer, module): (A, B, scale)
        for (layer, module), (A, B, _) in adapter.items()
    }
    weights = load_tensors(case.model_dir / "model.safetensors")
    found = log_softmax(forward(weights, read_config(case.model_dir), case.prompts[1], mistaken))
    assert np.abs(found[-1] - case.first_logprobs[1]).max() > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_every_adapter_answers_in_its_own_way(model: str) -> None:
    greedy = [case.greedy for name, case in CASES.items() if name.startswith(f"{model}/")]
    for i in range(3):
        assert len({tuple(answers[i]) for answers in greedy}) == len(greedy)


def test_smollm2_adapters_are_drawn_as_they_were(tmp_path: Path) -> None:
    write_smollm2_adapters(tmp_path)
    expected = json.loads((ROOT / "smollm2" / "texts.json").read_text())["adapters"]
    assert digests(tmp_path) == expected


def test_smollm2_cases_are_whole(tmp_path: Path) -> None:
    found = smollm2_cases(Path("not-read"), tmp_path)
    assert [case.name for case in found] == [f"smollm2/{n}" for n in ("base", *SMOLLM2_ADAPTERS)]
    for case in found:
        assert np.shape(case.greedy) == case.gaps.shape == case.logprobs.shape == (4, 24)
        assert case.first_ids.shape == case.first_logprobs.shape == (4, 20)
        assert case.first_ids[:, 0].tolist() == [tokens[0] for tokens in case.greedy]
        assert (np.diff(case.first_logprobs) < 0).all()
        assert case.gaps.min() > 1e-3
        assert [len(p) - 1 for p in case.prompts] == [len(p) for p in case.prompt_logprobs]
        assert len(case.texts) == 4
