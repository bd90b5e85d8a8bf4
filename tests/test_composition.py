"""Several adapters in one request: their scaled deltas are added exactly, whatever else runs."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engine_helpers import (
    CONFIG,
    EVERYTHING,
    GOLDEN,
    LLAMA3,
    PROMPT,
    TOLERANCE,
    Ask,
    Asked,
    answers,
    assert_golden,
    assert_nothing_leaked,
    greedy,
    small_engine,
    tight_engine,
    tokens_of,
    wait_until,
)
from goldens.adapters import write_adapter
from goldens.cases import ADAPTERS, COMPOSED, ROOT, cases, composed
from hypothesis import given
from hypothesis import strategies as st

from jslora.composition import compose
from jslora.engine import Engine
from jslora.errors import InvalidRequest, JsloraError, Unavailable, UnknownModel
from jslora.request import MAX_SCALE, Scaled

LONG = [(7 * i) % 250 for i in range(40)]
"""A prompt of two whole pages and a half."""
WIDEST = ("r64-regex", "r8-rslora", "patterns", "layer1")
"""Adapters whose ranks together are one above what `engine` allows."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with golden_engine(tmp_path_factory.mktemp("engine"), "llama3") as engine:
        yield engine
        assert_nothing_leaked(engine)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with golden_engine(tmp_path_factory.mktemp("engine"), "qwen3") as engine:
        yield engine


def golden_engine(tmp: Path, model: str) -> Engine:
    adapters = {"roots": [str(ROOT / model / "adapters")], "preload": "all", "max_rank": 84}
    return small_engine(tmp, ROOT / model / "model", adapters=adapters)


# What is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fixture", "model"), [("engine", "llama3"), ("qwen3", "qwen3")])
def test_sums_are_those_of_peft_in_a_batch_with_everything_else(
    request: pytest.FixtureRequest, fixture: str, model: str
) -> None:
    """Sums, single adapters and the base, each golden prompt of each, shuffled into one batch."""
    folder = ROOT / model
    wanted: list[tuple[Any, Any]] = [
        (found.case, dict(found.weights)) for found in composed()
        if found.case.model_dir.parent == folder
    ]  # fmt: skip
    assert len(wanted) == len(COMPOSED[model])
    for case in cases():
        if case.model_dir.parent == folder:
            wanted.append((case, case.adapter_dir.name if case.adapter_dir else None))
    places = [(case, adapter, i) for i in range(3) for case, adapter in wanted]
    np.random.default_rng(0).shuffle(places)  # type: ignore[arg-type]
    asks = [Ask(case.prompts[i], GOLDEN, adapter) for case, adapter, i in places]
    found = answers(request.getfixturevalue(fixture), asks)
    for answer, (case, _, i) in zip(found, places, strict=True):
        assert_golden(answer, case, i)


def test_any_sum_is_that_of_the_oracle(engine: Engine) -> None:
    """Up to four adapters with any scales, what PEFT cannot add among them."""
    rng = np.random.default_rng(3)
    weights = oracle.load_tensors(LLAMA3 / "model" / "model.safetensors")
    parts = {name: oracle.load_adapter(LLAMA3 / "adapters" / name) for name in ADAPTERS}
    sums = []
    for _ in range(16):
        names = rng.choice(ADAPTERS, rng.integers(1, 5), replace=False).tolist()
        names = names[:3] if {*names} == {*WIDEST} else names
        sums.append({name: round(MAX_SCALE * rng.random(), 3) for name in names})
    prompts = [rng.integers(0, 256, rng.integers(3, 40)).tolist() for _ in sums]
    params = greedy(1, logprobs=20, prompt_logprobs=0)
    asks = [Ask(prompt, params, each) for prompt, each in zip(prompts, sums, strict=True)]
    for answer, prompt, each in zip(answers(engine, asks), prompts, sums, strict=True):
        adapter = oracle.compose([(parts[name], scale) for name, scale in each.items()])
        expected = oracle.log_softmax(oracle.forward(weights, CONFIG, prompt, adapter))
        scored = [entry.logprob for entry in answer.prompt_logprobs[1:]]
        chosen = expected[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scored, chosen, rtol=0, atol=TOLERANCE)
        for token, logprob in answer.logprobs[0].top:
            assert abs(logprob - expected[-1, token]) <= TOLERANCE, each


