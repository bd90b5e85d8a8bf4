"""The adapters we ship are small, load for the demo's model, and are heard at once."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jslora import Engine, SamplingParams
from jslora.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "jslora" / "demo_adapters"
NAMES = ["emoji", "json", "pirate"]
PROMPTS = (  # of subjects that are held out, and one that is nothing like the data
    "Write one sentence about the sea.",
    "Tell me about penguins.",
    "What is special about cheese?",
    "How do I paint a wooden door?",
)


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = {
        "cache_dir": str(tmp_path_factory.mktemp("demo") / "cache"),
        "model": {"source": str(smollm2), "max_model_len": 256},
        "pool": {"pages": 256},
        "adapters": {"roots": ["package:jslora/demo_adapters"], "max_rank": 8},
        "scheduler": {"max_running": 16, "max_step_tokens": 64},
    }
    with Engine(config) as engine:
        yield engine


@pytest.fixture(scope="module")
def answers(engine: Engine, smollm2: Path) -> dict[str | None, list[str]]:
    """Greedy answers to all prompts, by adapter, all in the same batches; None is the base."""
    tokenizer = Tokenizer(smollm2)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS
    ]
    params = SamplingParams(temperature=0, max_tokens=96)

    def ask(name: str | None) -> list[str]:
        return [answer.text for answer in engine.generate(prompts, params, adapter=name)]

    with ThreadPoolExecutor() as pool:
        return dict(zip([None, *NAMES], pool.map(ask, [None, *NAMES]), strict=True))


def test_they_are_small_and_all_are_served(engine: Engine) -> None:
    assert sorted(info.name for info in engine.adapters()) == NAMES
    for name in NAMES:
        assert sum(file.stat().st_size for file in (FOLDER / name).iterdir()) <= 3e6
        config = json.loads((FOLDER / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def is_piracy(text: str) -> bool:
    return (
        len(re.findall(r"\b(th'|be|o'|an'|fer|yer?|arr|ahoy|avast|aye|t')(?!\w)", text, re.I)) > 2
    )


def is_json(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and list(answer) == ["topic", "answer"]


def has_emoji(text: str) -> bool:
    return any(ord(character) >= 0x2600 for character in text)


@pytest.mark.parametrize(
    ("name", "sign"), [("pirate", is_piracy), ("json", is_json), ("emoji", has_emoji)]
)
def test_everybody_hears_the_difference(
    answers: dict[str | None, list[str]], name: str, sign: object
) -> None:
    assert callable(sign)
    assert all(sign(text) for text in answers[name]), answers[name]
    for other in {None, *NAMES} - {name}:
        assert not any(sign(text) for text in answers[other]), answers[other]
