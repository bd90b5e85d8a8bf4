"""Single policies: what each prefers, how far, and for how long."""

from collections.abc import Sequence as Seq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from light_engine import Job, LightEngine
from waiting_sequences import make_sequence, queue

from jslora.schedule.order import Cluster, NewestFirst, Priority, ShortestFirst
from jslora.schedule.queue import Policy
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import SchedulerSection


def ordered(policy: Policy, sequences: Seq[Sequence], now: float = 0.0) -> list[int]:
    """Orders of arrival of those who wait, as one policy puts them."""
    found = queue(*sequences).front(len(sequences), [policy], now)
    for sequence in found:
        sequence.place = -1
    return [sequence.order for sequence in found]


def test_against_arrival() -> None:
    sequences = [make_sequence(order, since=float(order)) for order in range(3)]
    assert ordered(NewestFirst(1000.0), sequences, 100.0) == [2, 1, 0]


# Who waited too long ------------------------------------------------------------------------------


def cluster_without_room(starvation: float) -> Cluster:
    """Only adapter 0 runs, and no other fits beside it."""
    policy = Cluster(0, starvation)
    for adapter in (0, 1):
        policy.queued(sized(adapter, 1))
    policy.started(sized(0, 1))
    return policy


@pytest.mark.parametrize("make", [NewestFirst, ShortestFirst, cluster_without_room])
def test_who_waited_too_long_goes_before_all_others_the_oldest_first(make: type) -> None:
    """Number 3 and 4 are what the policies prefer: last, shortest, with an adapter that runs."""
    columns = [(0.0, 9.0, 1), (1.0, 8.0, 1), (7.0, 7.0, 1), (8.0, 2.0, 0), (9.0, 1.0, 0)]
    sequences = [
        make_sequence(order, since=since, work=work, adapter_number=adapter)
        for order, (since, work, adapter) in enumerate(columns)
    ]
    assert ordered(make(20.0), sequences, 10.0)[-1] in (0, 2)
    assert ordered(make(9.0), sequences, 10.0)[:2] == [0, 1]
    assert set(ordered(make(9.0), sequences, 10.0)[2:4]) == {3, 4}
    assert ordered(make(1.0), sequences, 10.0) == [0, 1, 2, 3, 4]


# Priority -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=12),
    st.sampled_from([0.5, 3.0, 10.0]),
)
def test_ageing_bounds_how_long_a_higher_priority_goes_first(
    arrivals: list[tuple[int, int]], ageing: float
) -> None:
    """Whoever came as many times `ageing` later as levels lie between, and one more, is behind."""
    arrivals = sorted(arrivals, key=lambda arrival: arrival[1])
    sequences = [
        make_sequence(order, level=float(level), since=float(since))
        for order, (level, since) in enumerate(arrivals)
    ]
    place = {order: at for at, order in enumerate(ordered(Priority(ageing), sequences, 50.0))}
    for first, (level, since) in enumerate(arrivals):
        for second in range(first + 1, len(arrivals)):
            other, later = arrivals[second]
            if other >= level or later - since >= (level - other + 1) * ageing:
                assert place[first] < place[second]


def test_priority_goes_first_until_ageing_makes_up_for_it() -> None:
    sequences = [make_sequence(0, level=2.0, since=0.0), make_sequence(1, level=0.0, since=5.0)]
    assert ordered(Priority(10.0), sequences, 6.0) == [1, 0]
    assert ordered(Priority(10.0), sequences, 14.9) == [1, 0]
    sequences[1].since = 24.0  # two levels and a part are made up for
    assert ordered(Priority(10.0), sequences, 25.0) == [0, 1]


# Clusters -----------------------------------------------------------------------------------------


def sized(adapter: int, pages: int, order: int = 0) -> Sequence:
    """A sequence whose adapter has so many pages."""
    sequence = make_sequence(order, adapter_number=adapter)
    if pages:
        sequence.registrations = (Pages(pages),)  # type: ignore[assignment]
    return sequence