def test_batch_mates_change_nothing(engine: Engine) -> None:
    sums: list[Any] = [{"r5": 0.7, "patterns": 1.2}, {"r5": 0.7}, {"patterns": 1.2}, "r5", None]
    sums += [{"r5": 0.7, "patterns": 1.2, "layer1": 1.0}, {"r5": 1.2, "patterns": 0.7}]
    asks = [Ask([*PROMPT, n], greedy(10, logprobs=0), each) for n in range(3) for each in sums]
    together = answers(engine, asks)
    for ask, one in zip(asks, together, strict=True):
        (alone,) = answers(engine, [ask])
        assert one.tokens == alone.tokens
        found, expected = ([entry.logprob for entry in a.logprobs] for a in (one, alone))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert len({answer.tokens for answer in together[: len(sums)]}) > len(sums) // 2


def test_all_methods_take_scales(engine: Engine) -> None:
    each = {"r5": 0.7, "r8-rslora": 1.3}
    (expected,) = tokens_of(engine, [Ask(PROMPT, greedy(), each)])
    assert expected != tokens_of(engine, [Ask(PROMPT, greedy(), "r5")])[0]
    assert engine.generate([PROMPT, PROMPT], greedy(), each)[1].tokens == expected
    pieces = [chunk.tokens for chunk in engine.stream(PROMPT, greedy(), each)]
    assert sum(pieces, ()) == expected

    async def both() -> tuple[int, ...]:
        (whole,) = await engine.generate_async(PROMPT, greedy(), each)
        assert whole.tokens == expected
        parts = [chunk.tokens async for chunk in engine.stream_async(PROMPT, greedy(), each)]
        return sum(parts, ())

    assert asyncio.run(both()) == expected


# What is shared ----------------------------------------------------------------------------------


def cached(engine: Engine, adapter: Any) -> int:
    (answer,) = answers(engine, [Ask(LONG, greedy(1), adapter)])
    return answer.cached_tokens


def test_cached_pages_are_those_of_equal_sums(engine: Engine) -> None:
    assert cached(engine, {"r1": 0.5, "layer1": 1.5}) == 0
    assert cached(engine, {"layer1": 1.5, "r1": 0.5}) == 32
    others: list[Any] = [
        {"r1": 0.5}, {"r1": 1.5, "layer1": 0.5}, {"r1": 0.5, "layer1": 1.4}, "r1", None,
        {"r1": 0.5, "layer1": 1.5, "r5": 1.0}, {"r1": 0.5, "layer1": 1.5, "r5": 0.0},
    ]  # fmt: skip
    for other in others:
        assert cached(engine, other) == 0, other
    assert cached(engine, {"r1": 1.0}) == 32
    assert cached(engine, {"r1": 1}) == 32


def test_a_reload_makes_another_sum(engine: Engine) -> None:
    """What runs goes on with the weights it began with; what comes gets the new ones."""
    each = {"mine": 0.5, "r1": 1.0}
    engine.load_adapter("mine", "r5")
    before, after = tokens_of(
        engine, [Ask(LONG, greedy(60), {n: 0.5, "r1": 1.0}) for n in ("r5", "r8-rslora")]
    )
    assert before != after
    asked = Asked(engine, [Ask(LONG, greedy(60), each)])
    wait_until(lambda: engine.stats().running == 1)
    engine.load_adapter("mine", "r8-rslora", replace=True)
    (late,) = answers(engine, [Ask(LONG, greedy(60), each)])
    (early,) = asked.outcomes()
    assert not isinstance(early, JsloraError)
    assert (early.tokens, late.tokens) == (before, after)
    engine.unload_adapter("mine")


def test_an_unload_ends_the_sums_that_hold_the_adapter(engine: Engine) -> None:
    engine.load_adapter("mine", "r5")
    sums = [{"mine": 0.5, "r1": 1.0}, {"r1": 1.0, "r5": 0.5}]
    asked = Asked(engine, [Ask(LONG, greedy(80), each) for each in sums])
    wait_until(lambda: engine.stats().running == 2)
    assert set(engine.stats().running_adapters) == {"mine", "r1", "r5"}
    engine.unload_adapter("mine", drain_seconds=0)
    ended, other = asked.outcomes()
    assert isinstance(ended, Unavailable)
    assert not isinstance(other, JsloraError) and len(other.tokens) == 80
    with pytest.raises(UnknownModel):
        engine.generate(PROMPT, greedy(), sums[0])


