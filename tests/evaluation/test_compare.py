"""Two sides compared: against the float64 oracle, and by the script on a model that can write."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
from engine_helpers import write_tokenizer
from goldens.cases import ROOT
from hypothesis import given
from hypothesis import strategies as st

from jslora.engine import Engine
from jslora.errors import ConfigError, InvalidRequest
from jslora.evaluation.compare import (
    Answer,
    Place,
    Side,
    compare,
    comparison_config,
    divergence,
    room,
    summary,
    tokenized,
)
from jslora.fetch import load_config
from jslora.tokenizer import Tokenizer
from scripts import adapters

LLAMA = ROOT / "llama"
R5 = LLAMA / "adapters" / "r5"
PROMPTS = [[5, 6, 7, 8], list(range(40, 60))]
TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("compare") / "model"
    shutil.copytree(LLAMA / "model", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    sides = Side(None), Side(R5)
    config = comparison_config(model, "float32", *sides, 128, model.parent / "cache")
    with Engine(config) as engine:
        yield engine


def _logprobs(tokens: list[int], adapter: Path | None) -> np.ndarray:
    """[T, V], of what follows each token."""
    folder = LLAMA / "model"
    return oracle.log_softmax(
        oracle.forward(
            oracle.load_tensors(folder / "model.safetensors"),
            json.loads((folder / "config.json").read_text()),
            tokens,
            oracle.load_adapter(adapter) if adapter else None,
        )
    )


def _greedy(prompt: list[int], adapter: Path | None) -> list[int]:
    tokens: list[int] = []
    for _ in range(TOKENS):
        tokens.append(int(_logprobs(prompt + tokens, adapter)[-1].argmax()))
    return tokens


def test_figures_are_those_of_the_whole_distributions(engine: Engine) -> None:
    answers = compare(engine, Side(None), Side(R5), PROMPTS, TOKENS)
    assert engine.tokenizer
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens, others = _greedy(prompt, None), _greedy(prompt, R5)
        assert answer.left == engine.tokenizer.decode(tokens)
        assert answer.right == engine.tokenizer.decode(others)
        assert answer.same == (tokens == others) and len(answer.places) == TOKENS
        left, right = (_logprobs(prompt + tokens, a)[len(prompt) - 1 : -1] for a in (None, R5))
        for i, place in enumerate(answer.places):
            assert place.agrees == (left[i].argmax() == right[i].argmax())
            assert abs(place.off - abs(left[i, tokens[i]] - right[i, tokens[i]])) < 2e-3
            whole = float(np.sum(np.exp(left[i]) * (left[i] - right[i])))
            assert 0 <= place.kl <= whole + 1e-3
    told = summary(answers)
    assert (told["tokens"], told["prompts"], told["same_texts"]) == (2 * TOKENS, 2, 0)
    assert 0 <= told["agreement"] < 1 and told["kl_max"] > 0.1
    assert told["logprob_off_mean"] < told["logprob_off_max"]


def test_a_side_equals_itself(engine: Engine) -> None:
    for side in (Side(None), Side(R5)):
        told = summary(compare(engine, side, side, PROMPTS, TOKENS))
        assert told["agreement"] == 1 and told["same_texts"] == 2
        assert told["logprob_off_max"] == 0 and told["kl_max"] == 0


def test_no_token_is_no_figure() -> None:
    told = summary([Answer("", "", True, ())])
    assert told["tokens"] == 0 and told["agreement"] is None and told["kl_max"] is None
    told = summary([Answer("a", "b", False, (Place(False, 0.5, 0.25), Place(True, 0.0, 0.0)))])
    assert (told["agreement"], told["logprob_off_mean"], told["kl_mean"]) == (0.5, 0.25, 0.125)


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=3, max_size=12), st.data())
def test_the_divergence_of_what_is_known_is_at_most_the_whole_one(
    logits: list[tuple[float, float]], data: st.DataObject
) -> None:
    left, right = (oracle.log_softmax(np.array(side)) for side in zip(*logits, strict=True))
    whole = float(np.sum(np.exp(left) * (left - right)))
    every = range(len(logits))
    known = data.draw(st.sets(st.sampled_from(list(every)), max_size=len(logits) - 1))
    found = divergence({t: left[t] for t in every}, {t: right[t] for t in known})
    assert 0 <= found <= whole + 1e-6
    exact = divergence(dict(enumerate(left.tolist())), dict(enumerate(right.tolist())))
    assert math.isclose(exact, whole, abs_tol=1e-6)


def test_sides_are_read() -> None:
    assert Side.parse("base") == Side(None)
    assert Side.parse(str(R5)) == Side(R5) and Side.parse(f"{R5}:int4") == Side(R5, "int4")
    for text in (f"{R5}:int5", "nowhere", ":int8", ""):
        with pytest.raises(ConfigError, match="is neither 'base' nor an adapter's folder"):
            Side.parse(text)


def test_only_the_sides_folders_can_be_read(model: Path) -> None:
    config = comparison_config(model, "float32", Side(R5, "int8"), Side(None), 64, model.parent)
    assert config.adapters.roots == [R5.parent] and config.adapters.preload == "none"
    assert config.adapters.storage_of == {"left": "int8"}


def test_room_is_for_the_longest_prompt_and_its_answer(model: Path) -> None:
    config = load_config(model)
    assert config.max_positions == 256
    assert room(config, PROMPTS, 236) == 256
    for most in (0, 237):
        with pytest.raises(ConfigError, match=f"longest prompt has 20 tokens .* {most};"):
            room(config, PROMPTS, most)


def test_prompts_of_every_kind_are_tokenized(model: Path, tmp_path: Path) -> None:
    assert tokenized(Tokenizer(model), ["ab", (1, 2, 3)]) == [[97, 98], [1, 2, 3]]
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenized(Tokenizer(model), [chat])
    shutil.copytree(model, tmp_path / "chat")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}>"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    assert tokenized(Tokenizer(tmp_path / "chat"), [chat]) == [[ord(c) for c in "hi>"]]


def test_the_script_tells_what_a_storage_changes(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello!"}\n{"prompt": "Bye"}\n')
    command = ["compare", "--model", str(model), "--cache-dir", str(model.parent / "cache")]
    command += ["--dtype", "float32", "--max-tokens", "4", "--prompts", str(tmp_path / "p.jsonl")]
    assert adapters.main([*command, "--json", str(R5), f"{R5}:int8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == 2 and told["tokens"] == 8
    assert 0 < told["logprob_off_max"] < 0.5 and told["answers"][0]["places"][0]["kl"] >= 0


def test_texts_stand_side_by_side(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is left out."""
    answer = Answer("one two three four\nfive\x1b", "six", False, (Place(True, 0.125, 0.5),))
    monkeypatch.setattr("jslora.engine.Engine", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("jslora.evaluation.compare.compare", lambda *_: [answer])
    monkeypatch.setenv("COLUMNS", "43")
    command = ["compare", "--model", str(model), "--prompt", "Hello!", "base", str(R5)]
    assert adapters.main(command) == 0
    assert capsys.readouterr().out.splitlines()[:11] == [
        ">>> Hello!",
        "base                 | r5",
        "",
        "one two three four   | six",
        "five\\x1b             |",
        "",
        "prompts           1",
        "same_texts        0",
        "tokens            1",
        "agreement         1",
        "logprob_off_max   0.125",
    ]


def test_the_script_s_errors_are_precise(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        assert adapters.main(["compare", "--model", str(model), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    hello = ("--prompt", "Hello!")
    assert "'nowhere' is neither" in refused("base", "nowhere", *hello)
    assert "this model has no chat template" in refused("base", R5, *hello, "--chat")
    assert "may have 9999;" in refused("base", R5, *hello, "--max-tokens", 9999)
    (tmp_path / "p.jsonl").write_text('{"text": "a"}')
    assert "p.jsonl:1: Object contains unknown" in refused(
        "base", R5, "--prompts", tmp_path / "p.jsonl"
    )
