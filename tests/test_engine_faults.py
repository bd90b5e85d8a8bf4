"""What goes wrong stays where it is: poisoned numbers, lost pools, changed files, early ends."""

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from engine_helpers import (
    Ask,
    Asked,
    answers,
    assert_nothing_leaked,
    small_engine,
    tokens_of,
    wait_until,
)
from goldens.adapters import write_adapter
from goldens.cases import ADAPTERS, ROOT

from jslora.engine import Completion, Engine
from jslora.errors import AdapterRejected, CorruptOutput, EngineFailed, Unavailable
from jslora.request import SamplingParams

LLAMA3 = ROOT / "llama3"
PRELOADED = {"roots": [str(LLAMA3 / "adapters")], "preload": "all"}
CONFIG = json.loads((LLAMA3 / "model" / "config.json").read_text())


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **settings)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def sound(tmp: Path) -> Iterator[Engine]:
    """Nothing ever goes wrong here: what answers are compared with."""
    with small_engine(tmp, LLAMA3 / "model", adapters=PRELOADED) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared(tmp: Path) -> Iterator[Engine]:
    """Without prefix cache, so that the same batches compute the same to the last bit."""
    with small_engine(
        tmp, LLAMA3 / "model", adapters=PRELOADED, pool={"prefix_cache": False}
    ) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """An engine that outlives what is done to it; no adapter is on the device."""
    shared.core.run_on_engine(shared.core.residency.forget_all)
    yield shared
    assert_nothing_leaked(shared)


# Numbers that are none --------------------------------------------------------------------------


def poison(engine: Engine, pages: list[int]) -> None:
    """Fill pages of the pool with NaN in every layer; runs on the engine thread."""
    runner = engine.core.runner
    geometry = runner.geometry
    rows = [layer * geometry.pages + page for layer in range(geometry.layers) for page in pages]
    data = np.full((1, runner.upload_rows, geometry.page_numbers), np.nan, np.float32)
    for at in range(0, len(rows), runner.upload_rows):
        ids = np.full(runner.upload_rows, geometry.drop_page, np.int32)
        part = rows[at : at + runner.upload_rows]
        ids[: len(part)] = part
        runner.write(jax.device_put((ids, data)))


def poison_adapter(engine: Engine, name: str) -> None:
    placement = engine.core.residency.placement(engine.core.store.get(name).version.digest)
    engine.core.run_on_engine(lambda: poison(engine, list(placement.pages)))


def poison_free_pages(engine: Engine) -> None:
    def write() -> None:
        held = {0}
        rows = engine.core.scheduler.rows
        for slot in rows.slots:
            held |= {*rows.pages(slot)}
        for resident in engine.core.residency.residents.values():
            held |= {*resident.placement.pages}
        poison(engine, [p for p in range(engine.stats().pages_total + 1) if p not in held])

    engine.core.run_on_engine(write)


def bits(answer: Completion) -> tuple:
    """All that was answered, logprobs to the last bit."""
    return answer.tokens, answer.logprobs, answer.prompt_logprobs


def mixed(steps: int) -> list[Ask]:
    """Rows of every adapter, of two of them twice, and of the base, some prefilling for long."""
    params = SamplingParams(temperature=0, max_tokens=steps, logprobs=20, prompt_logprobs=3)
    names = ["r5", None, "r64-regex", "r1", "layer1", "r5", "patterns", "r8-rslora"]
    return [
        Ask([(i * 37 + j * 11) % 256 for j in range(1 + 9 * i)], params, name)
        for i, name in enumerate(names)
    ]


def warm(engine: Engine) -> None:
    """Bring every adapter to the device, so that batches start whole."""
    for name in ADAPTERS:
        answers(engine, [Ask([1], greedy(1), name)])


@pytest.mark.parametrize("poisoned", ["r5", "r64-regex"])
def test_a_poisoned_adapter_fails_its_own_rows_alone(engine: Engine, poisoned: str) -> None:
    asks = mixed(1)
    warm(engine)
    clean = answers(engine, asks)
    assert [bits(answer) for answer in answers(engine, asks)] == [bits(one) for one in clean]
    poison_adapter(engine, poisoned)
    before = engine.stats().corrupt_requests
    hit = [ask.adapter == poisoned for ask in asks]
    for outcome, expected, own in zip(Asked(engine, asks).outcomes(), clean, hit, strict=True):
        if own:
            assert isinstance(outcome, CorruptOutput)
        else:
            assert bits(outcome) == bits(expected)
    assert engine.stats().corrupt_requests == before + sum(hit)


