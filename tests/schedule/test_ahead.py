"""Adapters brought ahead of their turn: in the order of the policies, and never at its cost."""

from typing import Literal

import pytest
from light_engine import Job, LightEngine

from jslora.schedule.scheduler import PREFETCH
from jslora.schedule.settings import SchedulerSection
from jslora.schedule.stack import NAMES, Name


def engine_with(
    policy: list[Name], sizes: tuple[int, ...], pages: int, transfers: int = 0,
    fraction: float = 0.1,
) -> LightEngine:  # fmt: skip
    section = SchedulerSection(policy=policy, cluster_fraction=fraction, ttft_slo=100.0)
    return LightEngine(section, sizes=sizes, pages=pages, transfers=transfers)


def on_device(engine: LightEngine) -> list[int]:
    """Numbers of adapters that came or come, in the order in which that began."""
    return [int(digest) for digest in engine.residency.residents]


ORDERS: list[tuple[list[Name], list[int]]] = [
    ([], [0, 1, 2]),
    (["fcfs"], [0, 1, 2]),
    (["newest"], [2, 1, 0]),
    (["priority"], [1, 2, 0]),
    (["shortest"], [1, 0, 2]),
    (["fair_tenants"], [1, 0, 2]),
    (["fair_adapters"], [1, 2, 0]),
    (["cluster"], [2, 0, 1]),
    (["slo"], [2, 1, 0]),
]
JOBS = (
    Job(adapter=0, tenant="a", prompt=9, priority=2, most=4),
    Job(adapter=1, tenant="b", prompt=5, priority=0, most=4),
    Job(adapter=2, tenant="a", prompt=30, priority=1, most=4),
)


def wait_all(engine: LightEngine) -> None:
    """All of `JOBS` wait, and the first one's tenant and adapter were served something."""
    for number, job in enumerate(JOBS):
        engine.add(str(number), job)
    engine.scheduler.policies.charge(next(iter(engine.scheduler.waiting)), 50.0)


@pytest.mark.parametrize(("policy", "order"), ORDERS, ids=str)
def test_adapters_come_in_the_order_of_the_policies(policy: list[Name], order: list[int]) -> None:
    """Adapter 2 alone is small enough for the cluster."""
    engine = engine_with(policy, (5, 5, 4), 42)
    wait_all(engine)
    engine.scheduler.fetch()
    assert on_device(engine) == order


@pytest.mark.parametrize(("policy", "order"), ORDERS, ids=str)
def test_if_there_is_room_for_one_the_first_of_the_order_has_it(
    policy: list[Name], order: list[int]
) -> None:
    engine = engine_with(policy, (11, 11, 10), 21, transfers=1, fraction=0.48)
    wait_all(engine)
    first: list[int] = []
    engine.starting = lambda sequence: first.append(int(sequence.digests[0]))
    engine.scheduler.fetch()
    assert on_device(engine) == order[:1]
    engine.run()
    assert first[0] == order[0], "it was used before another came in its place"
    assert engine.residency.loads == 3
    engine.check_nothing_left()


def test_only_those_near_the_front_have_their_adapters_brought() -> None:
    engine = engine_with([], (1,) * 12, 100)
    for number in range(12):
        engine.add(str(number), Job(adapter=number))
    engine.turn()
    assert on_device(engine) == list(range(PREFETCH))


def test_the_first_without_room_holds_back_the_adapters_of_all_behind_it() -> None:
    """Of 29 pages, 18 and 1 for its tokens are spoken for; 12 do not fit and 1 would."""
    engine = engine_with([], (18, 12, 1), 30)
    for number in range(3):
        engine.add(str(number), Job(adapter=number, prompt=2, answer=2, most=2))
    engine.scheduler.fetch()
    assert on_device(engine) == [0]


@pytest.mark.parametrize("policy", [[name] for name in NAMES if name != "slo"], ids=str)
@pytest.mark.parametrize("reserve", ["declared", 0.9])
def test_who_needs_much_room_is_not_passed_over_for_ever(
    policy: list[Name], reserve: Literal["declared"] | float
) -> None:
    """Small requests come without end; there is never room for its adapter beside three of them."""
    section = SchedulerSection(policy=policy, reserve=reserve, starvation_seconds=20.0)
    engine, started = LightEngine(section, pages=24, sizes=(14,)), dict[str, float]()
    engine.starting = lambda sequence: started.setdefault(sequence.request.id, engine.now)
    for number in range(100):
        engine.add(str(number), Job(answer=12, most=12))
        if number == 5:
            engine.add("much", Job(adapter=0, prompt=20, answer=8, most=8, tenant="b"))
        engine.turn()
    assert len(started) > 15 and started.get("much", 100) < 50


@pytest.mark.parametrize("policy", [[name] for name in NAMES], ids=str)
@pytest.mark.parametrize("transfers", [1, 2, 9])
def test_adapters_that_have_no_room_beside_each_other_take_turns(
    policy: list[Name], transfers: int
) -> None:
    """A load counts as service, so with fair shares the next is due before it was used."""
    section = SchedulerSection(policy=policy, ttft_slo=100.0)
    engine = LightEngine(section, pages=24, sizes=(14, 14, 14), transfers=transfers)
    for number in range(3):
        engine.add(str(number), Job(adapter=number, tenant="abc"[number]))
    engine.run(100)
    assert engine.residency.loads == 3
    engine.check_nothing_left()


def test_what_came_for_somebody_stays_until_it_was_used() -> None:
    """Others want the room as soon as it is there; no adapter comes twice."""
    engine = engine_with([], (6, 7, 8, 9), 24, transfers=2)
    for number in range(16):
        engine.add(str(number), Job(adapter=number % 4, answer=number % 3))
    loads = 0
    while not engine.idle:
        engine.turn()
        kept = engine.scheduler._ahead.kept()
        fresh = engine.residency.fresh
        assert fresh <= kept | {digest for s in engine.scheduler.running for digest in s.digests}
        loads = engine.residency.loads
    assert loads <= 16 and set(engine.ends.values()) == {"stop"}
    engine.check_nothing_left()


def test_an_adapter_nobody_waits_for_any_more_may_leave() -> None:
    engine = engine_with([], (6, 20), 28, transfers=9)
    engine.add("leaves", Job(adapter=0))
    engine.scheduler.fetch()
    assert engine.scheduler._ahead.kept() == {"000"}
    engine.scheduler.abort(["leaves"])
    assert engine.scheduler._ahead.kept() == set()
    engine.add("stays", Job(adapter=1))
    engine.run()
    assert on_device(engine) == [1] and engine.residency.evictions == 1
    engine.check_nothing_left()


def test_what_could_never_be_in_host_memory_together_is_brought_one_by_one() -> None:
    engine = engine_with([], (2, 2, 2), 40)
    engine.store.fits_host = lambda pages: pages <= 4  # type: ignore[method-assign]
    for number in range(3):
        engine.add(str(number), Job(adapter=number))
    engine.scheduler.fetch()
    assert on_device(engine) == [0, 1]


def test_a_file_that_cannot_be_read_any_more_ends_its_request_alone() -> None:
    engine = engine_with(["fair_tenants"], (2, 2), 40, transfers=9)
    engine.store.refused.add("000")
    for number in range(2):
        engine.add(str(number), Job(adapter=number))
    engine.run()
    assert engine.ends == {"0": "adapter_rejected", "1": "stop"}
    engine.check_nothing_left()
