"""Early abort: who is given up, who goes first meanwhile, and that nobody is locked out."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from light_engine import Job, LightEngine
from waiting_sequences import make_sequence, queue

from jslora.schedule.deadlines import Deadlines
from jslora.schedule.queue import Waiting
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import SchedulerSection


def due(order: int, since: float, seconds: float) -> Sequence:
    return make_sequence(order, since=since, deadline=since + seconds)


def late(policy: Deadlines, waiting: Waiting, now: float) -> list[int]:
    return sorted(sequence.order for sequence in policy.late(waiting, now))


# Who is given up ----------------------------------------------------------------------------------


def test_who_is_past_its_deadline_is_given_up() -> None:
    waiting = queue(due(0, 0.0, 5.0), due(1, 2.0, 5.0), due(2, 0.0, 100.0))
    policy = Deadlines(6.0)
    assert late(policy, waiting, 5.0) == []
    assert late(policy, waiting, 5.1) == [0]
    assert late(policy, waiting, 7.1) == [0, 1]


def test_who_could_not_get_its_first_token_in_time_any_more_is_given_up() -> None:
    """First tokens take two seconds, always."""
    waiting, policy = queue(due(0, 0.0, 10.0)), Deadlines(6.0)
    for _ in range(100):
        policy.answered(2.0)
    assert late(policy, waiting, 7.9) == []
    assert late(policy, waiting, 8.1) == [0]


def test_first_tokens_that_take_now_less_now_more_need_a_margin() -> None:
    def given_up_at(times: tuple[float, float]) -> float:
        policy, waiting = Deadlines(6.0), queue(due(0, 0.0, 100.0))
        for _ in range(100):
            for seconds in times:
                policy.answered(seconds)
        return next(now for now in np.arange(0, 101, 0.25) if policy.late(waiting, now))

    assert given_up_at((1.0, 3.0)) < given_up_at((2.0, 2.0)) - 1


@given(
    st.lists(st.floats(0, 1e4), max_size=20), st.floats(0.01, 1e3), st.floats(0, 1e3),
    st.floats(0, 0.499),
)  # fmt: skip
def test_nobody_is_given_up_in_the_first_half_of_its_time(
    answered: list[float], seconds: float, since: float, passed: float
) -> None:
    policy = Deadlines(6.0)
    for value in answered:
        policy.answered(value)
    waiting = queue(due(0, since, seconds))
    assert policy.late(waiting, since + passed * seconds) == []
    assert len(policy.late(waiting, since + 1.001 * seconds)) == 1


def test_who_was_preempted_is_not_given_up() -> None:
    preempted = due(0, 0.0, 1.0)
    preempted.life = 1
    assert late(Deadlines(6.0), queue(preempted), 50.0) == []


def test_a_server_that_was_slow_once_serves_again() -> None:
    """The first token of the first request took far longer than anybody may wait."""
    engine = LightEngine(SchedulerSection(policy=["slo"], ttft_slo=10.0))
    engine.add("slow", Job(slo=3600.0))
    engine.turn()
    engine.now += 500.0
    for number in range(60):
        engine.add(str(number), Job())
        engine.turn()
        engine.turn()
    engine.run()
    assert list(engine.ends.values()).count("too_late_error") < 10
    assert engine.ends["59"] == "stop"


# Who goes first -----------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 50), max_size=12), st.lists(st.floats(0, 50), max_size=12),
    st.floats(50, 80), st.sampled_from([0.5, 6.0, 60.0]),
)  # fmt: skip
def test_the_newest_go_first_exactly_while_more_arrive_than_start(
    arrivals: list[float], starts: list[float], now: float, memory: float
) -> None:
    def average(times: list[float]) -> float:
        return sum(math.exp(-(now - time) / memory) for time in times) / memory

    policy = Deadlines(memory)
    for time in sorted(arrivals):
        policy.arrived(time)
    for time in sorted(starts):
        policy.started(time)
    assume(not math.isclose(average(arrivals), average(starts)) or not arrivals)
    front = queue(*(make_sequence(order) for order in range(3))).front(3, [policy], now)
    newest_first = average(arrivals) > average(starts)
    assert [s.order for s in front] == ([2, 1, 0] if newest_first else [0, 1, 2])


def started(section: SchedulerSection, every: int, turns: int) -> list[int]:
    """Numbers of requests in the order in which they start; one comes every so many turns."""
    engine, order = LightEngine(section, pages=60), list[int]()
    engine.starting = lambda sequence: order.append(sequence.order)
    for turn in range(turns):
        if turn % every == 0:
            engine.add(str(turn), Job(answer=8, most=8))
        engine.turn()
    return order


def test_under_overload_the_newest_start_and_otherwise_the_oldest() -> None:
    section = SchedulerSection(policy=["slo"], ttft_slo=20.0)
    calm = started(section, every=6, turns=120)
    assert calm == sorted(calm) and len(calm) == 20
    busy = started(section, every=1, turns=120)[6:]
    ahead = sum(after < before for before, after in pairwise(busy))
    assert busy[-1] > 110 and len(busy) < 60
    assert ahead < len(busy) / 2, "who is passed over is given up, not served later"


# When to ask again --------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 50), max_size=30), st.integers(0, 200), st.floats(50, 500))
def test_the_time_to_ask_again_is_bounded(starts: list[float], waiting: int, now: float) -> None:
    policy = Deadlines(6.0)
    for time in sorted(starts):
        policy.started(time)
    seconds = policy.retry_after(queue(*map(make_sequence, range(waiting))), now)
    assert 1.0 <= seconds <= 60.0


@pytest.mark.parametrize(("waiting", "least", "most"), [(0, 1.0, 1.0), (30, 10, 20), (900, 60, 60)])
def test_the_time_to_ask_again_is_that_to_serve_those_who_wait(
    waiting: int, least: float, most: float
) -> None:
    """Two start every second."""
    policy = Deadlines(6.0)
    for tick in range(100):
        policy.started(tick / 2)
    seconds = policy.retry_after(queue(*map(make_sequence, range(waiting))), 50.0)
    assert least <= seconds <= most
