"""Fair shares: what two backlogged groups receive differs by a bound that does not grow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from light_engine import LIMITS, Job, LightEngine
from waiting_sequences import make_sequence, queue

from jslora.schedule.settings import SchedulerSection, Tenant
from jslora.schedule.shares import GENERATED, PROMPT, Shares


def make_shares(*weights: float) -> Shares:
    return Shares("tenant", lambda group: weights[group])


def counters(shares: Shares, groups: int) -> list[float]:
    """What the groups are ordered by."""
    waiting = queue(*(make_sequence(n, tenant_number=n) for n in range(groups)))
    return shares.score(waiting, np.arange(groups), 0.0).tolist()


def normal(shares: Shares, weights: list[float]) -> list[float]:
    """Service of each group a unit of its share."""
    return [served / weight for served, weight in zip(shares.service(), weights, strict=False)]


# Counters -----------------------------------------------------------------------------------------


def test_service_counts_by_share() -> None:
    shares = make_shares(1.0, 4.0)
    for group in (0, 1):
        shares.queued(group)
    for group in (0, 1):
        shares.charge(group, 8.0)
    shares.charge_all([1, 0, 1], GENERATED)
    shares.charge_all([], GENERATED)
    assert counters(shares, 2) == [10.0, 3.0]
    assert shares.service()[:2] == [10.0, 12.0]


def test_the_group_with_the_least_goes_first() -> None:
    shares = make_shares(*[1.0] * 20)
    sequences = [make_sequence(n, tenant_number=group) for n, group in enumerate((19, 3, 0))]
    for sequence in sequences:
        shares.queued(sequence.tenant)
    for sequence, charge in zip(sequences, (2.0, 1.0, 3.0), strict=True):
        shares.charge(sequence.tenant, charge)
    front = queue(*sequences).front(3, [shares], 0.0)
    assert [sequence.tenant for sequence in front] == [3, 19, 0]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["queued", "left", "started", "charge"]), st.integers(0, 3)),
        max_size=80,
    )
)
def test_a_group_that_returns_has_no_credit_and_nobody_loses_service(
    moves: list[tuple[str, int]],
) -> None:
    shares = make_shares(1.0, 1.0, 1.0, 1.0)
    waits = [0] * 4
    for group in range(4):
        shares.queued(group)
        shares.left(group)
    for move, group in moves:
        before = counters(shares, 4)
        if move == "queued":
            least = min((before[g] for g in range(4) if waits[g]), default=None)
            shares.queued(group)
            after = counters(shares, 4)
            assert after[:group] + after[group + 1 :] == before[:group] + before[group + 1 :]
            assert after[group] >= before[group]
            if waits[group]:
                assert after == before
            elif least is not None:
                assert after[group] == max(before[group], least)
            waits[group] += 1
        elif waits[group]:
            if move == "left":
                shares.left(group)
                waits[group] -= 1
            elif move == "started":
                shares.left(group)
                shares.started(group)
                waits[group] -= 1
            else:
                shares.charge(group, 3.0)
                assert counters(shares, 4)[group] == before[group] + 3
                assert shares.service()[group] >= 3


def test_nobody_saves_up_while_nobody_waits() -> None:
    """The queue is empty whenever somebody comes: the last one served says where counters are."""
    shares = make_shares(1.0, 1.0)
    for _ in range(50):
        shares.queued(0)
        shares.left(0)
        shares.started(0)
        shares.charge(0, 10.0)
    shares.queued(1)
    shares.queued(0)
    assert counters(shares, 2) == [500.0, 490.0], "not 500 to 0"


# The bound (Sheng et al., theorem 4.4) ------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Groups that never run out of requests, on a server of so many rows."""

    weights: list[float]
    rows: int
    prompts: list[int]
    answers: list[int]
    load: float