def test_a_poisoned_adapter_changes_no_decoding_neighbour(engine: Engine, sound: Engine) -> None:
    asks, recoveries = mixed(20), engine.stats().recoveries
    warm(engine)
    poison_adapter(engine, "r5")
    for ask, outcome, expected in zip(
        asks, Asked(engine, asks).outcomes(), answers(sound, asks), strict=True
    ):
        if ask.adapter == "r5":
            assert isinstance(outcome, CorruptOutput)
        else:
            assert outcome.tokens == expected.tokens
    # Nor do the pages that the failed rows left, nor the ones the adapter itself leaves.
    poison_adapter(engine, "r5")
    engine.unload_adapter("r5")
    wait_until(lambda: engine.stats().pages_adapters == 24)
    asks = [ask for ask in asks if ask.adapter != "r5"]
    for outcome, expected in zip(answers(engine, asks * 3), answers(sound, asks * 3), strict=True):
        assert outcome.tokens == expected.tokens
    assert engine.stats().recoveries == recoveries
    engine.load_adapter("r5")


def test_scores_of_a_poisoned_adapter_are_refused_too(engine: Engine) -> None:
    score = Ask(list(range(50)), SamplingParams(max_tokens=0, prompt_logprobs=0), "r5")
    (clean,) = answers(engine, [score])
    assert all(np.isfinite(entry.logprob) for entry in clean.prompt_logprobs[1:])
    poison_adapter(engine, "r5")
    assert isinstance(Asked(engine, [score]).outcomes()[0], CorruptOutput)


def test_poison_in_free_pages_reaches_nobody(engine: Engine) -> None:
    """Neither who writes keys and values there next, nor the adapters that are loaded there."""
    asks = mixed(24)
    warm(engine)
    clean = answers(engine, asks)
    engine.core.run_on_engine(engine.core.residency.forget_all)
    poison_free_pages(engine)
    warm(engine)
    poison_free_pages(engine)
    for outcome, expected in zip(answers(engine, asks), clean, strict=True):
        assert bits(outcome) == bits(expected)


def test_a_poisoned_page_fails_its_sequence_alone(engine: Engine, sound: Engine) -> None:
    asks = [Ask(ask.prompt, greedy(60), ask.adapter) for ask in mixed(1)]
    expected = tokens_of(sound, asks)
    asked = Asked(engine, asks)
    steps = engine.stats().steps
    wait_until(lambda: engine.stats().running == len(asks) and engine.stats().steps > steps + 8)

    def hit() -> str:
        victim = next(s for s in engine.core.scheduler.running if s.request.label == "r1")
        poison(engine, engine.core.scheduler.rows.pages(victim.slot)[:1])
        return victim.request.id

    victim = asked.ids.index(engine.core.run_on_engine(hit))
    for i, outcome in enumerate(asked.outcomes()):
        if i == victim:
            assert isinstance(outcome, CorruptOutput)
        else:
            assert outcome.tokens == expected[i]


# A step that fails ------------------------------------------------------------------------------


