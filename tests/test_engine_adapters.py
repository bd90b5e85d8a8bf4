"""Adapters from the engine's public side: they come, are replaced, leave, and are refused."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from engine_helpers import (
    CONFIG,
    EVERYTHING,
    LLAMA3,
    PROMPT,
    Ask,
    Asked,
    answers,
    assert_nothing_leaked,
    greedy,
    tight_engine,
    tokens_of,
    wait_until,
)
from goldens.adapters import write_adapter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jslora.adapters.synthetic import make_adapters
from jslora.calls import Chunk
from jslora.engine import Engine
from jslora.errors import (
    AdapterRejected,
    JsloraError,
    Unavailable,
    UnknownModel,
)
from jslora.memory.room import Room
from jslora.request import Stats

pytest_plugins = ["engine_fixtures"]


def state(engine: Engine, name: str) -> str:
    return next(info.state for info in engine.adapters() if info.name == name)


def test_idle_adapters_leave_least_recent_first_and_come_back(
    tight: Engine, engine: Engine
) -> None:
    names = [f"wide-{i}" for i in range(4)]
    expected = [tokens_of(engine, [Ask(PROMPT, greedy(), name)]) for name in names]
    for name in names:
        tight.load_adapter(name)
        assert state(tight, name) == "host"

    def use(i: int) -> None:
        assert tokens_of(tight, [Ask(PROMPT, greedy(), names[i])]) == expected[i]

    before = tight.stats()
    for i in (0, 1, 2, 0):
        use(i)
    assert tight.stats().adapter_evictions == before.adapter_evictions
    assert tight.stats().pages_adapters == 27
    use(3)
    assert [state(tight, name) for name in names] == ["device", "host", "device", "device"]
    use(1)
    assert [state(tight, name) for name in names] == ["device", "device", "host", "device"]
    after = tight.stats()
    assert after.adapter_loads == before.adapter_loads + 5
    assert after.adapter_evictions == before.adapter_evictions + 2


def test_the_adapters_that_lie_idle_are_told(tight: Engine) -> None:
    def between_steps() -> Stats:
        return tight.core.run_on_engine(tight.core.stats)

    names = [f"wide-{i}" for i in range(3)]
    for name in names:
        tight.load_adapter(name)
    for name in (*names, names[0]):
        tokens_of(tight, [Ask(PROMPT, greedy(), name)])
    wait_until(lambda: between_steps().idle_adapters == ("wide-0", "wide-2", "wide-1"))
    assert between_steps().pages_idle == between_steps().pages_adapters == 27

    asked = Asked(tight, [Ask(PROMPT, greedy(200), "wide-2")])
    seen = [between_steps()]
    while "wide-2" not in seen[-1].running_adapters:
        seen.append(between_steps())
    idle, pages = seen[-1].idle_adapters, seen[-1].pages_idle
    assert set(idle) <= {"wide-0", "wide-1"} and pages == 9 * len(idle)
    asked.outcomes()
    wait_until(lambda: between_steps().idle_adapters[:1] == ("wide-2",))
    tight.unload_adapter("wide-2")
    assert "wide-2" not in between_steps().idle_adapters


def test_more_adapters_in_a_batch_than_fit_at_once(tight: Engine, engine: Engine) -> None:
    names = [f"wide-{i}" for i in range(4)]
    for name in names:
        tight.load_adapter(name)
    asks = [Ask(PROMPT, greedy(), name) for name in names * 3]
    assert tokens_of(tight, asks) == tokens_of(engine, asks)


def test_an_adapter_in_scattered_pages_is_itself(
    tight: Engine, engine: Engine, tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jslora.fetch import load_config

    model = load_config(LLAMA3 / "model")
    count = tight.stats().pages_total - 1
    small = make_adapters(
        tmp / "small", model, count=count, ranks=[1], targets=[["q_proj"]], base_name="base"
    )
    names = [folder.name for folder in small]
    for name in names:
        tight.load_adapter(name, f"small/{name}")
        answers(tight, [Ask(PROMPT, greedy(1), name)])
    assert tight.stats().pages_adapters == count
    for name in names[::2]:
        tight.unload_adapter(name)
    wait_until(lambda: tight.stats().pages_adapters == count // 2)
    tight.load_adapter("r5")
    monkeypatch.setattr(Room, "_clear_run", lambda *others: None)  # as if those in between ran
    ask = Ask(PROMPT, greedy(), "r5")
    assert tokens_of(tight, [ask]) == tokens_of(engine, [ask])
    assert not tight.core.residency.placement(tight.core.store.get("r5").version.digest).is_run


def test_a_replaced_adapter_serves_new_requests_and_the_old_one_its_own(
    tight: Engine, engine: Engine
) -> None:
    old, new = Ask(PROMPT, greedy(60), "wide-0"), Ask(PROMPT, greedy(60), "wide-1")
    expected_old, expected_new = tokens_of(engine, [old, new])
    tight.load_adapter("mine", "wide-0")
    stream = tight.stream(PROMPT, greedy(60), "mine")
    first = next(stream)
    info = tight.load_adapter("mine", "wide-1", replace=True)
    assert info.digest == tight.core.store.get("mine").version.digest
    assert tokens_of(tight, [Ask(PROMPT, greedy(60), "mine")]) == [expected_new]
    rest = [token for chunk in stream for token in chunk.tokens]
    assert (*first.tokens, *rest) == expected_old
    wait_until(lambda: tight.stats().pages_adapters == 9)


def test_unloading_drains_then_frees(tight: Engine, engine: Engine) -> None:
    expected = tokens_of(engine, [Ask(PROMPT, greedy(60), "wide-2")])[0]
    tight.load_adapter("wide-2")
    stream = tight.stream(PROMPT, greedy(60), "wide-2")
    tokens = list(next(stream).tokens)
    gone = tight.core.adapters.unload("wide-2")
    with pytest.raises(UnknownModel, match="wide-2"):
        tight.generate([PROMPT], greedy(), "wide-2")
    assert [(info.state, info.in_flight) for info in tight.adapters()] == [("draining", 1)]
    assert tight.stats().pages_adapters == 9 and not gone.done()
    tokens += [token for chunk in stream for token in chunk.tokens]
    assert tuple(tokens) == expected
    assert gone.result(20).name == "wide-2"
    stats = tight.stats()
    assert stats.pages_free == stats.pages_total and stats.host_bytes == 0
    assert tight.adapters() == []
    with pytest.raises(UnknownModel, match="wide-2"):
        tight.unload_adapter("wide-2")


def test_what_waited_for_an_unloaded_adapter_leaves_nothing_behind(
    tight: Engine, engine: Engine
) -> None:
    tight.load_adapter("wide-2")
    crowd = Asked(tight, [Ask(PROMPT, greedy(30)) for _ in range(8)])
    wait_until(lambda: tight.stats().running == 8)
    late = Asked(tight, [Ask(PROMPT, greedy(), "wide-2")])
    wait_until(lambda: tight.stats().waiting == 1)
    gone = tight.core.adapters.unload("wide-2")
    crowd.outcomes()
    (answer,) = late.outcomes()
    assert answer.tokens == tokens_of(engine, [Ask(PROMPT, greedy(), "wide-2")])[0]
    gone.result(20)
    assert tight.stats().pages_free == tight.stats().pages_total


def test_what_does_not_finish_in_time_ends_when_its_adapter_is_unloaded(tight: Engine) -> None:
    tight.load_adapter("wide-2")
    rows = Asked(tight, [Ask(PROMPT, greedy(200), "wide-2"), Ask(PROMPT, greedy(30))])
    wait_until(lambda: tight.stats().running == 2)
    tight.unload_adapter("wide-2", drain_seconds=0)
    assert tight.stats().pages_adapters == 0
    unloaded, other = rows.outcomes()
    assert isinstance(unloaded, Unavailable) and "'wide-2' was unloaded" in str(unloaded)
    assert len(other.tokens) == 30


def test_an_adapter_abandoned_while_it_loads_is_freed_without_another_request(
    tight: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, go = tight.core.residency.upload, threading.Event()

    def slow(chunk: Chunk) -> Any:
        return tight.core.runner.devices._uploads.submit(lambda: go.wait(20) and sent_now(chunk))

    def sent_now(chunk: Chunk) -> Any:
        return jax.block_until_ready(jax.device_put((chunk.rows, chunk.data)))

    monkeypatch.setattr(tight.core.residency, "upload", slow)
    tight.load_adapter("wide-2")
    asked = Asked(tight, [Ask(PROMPT, greedy(), "wide-2")])
    wait_until(lambda: tight.stats().pages_adapters == 9)
    tight.core.abort(asked.ids)
    gone = tight.core.adapters.unload("wide-2")
    wait_until(lambda: tight.core.scheduler.idle)
    go.set()
    gone.result(20)
    assert tight.stats().pages_free == tight.stats().pages_total
    monkeypatch.setattr(tight.core.residency, "upload", sent)


def test_names_of_equal_contents_share_pages(tight: Engine, engine: Engine) -> None:
    loads = tight.stats().adapter_loads
    for name in ("one", "two"):
        tight.load_adapter(name, "wide-3")
    found = tokens_of(tight, [Ask(PROMPT, greedy(), name) for name in ("one", "two")])
    assert found == 2 * tokens_of(engine, [Ask(PROMPT, greedy(), "wide-3")])
    assert tight.stats().pages_adapters == 9 and tight.stats().adapter_loads == loads + 1
    tight.unload_adapter("one")
    assert tokens_of(tight, [Ask(PROMPT, greedy(), "two")]) == found[:1]
    assert tight.stats().pages_adapters == 9 and tight.stats().adapter_loads == loads + 1
    tight.unload_adapter("two")
    wait_until(lambda: tight.stats().pages_adapters == 0)


def test_a_refused_adapter_leaves_nothing(tight: Engine, tmp: Path) -> None:
    shutil.copytree(tmp / "r5", tmp / "broken")
    (tmp / "broken" / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    before = tight.stats()
    for path in ("broken", "missing", "../engine", "/etc"):
        with pytest.raises(AdapterRejected):
            tight.load_adapter("bad", path)
        with pytest.raises(UnknownModel, match="bad"):
            tight.generate([PROMPT], greedy(), "bad")
    assert state(tight, "bad") == "failed"
    after = tight.stats()
    assert after.adapter_failures == before.adapter_failures + 4
    assert after.pages_free == before.pages_free and after.adapter_loads == before.adapter_loads
    assert tight.load_adapter("bad", "r5").state == "host"
    shutil.rmtree(tmp / "broken")


def test_an_adapter_larger_than_the_pool_is_refused(tight: Engine, tmp: Path) -> None:
    write_adapter(tmp / "huge", CONFIG, EVERYTHING, 64, 0, 0.3, "float32")
    with pytest.raises(AdapterRejected, match=r"takes 35 pages; the pool has 30"):
        tight.load_adapter("huge")
    shutil.rmtree(tmp / "huge")


def test_pinned_adapters_stay(tmp: Path, engine: Engine) -> None:
    with tight_engine(tmp, adapters={"pinned": ["wide-0", "wide-1"]}) as tight:
        for i in (0, 1, 2, 3):
            tight.load_adapter(f"wide-{i}")
            answers(tight, [Ask(PROMPT, greedy(), f"wide-{i}")])
        assert [state(tight, f"wide-{i}") for i in range(4)] == [
            "device",
            "device",
            "host",
            "device",
        ]
        # But for a request that could not be served otherwise.
        whole = Ask([1] * 200, greedy(56), "wide-3")
        assert tokens_of(tight, [whole]) == tokens_of(engine, [whole])
        # A name is pinned, not the contents it had.
        tight.load_adapter("wide-1", "wide-2", replace=True)
        tight.load_adapter("loose", "wide-1")
        digests = {tight.core.store.get(name).version.digest for name in ("wide-0", "wide-1")}
        wait_until(lambda: tight.core.residency.pinned == digests)
        assert_nothing_leaked(tight)


# Traces -----------------------------------------------------------------------------------------

WIDE = st.integers(0, 3)
SLOT = st.integers(0, 2)
OPERATION = st.one_of(
    st.tuples(st.just("load"), SLOT, WIDE),
    st.tuples(st.just("unload"), SLOT),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("ask"), st.sampled_from([None, 0, 1, 2]), st.sampled_from([1, 17, 60, 120]),
              st.sampled_from([0, 1, 9, 40])),
    st.tuples(st.just("wait"), st.integers(0, 10)),
)  # fmt: skip
CROWD = [
    ("ask", slot, length, 40) for length in (60, 17, 120) for slot in (None, 0, 1, 2)
] + [("wait", 10), ("load", 0, 3), ("abort", 3), ("unload", 2), ("ask", 0, 60, 40)]  # fmt: skip


@pytest.fixture(scope="module")
def traced(tmp: Path) -> Iterator[Engine]:
    """Room for two of the wide adapters and for few of the rows; host memory for one adapter."""
    sections = {"adapters": {"host_cache_bytes": 200_000}, "pool": {"pages": 32}}
    with tight_engine(tmp, **sections) as engine:
        yield engine
        assert engine.stats().preemptions > 0 and engine.stats().adapter_evictions > 0


@pytest.fixture(scope="module")
def expect(engine: Engine) -> Callable[[Ask, str | None], tuple[int, ...]]:
    """What a request is answered alone, under a given content."""
    known: dict[tuple, tuple[int, ...]] = {}

    def answer(ask: Ask, content: str | None) -> tuple[int, ...]:
        key = (len(ask.prompt), ask.params.max_tokens, content)
        if key not in known:
            known[key] = tokens_of(engine, [Ask(ask.prompt, ask.params, content)])[0]
        return known[key]

    return answer


@given(st.lists(OPERATION, min_size=4, max_size=40))
@example(CROWD)
@settings(max_examples=20, deadline=None)
def test_any_trace_gives_right_answers_and_leaks_nothing(
    traced: Engine, expect: Callable, operations: list[tuple]
) -> None:
    contents = {f"slot-{i}": f"wide-{i}" for i in range(3)}
    for slot, content in contents.items():
        traced.load_adapter(slot, content)
    asked: list[tuple[Asked, Ask, str | None]] = []
    aborted: set[int] = set()
    for name, *details in operations:
        if name == "load":
            slot, content = f"slot-{details[0]}", f"wide-{details[1]}"
            traced.load_adapter(slot, content, replace=True)
            contents[slot] = content
        elif name == "unload" and f"slot-{details[0]}" in contents:
            traced.core.adapters.unload(f"slot-{details[0]}")
            del contents[f"slot-{details[0]}"]
        elif name == "ask":
            slot = None if details[0] is None else f"slot-{details[0]}"
            if slot is not None and slot not in contents:
                continue
            ask = Ask([details[1] % 7] * details[1], greedy(details[2]), slot)
            asked.append((Asked(traced, [ask]), ask, contents.get(slot or "")))
        elif name == "abort" and details[0] < len(asked):
            traced.core.abort(asked[details[0]][0].ids)
            aborted.add(details[0])
        elif name == "wait":
            steps = traced.stats().steps + details[0]
            wait_until(lambda: traced.core.scheduler.idle or traced.stats().steps >= steps)  # noqa: B023
    for i, (requests, ask, content) in enumerate(asked):
        if i not in aborted:
            (outcome,) = requests.outcomes()
            assert not isinstance(outcome, JsloraError), outcome
            assert outcome.tokens == expect(ask, content)
    for slot in contents:
        traced.unload_adapter(slot)
    wait_until(lambda: traced.stats().pages_adapters == 0)
    assert_nothing_leaked(traced)
    assert traced.stats().host_bytes == 0