@st.composite
def loads(draw: Callable) -> Load:
    groups = draw(st.integers(2, 4))
    return Load(
        [draw(st.sampled_from([0.25, 1.0, 3.0, 10.0])) for _ in range(groups)],
        draw(st.integers(1, 5)),
        draw(st.lists(st.integers(1, 30), min_size=1, max_size=5)),
        draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)),
        draw(st.sampled_from([0.0, 15.0])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(loads())
def test_backlogged_groups_receive_their_shares_but_for_a_bound(load: Load) -> None:
    """A counter runs ahead by one start and by what its rows in flight may still generate.

    When a group was last let in its counter was the least. What it was charged since, divided by
    its share, is at most a prompt, a load of its adapter, and the answers of all rows.
    """
    shares, groups = make_shares(*load.weights), len(load.weights)
    ahead = max(load.prompts) * PROMPT + load.load + load.rows * max(load.answers) * GENERATED
    bound = [ahead / weight for weight in load.weights]
    sequences = [make_sequence(n, tenant_number=n) for n in range(groups)]
    waiting = queue(*sequences)
    for group in range(groups):
        shares.queued(group)  # one of each always waits
    running: list[list[int]] = []
    for turn in range(300):
        while len(running) < load.rows:
            group = waiting.front(1, [shares], 0.0)[0].tenant
            shares.queued(group)
            shares.left(group)
            shares.started(group)
            shares.charge(group, PROMPT * load.prompts[turn % len(load.prompts)] + load.load)
            running.append([group, load.answers[(turn + group) % len(load.answers)]])
        shares.charge_all([group for group, _ in running], GENERATED)
        running = [[group, left - 1] for group, left in running if left > 1]
        served = normal(shares, load.weights)
        for one in range(groups):
            for other in range(groups):
                assert served[one] - served[other] <= bound[one] + 1e-6


def backlog(section: SchedulerSection, jobs: dict[str, Job], turns: int) -> LightEngine:
    """Tenants of which each always has some requests waiting, for so many turns."""
    engine, number = LightEngine(section, pages=60), 0
    for _ in range(turns):
        waiting = [s.request.tenant for s in engine.scheduler.waiting]
        for tenant, job in jobs.items():
            for _ in range(4 - waiting.count(tenant)):
                engine.add(f"{tenant}{number}", job)
                number += 1
        engine.turn()
    return engine


@pytest.mark.parametrize("turns", [200, 800])
@pytest.mark.parametrize("policy", [["fair_tenants"], ["fair_tenants", "shortest"]], ids=str)
def test_two_backlogged_tenants_receive_what_they_are_due(policy: list, turns: int) -> None:
    """One asks for much more at a time; the difference is the same after four times the turns."""
    share = {"a": 1.0, "b": 3.0}
    section = SchedulerSection(
        policy=policy, tenants={name: Tenant(share=value) for name, value in share.items()}
    )
    jobs = {
        "a": Job(tenant="a", prompt=30, answer=12, most=12),
        "b": Job(tenant="b", prompt=3, answer=5, most=5),
    }
    engine = backlog(section, jobs, turns)
    service = engine.scheduler.policies.service()
    normal = {name: service[name] / share[name] for name in share}
    rows = LIMITS.max_running
    bound = {n: (j.prompt + GENERATED * rows * j.answer) / share[n] for n, j in jobs.items()}
    assert -bound["b"] <= normal["a"] - normal["b"] <= bound["a"]
    assert min(normal.values()) > turns


def test_a_tenant_pays_for_the_adapters_it_makes_come() -> None:
    """Each of its requests has another adapter, none of which stays; the other one has none."""
    section = SchedulerSection(policy=["fair_tenants"])

    def served(adapters: bool) -> dict[str, int]:
        engine = LightEngine(section, pages=24, sizes=(8,) * 9, transfers=1)
        for number in range(120):
            adapter = number % 9 if adapters else None
            engine.add(f"a{number}", Job(tenant="a", adapter=adapter))
            engine.add(f"b{number}", Job(tenant="b"))
        for _ in range(150):
            engine.turn()
        return {name: engine.service[name, "generated"] for name in "ab"}

    without, cold = served(False), served(True)
    assert abs(without["a"] - without["b"]) < 20
    assert cold["a"] < 0.7 * cold["b"]