class Fuse:
    """Lets programs fail once, on command, after which they work again."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = engine.core.runner.devices
        self.patch = partial(monkeypatch.setitem, self.device._executables)
        self.armed = False
        self.blown = 0

    def blow(self) -> None:
        """Lose everything that was donated."""
        self.armed, self.blown = False, self.blown + 1
        for array in jax.tree.leaves((self.device.pages, self.device.slots)):
            array.delete()

    def wrap(self, names: tuple[str, ...], fail: Callable[["Fuse", Any, tuple], Any]) -> None:
        """Let `fail` stand in for every program of such a name when armed."""
        for key, (name, *_) in self.device.catalog.jobs().items():
            if name.startswith(names):
                program = self.device._executables[key]

                def call(*arguments: Any, program: Any = program) -> Any:
                    return fail(self, program, arguments) if self.armed else program(*arguments)

                self.patch(key, call)


def at_dispatch(fuse: Fuse, program: Any, arguments: tuple) -> Any:
    fuse.blow()
    raise RuntimeError("the device is out of order")


class Lost:
    """A result that never arrives."""

    shape = (8, 2)

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("the device is out of order")


def at_wait(fuse: Fuse, program: Any, arguments: tuple) -> Any:
    slots, sampled = program(*arguments)
    fuse.blow()
    return slots, type(sampled)(*(Lost() for _ in sampled))


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize(
    ("names", "fail"),
    [(("layer", "step"), at_dispatch), (("sample",), at_dispatch), (("sample",), at_wait)],
    ids=["step", "sample", "wait"],
)
def test_a_failed_step_costs_what_ran_and_nothing_else(
    engine: Engine,
    sound: Engine,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    fail: Callable,
    lookahead: bool,
) -> None:
    monkeypatch.setattr(engine.core, "_lookahead", lookahead)
    who = [*ADAPTERS, None, "r5"]
    run = [Ask([3, i], greedy(200), name) for i, name in enumerate(who)]
    wait = [Ask([4, i] * 8, greedy(20), name) for i, name in enumerate(who)]
    fuse = Fuse(engine, monkeypatch)
    fuse.wrap(names, fail)
    before = engine.stats()
    running = Asked(engine, run)
    wait_until(lambda: engine.stats().running == 8 and engine.stats().steps > before.steps + 5)
    waiting = Asked(engine, wait)
    wait_until(lambda: engine.stats().waiting == 8)
    fuse.armed = True
    for outcome in running.outcomes():
        assert isinstance(outcome, EngineFailed) and outcome.retry_after
    found = [answer.tokens for answer in waiting.outcomes()]
    assert found == tokens_of(sound, wait)
    assert tokens_of(engine, run) == tokens_of(sound, run)
    after = engine.stats()
    assert (after.recoveries - before.recoveries, fuse.blown, after.ledger_errors) == (1, 1, 0)
    assert after.adapter_loads - before.adapter_loads == 2 * len(ADAPTERS)


def test_a_write_that_fails_is_a_step_that_fails(
    engine: Engine, sound: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = Fuse(engine, monkeypatch)
    fuse.wrap(("write",), at_dispatch)
    running = Asked(engine, [Ask([1], greedy(200))])
    wait_until(lambda: engine.stats().running == 1)
    fuse.armed = True
    ask = Ask([1, 2], greedy(20), "r5")
    waiting = Asked(engine, [ask])
    assert isinstance(running.outcomes()[0], EngineFailed)
    assert [answer.tokens for answer in waiting.outcomes()] == tokens_of(sound, [ask])
    assert fuse.blown == 1


def test_the_old_pool_is_gone_before_the_new_one_is_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would not fit: the pool takes what the device has."""
    runner, device = engine.core.runner, engine.core.runner.devices
    shape, alive, made = device.pages.shape, [], device._state

    def counted() -> Any:
        alive.append(sum(a.shape == shape and not a.is_deleted() for a in jax.live_arrays()))
        return made()

    monkeypatch.setattr(device, "_state", counted)
    before = sum(a.shape == shape and not a.is_deleted() for a in jax.live_arrays())
    execute = runner.execute

    def fail(plan: Any) -> Any:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("nothing was donated yet")

    monkeypatch.setattr(runner, "execute", fail)
    with pytest.raises(EngineFailed):
        engine.generate([[1]], greedy(5))
    assert len(engine.generate([[1]], greedy(5))[0].tokens) == 5
    assert alive == [before - 1]


def test_an_engine_that_cannot_recover_says_so_to_everybody(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_engine(tmp, LLAMA3 / "model", adapters=PRELOADED) as engine:
        fuse = Fuse(engine, monkeypatch)
        fuse.wrap(("sample",), at_dispatch)
        asked = Asked(engine, [Ask([1], greedy(200)) for _ in range(10)])
        wait_until(lambda: engine.stats().running == 8 and engine.stats().waiting == 2)

        def fail() -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine.core.runner, "reset", fail)
        assert engine.core.alive
        fuse.armed = True
        for outcome in asked.outcomes():
            assert isinstance(outcome, EngineFailed)
        wait_until(lambda: not engine.core.alive)
        with pytest.raises(EngineFailed):
            engine.generate([[1]], greedy(5))
        with pytest.raises(EngineFailed):
            engine.core.run_on_engine(lambda: None)


def test_closing_ends_what_still_runs(tmp: Path) -> None:
    engine = small_engine(tmp, LLAMA3 / "model", adapters=PRELOADED)
    asked = Asked(engine, [Ask([1], greedy(250)) for _ in range(10)])
    wait_until(lambda: engine.stats().running == 8)
    engine.close()
    for outcome in asked.outcomes():
        assert isinstance(outcome, Unavailable)
    with pytest.raises(Unavailable):
        engine.generate([[1]], greedy(5))
    engine.close()


# Adapters that change or go ---------------------------------------------------------------------


