"""Scores of a text: every token but a window's first, compared token by token."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import LLAMA3, small_config, write_tokenizer

from jslora.config import EngineConfig, parse
from jslora.engine import Engine
from jslora.errors import ConfigError
from jslora.evaluation.perplexity import TEXT, Scores, compare, score, score_ways
from jslora.request import SamplingParams

WORDS = "the quick brown fox jumps over it"  # one token a byte


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("perplexity")
    shutil.copytree(LLAMA3 / "model", folder / "model")
    write_tokenizer(folder / "model")
    return parse(small_config(folder, folder / "model"))


def test_every_window_is_scored_by_itself(config: EngineConfig) -> None:
    found = score(config, WORDS, 8)
    assert len(WORDS) == 33 and found.logprobs.size == 4 * 7, "the last window is one token"
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=0)
        likeliest = []
        for place in range(1, 8):  # what the model would say next, asked one by one
            (answer,) = engine.generate([list(WORDS.encode()[8 : 8 + place])], params)
            likeliest.append(answer.logprobs[0])
    assert found.likeliest[7:14].tolist() == [token.token for token in likeliest]
    best = np.array([token.logprob for token in likeliest])
    assert (found.logprobs[7:14] <= best + 1e-4).all()
    assert found.perplexity == pytest.approx(math.exp(-sum(found.logprobs) / 28))


def test_ways_are_compared_on_the_same_tokens(config: EngineConfig) -> None:
    found = score_ways(config, ["none", "int8"], WORDS, 16)
    apart = compare(found["none"], found["int8"])
    assert apart.ratio == pytest.approx(found["int8"].perplexity / found["none"].perplexity)
    assert apart.ratio != 1 and apart.error > 0 and 0.5 < apart.agreement <= 1


def test_a_difference_has_an_error() -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(-3, 2, 10_000), rng.normal(0.02, 0.1, 10_000)
    choice = np.arange(10_000)
    apart = compare(Scores(base, choice), Scores(base - noise, np.where(choice % 4, choice, -1)))
    assert abs(apart.ratio - math.exp(0.02)) < 4 * apart.error
    assert apart.error == pytest.approx(math.exp(0.02) * 0.1 / 100, rel=0.05)
    assert apart.agreement == 0.75


@pytest.mark.parametrize(
    ("window", "allowed"), [(1, "it must have at least 2"), (100_000, "the model's context is")]
)
def test_a_window_is_within_what_the_model_sees(
    window: int, allowed: str, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError, match=f"a window of {window} tokens; {allowed}"):
        score(config, WORDS, window)


def test_a_model_without_a_tokenizer_reads_no_text(tmp_path: Path) -> None:
    config = parse(small_config(tmp_path, LLAMA3 / "model"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        score(config, WORDS, 8)


def test_the_text_is_long_enough() -> None:
    assert len(TEXT.read_text().split()) > 1500