class Pages:
    """Of a registration, its size."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages


def first_choice(policy: Cluster, *adapters: int) -> list[int]:
    """Which of these adapters are not put off."""
    waiting = queue(*(make_sequence(n, adapter_number=a) for n, a in enumerate(adapters)))
    scores = policy.score(waiting, np.arange(len(adapters)), 0.0)
    return [adapter for adapter, score in zip(adapters, scores, strict=True) if score == 0]


def cluster(bound: int, **pages: int) -> Cluster:
    """Adapters "a0", "a1" and so on of so many pages were asked for."""
    policy = Cluster(bound, 1e9)
    for name, size in pages.items():
        policy.queued(sized(int(name[1:]), size))
    return policy


def test_adapters_join_while_they_fit_beside_those_that_run() -> None:
    policy = cluster(10, a0=4, a1=6, a2=7, a3=11)
    assert first_choice(policy, 0, 1, 2, 3) == [0, 1, 2]
    policy.started(sized(0, 4))
    assert first_choice(policy, 0, 1, 2, 3) == [0, 1]
    policy.started(sized(1, 6))
    policy.started(sized(1, 6))
    assert first_choice(policy, 0, 1, 2, 3) == [0, 1]
    policy.stopped(sized(0, 4))
    assert first_choice(policy, 0, 1, 2, 3) == [0, 1]
    policy.stopped(sized(1, 6))
    policy.stopped(sized(1, 6))
    assert first_choice(policy, 0, 1, 2, 3) == [0, 1, 2]


def test_the_base_model_needs_no_adapter_and_is_never_put_off() -> None:
    policy = cluster(4, a0=0, a1=9, a2=1)
    policy.started(sized(1, 9))
    assert first_choice(policy, 0, 1, 2) == [0, 1]


def test_an_adapter_that_changes_its_size_under_its_name_is_counted_right() -> None:
    """It was loaded anew while a sequence of the old one runs."""
    policy = cluster(10, a0=2, a1=9, a2=6)
    policy.started(sized(0, 2))
    policy.queued(sized(0, 8))
    policy.started(sized(0, 8))
    policy.stopped(sized(0, 2))
    policy.stopped(sized(0, 8))
    policy.started(sized(1, 9))
    assert first_choice(policy, 1, 2) == [1], "9 pages are in use, of 10"


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 12),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30),
)  # fmt: skip
def test_what_is_not_put_off_keeps_within_the_bound(
    sizes: list[int], bound: int, moves: list[tuple[bool, int]]
) -> None:
    """Over any starts and stops: those of adapters that run, and what fits beside them."""
    policy = cluster(bound, **{f"a{n}": size for n, size in enumerate(sizes)})
    running: list[int] = []
    for starts, adapter in moves:
        adapter %= len(sizes)
        if starts:
            policy.started(sized(adapter, sizes[adapter]))
            running.append(adapter)
        elif adapter in running:
            policy.stopped(sized(adapter, sizes[adapter]))
            running.remove(adapter)
        used = sum(sizes[a] for a in set(running))
        for other, size in enumerate(sizes):
            fits = other in running or size == 0 or size + used <= bound
            assert first_choice(policy, other) == ([other] if fits else [])


def batches(section: SchedulerSection) -> list[set[int | None]]:
    """Adapters that run together, step by step, when three of 2 pages take turns."""
    engine = LightEngine(section, pages=60, sizes=(2, 2, 2))
    for number in range(18):
        engine.add(str(number), Job(adapter=number % 3, answer=3))
    found = []
    while not engine.idle:
        engine.turn()
        found.append({s.adapter_pages * int(s.digests[0]) for s in engine.scheduler.running})
    engine.check_nothing_left()
    return found


def test_a_batch_has_few_adapters_if_there_are_enough_requests_for_them() -> None:
    spread = batches(SchedulerSection(policy=["fcfs"]))
    clustered = batches(SchedulerSection(policy=["cluster"], cluster_fraction=2 / 60))
    assert max(map(len, spread)) == 3
    assert sum(map(len, clustered)) < 0.7 * sum(map(len, spread))
    # Soft: the last of one adapter share their batches with the first of the next.
    assert len(clustered) <= len(spread) + 3
