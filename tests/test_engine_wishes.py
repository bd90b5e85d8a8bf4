"""Tenants, priorities and times through `Engine`'s own methods, over a real scheduler."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import LLAMA3, PROMPT, assert_nothing_leaked, greedy, small_engine, wait_until

from jslora.engine import Engine
from jslora.errors import InvalidRequest, RateLimited, TooLate

pytest_plugins = ["engine_fixtures"]

LIMITED = {
    "policy": ["priority", "fair_tenants", "slo"],
    "tenants": {"rare": {"requests_per_minute": 1}, "late": {"ttft_slo": 1e-6}},
}


@pytest.fixture(scope="module")
def limited(tmp: Path) -> Iterator[Engine]:
    with small_engine(tmp, LLAMA3 / "model", scheduler=LIMITED) as engine:
        yield engine


async def read(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


WAYS: list[Callable[..., Any]] = [
    lambda engine, **terms: engine.generate(PROMPT, greedy(), **terms),
    lambda engine, **terms: list(engine.stream(PROMPT, greedy(), **terms)),
    lambda engine, **terms: asyncio.run(engine.generate_async(PROMPT, greedy(), **terms)),
    lambda engine, **terms: asyncio.run(read(engine.stream_async(PROMPT, greedy(), **terms))),
]
ways = pytest.mark.parametrize("ask", WAYS, ids=["whole", "stream", "async", "async stream"])


@ways
@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"priority": 1}, "priority"),
        ({"priority": -1}, "priority"),
        ({"ttft_slo": 2.0}, "ttft_slo"),
        ({"ttft_slo": float("nan")}, "ttft_slo"),
        ({"tenant": "no name"}, "tenant"),
        ({"tenant": None}, "tenant"),
    ],
    ids=str,
)
def test_what_would_not_be_heeded_is_refused(
    engine: Engine, ask: Callable[..., Any], terms: dict[str, Any], param: str
) -> None:
    """This engine's policy is fcfs."""
    with pytest.raises(InvalidRequest) as error:
        ask(engine, **terms)
    assert error.value.param == param
    assert_nothing_leaked(engine)


@ways
def test_a_slip_of_a_keyword_is_an_error(engine: Engine, ask: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="prioritty"):
        ask(engine, prioritty=1)


@ways
def test_wishes_do_not_change_the_answer(
    engine: Engine, limited: Engine, ask: Callable[..., Any]
) -> None:
    tokens = engine.generate(PROMPT, greedy())[0].tokens
    answer = ask(limited, tenant="team", priority=5, ttft_slo=600.0, cache_salt="mine")
    assert sum((part.tokens for part in answer), ()) == tokens


@ways
def test_who_cannot_be_answered_in_time_is_told_when_to_come_back(
    limited: Engine, ask: Callable[..., Any]
) -> None:
    before = limited.stats().too_late
    for terms in ({"tenant": "late"}, {"ttft_slo": 1e-6}):
        with pytest.raises(TooLate) as error:
            ask(limited, **terms)
        assert error.value.retry_after >= 1
    assert len(ask(limited, tenant="late", ttft_slo=600)) >= 1  # a request's own time comes first
    assert limited.stats().too_late == before + 2
    assert_nothing_leaked(limited)


def test_a_rate_is_kept(limited: Engine) -> None:
    """The first request takes all that the tenant may ask for in a minute."""
    assert WAYS[0](limited, tenant="rare")
    for ask in WAYS:
        with pytest.raises(RateLimited) as error:
            ask(limited, tenant="rare")
        assert 30 < error.value.retry_after <= 60
    assert WAYS[0](limited, tenant="another")
    wait_until(lambda: limited.stats().rate_limited == len(WAYS))
    assert limited.stats().tenants.keys() >= {"rare", "another"}