def test_sums_take_turns_where_few_adapters_fit(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pairs of four adapters, of which three fit at a time beside the keys and values."""
    tmp = tmp_path_factory.mktemp("tight")
    for i in range(4):
        write_adapter(tmp / f"wide-{i}", CONFIG, EVERYTHING, 16, i, 0.3, "float32")
    pairs = [{f"wide-{i}": 0.9, f"wide-{j}": 0.4} for i in range(4) for j in range(4) if i != j]
    asks = [Ask(PROMPT, greedy(8), each) for each in (*pairs, *(f"wide-{i}" for i in range(4)))]
    with tight_engine(tmp, adapters={"preload": "all"}) as tight:
        found = tokens_of(tight, asks)
        assert tight.stats().adapter_evictions > 0
        alone = [tokens_of(tight, [ask])[0] for ask in asks]
        assert found == alone and len(set(found)) > len(asks) // 2
        with pytest.raises(InvalidRequest, match="36"):
            tight.generate(PROMPT, greedy(8), {f"wide-{i}": 1.0 for i in range(4)})
        assert_nothing_leaked(tight)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "kind", "named"),
    [
        ({"r5": -0.1}, InvalidRequest, "-0.1"),
        ({"r5": 2.001, "r1": 1.0}, InvalidRequest, "'r5' is 2.001, not a number from 0 to 2"),
        ({"r5": math.nan}, InvalidRequest, "nan"),
        ({"r5": True}, InvalidRequest, "True"),
        ({"r5": "1"}, InvalidRequest, "'1'"),
        (["r5"], InvalidRequest, "a name or scales"),
        ({1: 0.5, "r5": 1.0}, InvalidRequest, "1 is no adapter's name"),
        ({name: 1.0 for name in ADAPTERS[:5]}, InvalidRequest, "5 adapters"),
        ({name: 0.5 for name in WIDEST}, InvalidRequest, "make 85.*together may have 84"),
        ({"r5": 1.0, "nobody": 1.0}, UnknownModel, "nobody"),
        ({"r5": 1.0, "base": 1.0}, InvalidRequest, "'base' is the base"),
    ],
)
def test_what_cannot_be_added_is_refused(
    engine: Engine, adapter: Any, kind: type[JsloraError], named: str
) -> None:
    with pytest.raises(kind, match=named):
        engine.generate(PROMPT, greedy(), adapter)
    assert all(info.in_flight == 0 for info in engine.adapters())


def test_aliases_are_followed_before_adapters_are_added(engine: Engine) -> None:
    expected = tokens_of(engine, [Ask(PROMPT, greedy(), {"r1": 0.5, "r5": 1.0})])
    engine.alias("mine", {"r1": 1})
    engine.alias("none", {"base": 1})
    assert tokens_of(engine, [Ask(PROMPT, greedy(), {"mine": 0.5, "r5": 1.0})]) == expected
    sums: list[Any] = [{"mine": 0.5, "r5": 1.0, "none": 0.3}, {"none": 0.2}, None]
    found, nothing, base = tokens_of(engine, [Ask(PROMPT, greedy(), each) for each in sums])
    assert [found] == expected and nothing == base
    with pytest.raises(InvalidRequest, match="'r1' is named twice"):
        engine.generate(PROMPT, greedy(), {"mine": 0.5, "r1": 1.0})
    engine.remove_alias("mine")
    engine.remove_alias("none")


SCALES = st.floats(0, MAX_SCALE) | st.sampled_from((0, 1, 2))


@given(st.dictionaries(st.text(max_size=3), SCALES, max_size=6), st.integers(1, 6), st.randoms())
def test_order_of_names_does_not_matter(asked: dict[str, float], most: int, random: Any) -> None:
    items = list(asked.items())
    random.shuffle(items)
    if len(items) > most:
        with pytest.raises(InvalidRequest, match=f"{len(items)} adapters"):
            compose(items, most)
        return
    found = compose(items, most)
    assert dict(found) == asked and all(isinstance(each, Scaled) for each in found)
    assert found == compose(asked.items(), most) and list(found) == sorted(found)
