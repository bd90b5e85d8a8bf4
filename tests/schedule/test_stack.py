"""Every legal stack of policies serves any mix of requests to its end and leaves nothing behind.

Which stacks are legal is tested in `test_settings`.
"""

import random

import pytest
from light_engine import STACKS, Job, LightEngine

from jslora.schedule.settings import Quota, SchedulerSection, Tenant
from jslora.schedule.stack import NAMES, Name


def mixed(number: int) -> list[Job]:
    """Jobs of all kinds."""
    chance = random.Random(number)
    return [
        Job(
            prompt=chance.randint(1, 20), answer=chance.randint(0, 16),
            adapter=chance.choice([None, 0, 1, 2, 3]), tenant=chance.choice("abc"),
            priority=chance.randint(0, 3), slo=chance.choice([None, 15.0, 60.0]),
        )
        for _ in range(14)
    ]  # fmt: skip


def serve(stack: tuple[Name, ...], number: int) -> LightEngine:
    """A mix that comes within a few turns, on a pool that is too small for all of it."""
    section = SchedulerSection(
        policy=list(stack), ageing_seconds=5.0, starvation_seconds=12.0, ttft_slo=30.0,
        reserve=0.5, itl_target=5.0 if number % 2 else None,
        tenants={"a": Tenant(share=3.0), "*": Tenant(priority=1)},
        adapters={"*": Quota(share=0.5, max_outstanding=50)},
    )  # fmt: skip
    engine = LightEngine(section, pages=18, transfers=1 + number % 3)
    for job_number, job in enumerate(mixed(number)):
        engine.add(str(job_number), job)
        if job_number % 3 == 0:
            engine.turn()
            engine.scheduler.check()
    engine.scheduler.abort(["5"])
    engine.run()
    return engine


@pytest.mark.parametrize("first", [None, *NAMES])
def test_every_legal_stack_serves_a_mix_to_its_end(first: Name | None) -> None:
    seen = 0
    for number, stack in enumerate(STACKS):
        if (stack[0] if stack else None) != first:
            continue
        seen += 1
        engine = serve(stack, number)
        engine.check_nothing_left()
        allowed = {"stop", "length"} | ({"too_late_error"} if "slo" in stack else set())
        assert set(engine.ends.values()) <= allowed, stack
        assert {*engine.ends, "5"} == set(map(str, range(14))), stack
    assert seen


def test_the_mix_is_one_that_needs_preemption_and_eviction() -> None:
    """Or the test above would say little."""
    engines = [serve(("fcfs",), number) for number in range(12)]
    assert sum(engine.scheduler.preemptions for engine in engines) > 0
    assert all(engine.residency.evictions for engine in engines)
