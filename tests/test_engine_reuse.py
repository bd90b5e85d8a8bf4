"""What is kept between requests is only ever used where it is right: cached pages, names, tiers."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import (
    CONFIG,
    LLAMA3,
    Ask,
    Asked,
    answers,
    assert_nothing_leaked,
    greedy,
    small_engine,
    tokens_of,
    wait_until,
)
from goldens.adapters import write_adapter
from goldens.cases import ADAPTERS
from safetensors.numpy import load_file, save_file

from jslora.adapters.reader import Reader
from jslora.calls import Chunk
from jslora.engine import Engine
from jslora.errors import (
    AdapterRejected,
    CorruptOutput,
    EngineFailed,
    InvalidRequest,
    UnknownModel,
)
from jslora.request import SamplingParams

LONG = [(7 * i) % 250 for i in range(70)]
SIZE = 16
"""Tokens a page."""


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("reuse")
    shutil.copytree(LLAMA3 / "adapters", tmp, dirs_exist_ok=True)
    return tmp


@pytest.fixture(scope="module")
def cold(tmp: Path) -> Iterator[Engine]:
    """What answers are compared with: nothing is cached here."""
    with small_engine(
        tmp, LLAMA3 / "model", adapters={"preload": "all"}, pool={"prefix_cache": False}
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared(tmp: Path) -> Iterator[Engine]:
    with small_engine(tmp, LLAMA3 / "model", adapters={"preload": "all"}) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """An engine that has computed nothing yet, as far as its prefix cache knows."""
    shared.core.run_on_engine(shared.core.prefix.clear)
    yield shared
    assert_nothing_leaked(shared)


# The prefix cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "r5", "r64-regex"])
def test_what_was_cached_answers_as_what_was_computed(
    engine: Engine, cold: Engine, adapter: str | None
) -> None:
    params = greedy(20, logprobs=3)
    for prompt, cached in (
        (LONG, 0),
        (LONG, 64),  # its last token is computed again, with the page it is in
        (LONG[:64], 48),
        (LONG[:40] + [3] * 40, 32),
        ([1, *LONG], 0),
    ):
        [found] = answers(engine, [Ask(prompt, params, adapter)])
        [expected] = answers(cold, [Ask(prompt, params, adapter)])
        assert found.cached_tokens == cached and expected.cached_tokens == 0
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(
            [entry.logprob for entry in found.logprobs],
            [entry.logprob for entry in expected.logprobs],
            atol=1e-4,
        )


def test_a_conversation_goes_on_from_its_own_answer(engine: Engine, cold: Engine) -> None:
    first = engine.generate([LONG], greedy(30), "r5")[0]
    turn = [*LONG, *first.tokens, 9, 9]
    second = engine.generate([turn], greedy(10), "r5")[0]
    assert second.cached_tokens == (70 + 29) // SIZE * SIZE  # the last token was never fed
    assert second.tokens == cold.generate([turn], greedy(10), "r5")[0].tokens


def test_nothing_is_shared_across_adapters_or_salts(engine: Engine, cold: Engine) -> None:
    names = [None, *ADAPTERS]
    for name in names:
        [found] = answers(engine, [Ask(LONG, greedy(), name)])
        assert found.cached_tokens == 0, name
        assert found.tokens == tokens_of(cold, [Ask(LONG, greedy(), name)])[0]
    for salt, cached in (("a", 0), ("b", 0), ("a", 64), ("", 64)):
        assert engine.generate([LONG], greedy(), cache_salt=salt)[0].cached_tokens == cached


def test_a_reloaded_name_uses_nothing_of_what_it_was(
    engine: Engine, cold: Engine, tmp: Path
) -> None:
    """Same name, same path, other weights."""
    shutil.copytree(tmp / "r5", tmp / "mine")
    engine.load_adapter("mine")
    before = engine.generate([LONG], greedy(), "mine")[0]
    shutil.rmtree(tmp / "mine")
    shutil.copytree(tmp / "r8-rslora", tmp / "mine")
    engine.load_adapter("mine", replace=True)
    after = engine.generate([LONG], greedy(), "mine")[0]
    assert after.cached_tokens == 0 and after.tokens != before.tokens
    assert after.tokens == tokens_of(cold, [Ask(LONG, greedy(), "r8-rslora")])[0]
    engine.unload_adapter("mine")
    shutil.rmtree(tmp / "mine")


def test_unloading_forgets_what_was_computed_with_the_adapter(engine: Engine, tmp: Path) -> None:
    write_adapter(tmp / "fleeting", CONFIG, ["v_proj"], 4, 0, 0.3, "float32")
    engine.load_adapter("fleeting")
    before = engine.stats().pages_cached
    engine.generate([LONG], greedy(), "fleeting")
    wait_until(lambda: engine.stats().pages_cached == before + 5)
    engine.unload_adapter("fleeting")
    assert engine.stats().pages_cached == before
    shutil.rmtree(tmp / "fleeting")


def test_prompts_that_are_scored_are_computed_whole(engine: Engine, cold: Engine) -> None:
    score = [Ask(LONG, SamplingParams(max_tokens=0, prompt_logprobs=2), "r5")]
    for _ in range(2):
        [found], [expected] = answers(engine, score), answers(cold, score)
        assert found.cached_tokens == 0
        assert [e.token for e in found.prompt_logprobs[1:]] == LONG[1:]
        np.testing.assert_allclose(
            [entry.logprob for entry in found.prompt_logprobs[1:]],
            [entry.logprob for entry in expected.prompt_logprobs[1:]],
            atol=1e-4,
        )


def test_what_is_not_finite_is_never_found_again(engine: Engine, cold: Engine) -> None:
    """Keys and values that a poisoned adapter computed; the same adapter is sound later."""
    ask = Ask(LONG, greedy(), "r5")
    answers(engine, [Ask([1], greedy(1), "r5")])

    def poison() -> None:
        runner, geometry = engine.core.runner, engine.core.runner.geometry
        digest = engine.core.store.get("r5").version.digest
        pages = engine.core.residency.placement(digest).pages
        rows = np.full(runner.upload_rows, geometry.drop_page, np.int32)
        at = [layer * geometry.pages + page for layer in range(geometry.layers) for page in pages]
        rows[: len(at)] = at
        runner.write((rows, np.full((1, len(rows), geometry.page_numbers), np.nan, np.float32)))

    engine.core.run_on_engine(poison)
    [outcome] = Asked(engine, [ask]).outcomes()
    assert isinstance(outcome, CorruptOutput)
    engine.core.run_on_engine(engine.core.residency.forget_all)
    [found] = answers(engine, [ask])
    assert found.cached_tokens == 0 and [found.tokens] == tokens_of(cold, [ask])


def test_a_lost_pool_takes_the_cache_with_it(
    engine: Engine, cold: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate([LONG], greedy(), "r5")
    broken = monkeypatch.context()
    with broken as patch:
        patch.setattr(engine.core.runner, "execute", lambda plan: 1 / 0)
        with pytest.raises(EngineFailed):
            engine.generate([LONG], greedy(), "r5")
    assert engine.stats().pages_cached == 0
    [found] = answers(engine, [Ask(LONG, greedy(), "r5")])
    assert found.cached_tokens == 0
    assert [found.tokens] == tokens_of(cold, [Ask(LONG, greedy(), "r5")])


def test_aborted_requests_leave_what_they_computed(engine: Engine, cold: Engine) -> None:
    stream = engine.stream(LONG, greedy(100))
    next(stream)
    stream.close()
    wait_until(lambda: engine.stats().pages_kv == 0)
    [found] = answers(engine, [Ask(LONG, greedy())])
    assert found.cached_tokens == 64 and [found.tokens] == tokens_of(cold, [Ask(LONG, greedy())])


# Registered by metadata -------------------------------------------------------------------------


def test_adapters_are_read_when_they_are_first_asked_for(tmp: Path, cold: Engine) -> None:
    fresh = tmp.parent / "fresh-cache"
    with small_engine(
        tmp, LLAMA3 / "model", adapters={"preload": "all"}, cache_dir=str(fresh)
    ) as engine:
        states = {(info.state, info.digest) for info in engine.adapters()}
        assert states == {("registered", "")} and engine.stats().host_bytes == 0
        asks = [Ask(LONG, greedy(), name) for name in ADAPTERS]
        assert tokens_of(engine, asks) == tokens_of(cold, asks)
        for info in engine.adapters():
            assert info.state == "device" and len(info.digest) == 64
            assert info.bytes_device == info.bytes_host > 0 and info.bytes_disk > 0
            assert {"read", "pack", "transfer", "write"} <= info.seconds.keys()
    with small_engine(
        tmp, LLAMA3 / "model", adapters={"preload": "all"}, cache_dir=str(fresh)
    ) as engine:
        assert all(len(info.digest) == 64 for info in engine.adapters()), "it is remembered"
        assert tokens_of(engine, asks) == tokens_of(cold, asks)
        assert engine.stats().adapter_seconds.keys() == {"map", "transfer", "write"}
    shutil.rmtree(fresh)


def test_an_adapter_that_turns_out_bad_fails_its_own_requests(tmp: Path, cold: Engine) -> None:
    root = tmp.parent / "turns-out"
    shutil.copytree(LLAMA3 / "adapters" / "r5", root / "bad")
    shutil.copytree(LLAMA3 / "adapters" / "r5", root / "good")
    weights = root / "bad" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = np.inf
    save_file(tensors, weights)
    with small_engine(
        tmp, LLAMA3 / "model", adapters={"roots": [str(root)], "preload": "all"}
    ) as engine:
        asks = [Ask(LONG, greedy(), name) for name in ("bad", "good", None)]
        bad, good, base = Asked(engine, asks).outcomes()
        assert isinstance(bad, AdapterRejected) and name in str(bad)
        others = [Ask(LONG, greedy(), name) for name in ("r5", None)]
        assert [good.tokens, base.tokens] == tokens_of(cold, others)
        reports = {info.name: info for info in engine.adapters()}
        assert reports["bad"].state == "failed" and name in reports["bad"].error
        assert engine.stats().adapter_failures == 1
        shutil.rmtree(root / "bad")
        shutil.copytree(LLAMA3 / "adapters" / "r1", root / "bad")
        engine.load_adapter("bad", replace=True)
        assert tokens_of(engine, asks[:1]) == tokens_of(cold, [Ask(LONG, greedy(), "r1")])
        assert_nothing_leaked(engine)


def test_a_transfer_that_fails_ends_who_waited_for_it_alone(
    tmp: Path, cold: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_engine(tmp, LLAMA3 / "model", adapters={"preload": "all"}) as engine:
        upload = engine.core.residency.upload
        victim = engine.core.store.get("r5")
        engine.core.run_on_engine(lambda: None)

        def broken(chunk: Chunk) -> Any:
            if not failed:
                failed.append(1)
                return engine.core.runner.devices._uploads.submit(lambda: 1 / 0)
            return upload(chunk)

        failed: list[int] = []
        monkeypatch.setattr(engine.core.residency, "upload", broken)
        stream = engine.stream(LONG, greedy(60))
        tokens = list(next(stream).tokens)
        with pytest.raises(EngineFailed, match="could not be brought to the device"):
            engine.generate([LONG], greedy(), "r5")
        assert "could not be brought" in engine.core.adapters.report("r5").error
        assert victim.uses == 0 and engine.stats().recoveries == 0
        assert tokens_of(engine, [Ask(LONG, greedy(), "r5")]) == tokens_of(
            cold, [Ask(LONG, greedy(), "r5")]
        )
        assert engine.core.adapters.report("r5").error is None
        tokens += [token for chunk in stream for token in chunk.tokens]
        assert tuple(tokens) == tokens_of(cold, [Ask(LONG, greedy(60))])[0]
        assert_nothing_leaked(engine)


def test_a_pinned_adapter_that_was_asked_for_first_takes_its_pages_once(
    tmp: Path, cold: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go = Reader.whole, threading.Event()
    monkeypatch.setattr(Reader, "whole", lambda *of: go.wait(20) and read(*of))
    fresh = tmp.parent / "unread-cache"
    pinned = {"preload": ["r5"], "pinned": ["r5"]}
    with small_engine(tmp, LLAMA3 / "model", adapters=pinned, cache_dir=str(fresh)) as engine:
        asked = Asked(engine, [Ask(LONG, greedy(), "r5")])
        wait_until(lambda: engine.stats().waiting == 1)
        go.set()
        assert [asked.outcomes()[0].tokens] == tokens_of(cold, [Ask(LONG, greedy(), "r5")])
        assert_nothing_leaked(engine)


def test_a_pinned_adapter_is_on_the_device_before_anybody_asks(tmp: Path) -> None:
    pinned = {"preload": ["r5", "r1"], "pinned": ["r5"]}
    with small_engine(tmp, LLAMA3 / "model", adapters=pinned) as engine:
        wait_until(lambda: engine.core.adapters.report("r5").state == "device")
        report = engine.core.adapters.report("r5")
        assert report.pinned and report.in_flight == 0
        assert engine.core.adapters.report("r1").bytes_device == 0


# Aliases ----------------------------------------------------------------------------------------


def test_an_alias_stands_for_its_targets_by_weight(engine: Engine) -> None:
    expected = {
        name: engine.generate([LONG], greedy(4), name)[0].tokens for name in ("r5", "r64-regex")
    }
    assert len({*expected.values()}) == 2
    engine.alias("best", {"r5": 1})
    assert engine.generate([LONG], greedy(4), "best")[0].tokens == expected["r5"]
    engine.alias("best", {"r5": 1, "r64-regex": 3})
    found = Counter(engine.generate([LONG], greedy(4), "best")[0].tokens for _ in range(80))
    assert found.keys() == {*expected.values()}
    assert found[expected["r64-regex"]] > found[expected["r5"]]
    engine.rollback_alias("best")
    assert engine.generate([LONG] * 9, greedy(4), "best")[-1].tokens == expected["r5"]
    engine.remove_alias("best")
    with pytest.raises(UnknownModel, match="best"):
        engine.generate([LONG], greedy(4), "best")


def test_names_of_aliases_and_adapters_do_not_collide(engine: Engine) -> None:
    engine.load_adapter("next", "r1")
    engine.alias("best", {"next": 0.05, "base": 0.95})
    with pytest.raises(InvalidRequest, match="'best' leads to 'next'"):
        engine.unload_adapter("next")
    with pytest.raises(AdapterRejected, match="'best' is an alias"):
        engine.load_adapter("best", "r1")
    for name in ("base", "r5", "not usable"):
        with pytest.raises(InvalidRequest, match="taken or no usable name"):
            engine.alias(name, {"r1": 1})
    with pytest.raises(UnknownModel, match="'sql'"):
        engine.alias("best", {"sql": 1})
    with pytest.raises(InvalidRequest, match="weight"):
        engine.alias("best", {"r1": 0})
    with pytest.raises(UnknownModel, match="alias 'other'"):
        engine.rollback_alias("other")
    engine.remove_alias("best")
    engine.unload_adapter("next")
