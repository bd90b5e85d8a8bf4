"""Rates and quotas over any trace, against what the limits say of the whole of it."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.errors import RateLimited
from jslora.schedule.rates import LONGEST_RETRY, Rates
from jslora.schedule.settings import Quota, Tenant

Trace = list[tuple[float, str, int]]

GAPS = st.floats(0, 90, allow_nan=False)
TRACE = st.lists(st.tuples(GAPS, st.sampled_from("ab"), st.integers(1, 400)), max_size=60)
NAMES = st.sampled_from([("x",), ("y",), ("x", "y"), ()])
PER_MINUTE = st.sampled_from([0.5, 1, 3, 7.3, 60])


def admitted(rates: Rates, *request: Any) -> bool:
    try:
        rates.admit(*request)
    except RateLimited:
        return False
    return True


@given(trace=TRACE, limit=PER_MINUTE, start=st.sampled_from([0.0, 1e6 + 0.1]))
def test_requests_of_any_window_are_a_bucket_and_what_flows_in(
    trace: Trace, limit: float, start: float
) -> None:
    rates, now = Rates({"*": Tenant(requests_per_minute=limit)}, {}), start
    times: dict[str, list[float]] = {"a": [], "b": []}
    for gap, tenant, tokens in trace:
        now += gap
        if admitted(rates, tenant, (), tokens, now):
            times[tenant].append(now)
    for taken in times.values():
        for i, first in enumerate(taken):
            for n, last in enumerate(taken[i:], 1):
                assert n <= (last - first) * limit / 60 + max(limit, 1) + 1e-3


@given(trace=TRACE, limit=st.sampled_from([1, 50, 300, 5000]))
def test_prompt_tokens_of_any_window_are_a_bucket_and_what_flows_in(
    trace: Trace, limit: float
) -> None:
    """A prompt larger than the bucket counts as the bucket: no other comes until it is paid."""
    rates, now = Rates({}, {"x": Quota(tokens_per_minute=limit)}), 0.0
    taken: list[tuple[float, int]] = []
    for gap, tenant, tokens in trace:
        now += gap
        if admitted(rates, tenant, "x", tokens, now):
            taken.append((now, tokens))
    for i, (first, _) in enumerate(taken):
        total = 0
        for last, tokens in taken[i:]:  # before each, what had come is paid for
            assert total + min(tokens, limit) <= limit + (last - first) * limit / 60 + 1e-3
            total += tokens


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "generated", "ended"]), st.sampled_from("ab"),
        NAMES, st.integers(1, 300), GAPS,
    ),
    max_size=60,
)  # fmt: skip
TENANTS = {
    "a": Tenant(requests_per_minute=4, max_outstanding=3),
    "*": Tenant(tokens_per_minute=200, max_outstanding=4),
}
ADAPTERS = {"x": Quota(tokens_per_minute=500, requests_per_minute=2), "*": Quota(max_outstanding=2)}


def replay(operations: list[Any]) -> tuple[Rates, float, Counter[tuple[str, tuple[str, ...]]]]:
    """Rates that went through a history, without what it refused; when it ended; who is left."""
    rates, now, left = Rates(TENANTS, ADAPTERS), 0.0, Counter[tuple[str, tuple[str, ...]]]()
    for what, tenant, adapter, tokens, gap in operations:
        now += gap
        if what == "admit":
            left[tenant, adapter] += admitted(rates, tenant, adapter, tokens, now)
        elif left[tenant, adapter] and what == "generated":
            rates.generated(tenant, adapter, tokens, now)
        elif left[tenant, adapter]:
            rates.ended(tenant, adapter)
            left[tenant, adapter] -= 1
    return rates, now, left


@given(operations=OPERATIONS, tokens=st.integers(1, 700), adapter=NAMES)
def test_who_comes_back_when_told_is_admitted(
    operations: list[Any], tokens: int, adapter: tuple[str, ...]
) -> None:
    rates, now, left = replay(operations)
    for (tenant, name), n in left.items():
        for _ in range(n):
            rates.ended(tenant, name)
    try:
        rates.admit("b", adapter, tokens, now)
    except RateLimited as refusal:
        wait = refusal.retry_after
        assert wait is not None and wait > 0
        assert wait == LONGEST_RETRY or not admitted(
            rates, "b", adapter, tokens, now + wait - min(1e-3, wait / 2)
        ), "it could have come earlier"
        if wait < LONGEST_RETRY:
            rates.admit("b", adapter, tokens, now + wait)


@given(operations=OPERATIONS, prompts=st.lists(st.integers(1, 700), max_size=5))
def test_a_refusal_takes_nothing(operations: list[Any], prompts: list[int]) -> None:
    """Refused requests beside a history leave the same answers as the history alone."""
    (rates, now, _), (untouched, _, _) = replay(operations), replay(operations)
    for adapter in [("x",), ("y",)]:
        while admitted(untouched, "a", adapter, 1, now):
            rates.admit("a", adapter, 1, now)
        for tokens in prompts:
            assert not admitted(rates, "a", adapter, tokens, now)
    for later in (now, now + 20, now + 3600):
        for who in product("ab", [("x",), ("y",), ("x", "y"), ()]):
            same = [admitted(r, *who, 90, later) for r in (rates, untouched)]
            assert same[0] == same[1], (who, later)


@given(ends=st.lists(st.booleans(), max_size=60))
def test_outstanding_is_exact(ends: list[bool]) -> None:
    rates, n = Rates({"*": Tenant(max_outstanding=3)}, {}), 0
    for end in ends:
        if not end:
            assert admitted(rates, "a", (), 5, 0.0) == (n < 3)
            n = min(n + 1, 3)
        elif n:
            rates.ended("a", ())
            n -= 1
    assert admitted(rates, "b", (), 5, 0.0), "another name is counted by itself"


def test_answers_are_charged_and_a_debt_is_waited_out() -> None:
    rates = Rates({"a": Tenant(tokens_per_minute=60)}, {})
    rates.admit("a", (), 10, 0.0)
    rates.generated("a", (), 80, 0.0)  # 30 in debt
    with pytest.raises(RateLimited) as refusal:
        rates.admit("a", (), 20, 10.0)
    assert refusal.value.retry_after == pytest.approx(40)
    assert "'a' has -20 tokens left for a prompt of 20" in refusal.value.message
    assert "tokens_per_minute is 60" in refusal.value.message
    rates.admit("a", (), 20, 50.0)


def test_a_prompt_above_the_bucket_waits_until_it_is_full() -> None:
    rates = Rates({"a": Tenant(tokens_per_minute=60)}, {})
    rates.admit("a", (), 10, 0.0)
    assert not admitted(rates, "a", (), 600, 9.0)
    rates.admit("a", (), 600, 10.0)
    assert not admitted(rates, "a", (), 1, 549.0)
    rates.admit("a", (), 1, 551.0)


def test_which_limit_is_told() -> None:
    rates = Rates({"*": Tenant(max_outstanding=1)}, {"x": Quota(requests_per_minute=0.01)})
    rates.admit("a", ("x",), 1, 0.0)
    with pytest.raises(RateLimited, match=r"requests_per_minute is 0\.01") as by_adapter:
        rates.admit("b", ("x",), 1, 0.0)
    assert by_adapter.value.param == "model" and by_adapter.value.retry_after == LONGEST_RETRY
    with pytest.raises(RateLimited, match=r"1 requests.*max_outstanding is 1") as by_tenant:
        rates.admit("a", (), 1, 0.0)
    assert by_tenant.value.param is None


def test_a_listed_name_is_not_under_the_star() -> None:
    rates = Rates({"free": Tenant(), "*": Tenant(max_outstanding=1)}, {})
    for _ in range(3):
        rates.admit("free", (), 1, 0.0)
    rates.generated("free", (), 5, 0.0)
    rates.ended("free", ())


def test_idle_names_are_forgotten_and_no_others() -> None:
    rates = Rates({"*": Tenant(requests_per_minute=2)}, {})
    for _ in range(2):
        rates.admit("debtor", (), 1, 59_999.0)
        rates.ended("debtor", ())
    rates.admit("busy", (), 1, 0.0)
    for n in range(1000):
        rates.admit(f"name {n}", (), 1, n * 60.0)
        rates.ended(f"name {n}", ())
    assert len(rates._tenants._groups) < 200
    for n in range(200):
        rates.admit(f"other {n}", (), 1, 60_000.0)
        rates.ended(f"other {n}", ())
    assert not admitted(rates, "debtor", (), 1, 60_000.0)
    rates.ended("busy", ())