def test_an_adapter_that_changed_on_disk_fails_its_requests_alone(tmp: Path, sound: Engine) -> None:
    root = tmp / "changing"
    shutil.copytree(LLAMA3 / "adapters" / "r8-rslora", root / "mine")
    shutil.copytree(LLAMA3 / "adapters" / "r64-regex", root / "big")
    # Host memory holds one of them, and packed ones are not kept on disk.
    only_host = {"roots": [str(root)], "host_cache_bytes": 250_000, "disk_cache_bytes": 0}
    with small_engine(tmp, LLAMA3 / "model", adapters=only_host) as engine:
        engine.load_adapter("mine")
        engine.load_adapter("big")
        states = {info.name: info.state for info in engine.adapters()}
        assert states == {"mine": "registered", "big": "host"}
        good = (root / "mine" / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(root / "mine")
        write_adapter(root / "mine", CONFIG, ["q_proj"], 8, 1, 0.3, "float32")
        asks = [Ask([1, 2], greedy(20), name) for name in ("mine", "big", None, "mine")]
        outcomes = Asked(engine, asks).outcomes()
        for i in (0, 3):
            assert isinstance(outcomes[i], AdapterRejected)
            assert "'mine' changed on disk" in str(outcomes[i])
        others = [Ask([1, 2], greedy(20), name) for name in ("r64-regex", None)]
        assert [outcomes[i].tokens for i in (1, 2)] == tokens_of(sound, others)
        assert_nothing_leaked(engine)

        shutil.rmtree(root / "mine")
        shutil.copytree(LLAMA3 / "adapters" / "r8-rslora", root / "mine")
        assert (root / "mine" / "adapter_model.safetensors").read_bytes() == good
        expected = tokens_of(sound, [Ask([1, 2], greedy(20), "r8-rslora")])
        assert tokens_of(engine, asks[:1]) == expected


def test_an_adapter_whose_folder_is_gone_is_served_from_the_packed_cache(
    tmp: Path, sound: Engine
) -> None:
    root = tmp / "gone"
    shutil.copytree(LLAMA3 / "adapters" / "r8-rslora", root / "mine")
    shutil.copytree(LLAMA3 / "adapters" / "r64-regex", root / "big")
    sections = {"roots": [str(root)], "host_cache_bytes": 250_000}
    with small_engine(tmp, LLAMA3 / "model", adapters=sections) as engine:
        engine.load_adapter("mine")
        engine.load_adapter("big")  # host memory holds one of them
        shutil.rmtree(root)
        asks = [Ask([1, 2], greedy(20), name) for name in ("mine", "big")]
        others = [Ask([1, 2], greedy(20), name) for name in ("r8-rslora", "r64-regex")]
        assert tokens_of(engine, asks) == tokens_of(sound, others)


def test_a_load_that_is_overtaken_by_an_unload_still_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = engine.core.store
    load = store.load

    def overtaken(name: str, path: str | None, replace: bool) -> Future:
        done = load(name, path, replace)
        done.result(20)
        store.unload(name)
        return done

    monkeypatch.setattr(store, "load", overtaken)
    info = engine.core.adapters.load("fleeting", "r1").result(5)
    assert info.name == "fleeting" and info.rank == 1
    assert "fleeting" not in {info.name for info in engine.adapters()}


def test_closing_ends_loads_that_are_not_done(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(tmp, LLAMA3 / "model", adapters=PRELOADED | {"preload": "none"})
    store, go = engine.core.store, threading.Event()
    locate = store._roots.locate
    monkeypatch.setattr(store._roots, "locate", lambda path: go.wait(20) and locate(path))
    loads = [engine.core.adapters.load(name) for name in ("r1", "r5", "layer1")]
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: store._closed)
    go.set()
    closing.join(20)
    for load in loads:
        assert isinstance(load.exception(10), Unavailable)
    assert not closing.is_alive()


def test_a_request_of_the_wrong_kind_harms_nobody(engine: Engine) -> None:
    """What types would have prevented is refused on the engine thread, which goes on."""
    recoveries = engine.stats().recoveries
    stream = engine.stream([1], greedy(100))
    next(stream)
    job = engine._job([1], SamplingParams(), ())
    object.__setattr__(job.request, "params", None)
    engine._submit(job, job.events.put)
    assert job.events.get(timeout=10).error.type == "internal_error"
    assert sum(len(chunk.tokens) for chunk in stream) == 99
    assert engine.stats().recoveries == recoveries


def test_a_closed_engine_is_freed(tmp: Path) -> None:
    """Its pool and weights go with it: nothing else holds on to them."""
    engine = small_engine(tmp, LLAMA3 / "model", adapters=PRELOADED)
    runner = weakref.ref(engine.core.runner)
    engine.generate([[1]], greedy(2))
    engine.close()
    del engine
    gc.collect()
    assert runner() is None
