"""Pages that nobody needs keep nobody from starting: each of these once went wrong."""

import random
from dataclasses import replace

import pytest
from light_engine import LIMITS, LightEngine
from light_engine import Job as LightJob

from jslora.bench.simulate import Machine, simulate
from jslora.bench.steptime import Work
from jslora.bench.workload import Job
from jslora.model.config import ModelConfig
from jslora.schedule.settings import SchedulerSection
from jslora.schedule.stack import Name

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=100, hidden=8, layers=2, heads=2, kv_heads=2,
    head_dim=4, feed_forward=16, max_positions=256,
)  # fmt: skip
RANKS = (4, 4, 4, 4, 0, 0, 0)  # 4 pages, 1024 bytes


class Steady:
    """Every step takes 20 ms."""

    def seconds(self, work: Work) -> float:
        return 0.02


def served_in_five_seconds(policy: list[Name]) -> int:
    """Requests that end while four times too many arrive, each for some adapter of 500."""
    rng, arrival, jobs = random.Random(1), 0.0, []
    for index in range(500):
        arrival += rng.expovariate(100)
        prompt = tuple(rng.randrange(1, 90) for _ in range(16))
        model, answer = f"a{rng.randrange(500)}", rng.randrange(5, 20)
        jobs.append(
            Job(index=index, arrival=arrival, model=model, prompt=prompt, output_tokens=answer)
        )
    machine = Machine(
        model=MODEL, step_time=Steady(), pages=100, page_size=4, transfer=1024 / 0.005,
        adapters={f"a{number}": RANKS for number in range(500)},
    )  # fmt: skip
    section = SchedulerSection(policy=policy, max_running=32, max_step_tokens=256)
    outcomes = simulate(jobs, machine, section, check=True).outcomes
    return sum(not found.error and found.times[-1] < 5 for found in outcomes)


@pytest.mark.parametrize("policy", [["newest"], ["slo"], ["cluster", "newest"]], ids=str)
def test_adapters_of_those_passed_over_do_not_fill_the_pool(policy: list[Name]) -> None:
    """The front moves on with every arrival; what came for those it left behind may leave."""
    assert served_in_five_seconds(policy) > served_in_five_seconds(["fcfs"]) / 2


def test_who_waited_before_lengths_were_learned_is_expected_anew() -> None:
    """All may have 220 tokens and have 8: one runs alone until its end tells, then many do."""
    limits = replace(LIMITS, max_running=16, max_step_tokens=256)
    engine = LightEngine(SchedulerSection(), limits=limits, pages=61)
    for number in range(48):
        engine.add(str(number), LightJob(prompt=8, answer=8, most=220))
    engine.run(100)
    engine.check_nothing_left()


def test_a_beginning_that_rows_share_takes_its_pages_once() -> None:
    """Sixteen prompts of 81 tokens, 80 of them in the cache: 20 pages for all, and two for each."""
    limits = replace(LIMITS, max_running=16, max_step_tokens=256)
    engine = LightEngine(
        SchedulerSection(reserve="declared"), limits=limits, pages=61, prefix_cache=True
    )
    engine.add("first", LightJob(prompt=81, answer=4, most=8))
    engine.run()
    for number in range(16):
        engine.add(str(number), LightJob(prompt=81, answer=4, most=8))
    engine.turn()
    engine.turn()
    assert len(engine.running()) > 8
    engine.run(30)
    assert engine.scheduler.preemptions == 0
    engine.check_nothing_left()


def test_one_that_could_run_does_while_the_next_finds_no_room_for_its_adapter() -> None:
    """Adapters of six pages, of which the pool holds one beside a request, and slow loads."""
    section = SchedulerSection(policy=["newest"], starvation_seconds=1000)
    engine = LightEngine(section, pages=15, sizes=(6,) * 40, transfers=1)
    for registration in engine.adapters:
        engine.store.delays[registration.version.digest] = 1
    for number in range(40):
        engine.add(str(number), LightJob(adapter=number))
        engine.turn()
        engine.turn()
    assert sum(end in ("stop", "length") for end in engine.ends.values()) >= 4


def test_nobody_turns_the_order_around_by_asking_for_the_impossible() -> None:
    """A request in each turn that wants its first token before it could be had."""
    section = SchedulerSection(policy=["slo"], ttft_slo=50.0)
    engine = LightEngine(section, limits=replace(LIMITS, max_running=16), pages=200)
    deadlines = engine.scheduler.policies._deadlines
    for number in range(40):
        engine.add(f"no-{number}", LightJob(slo=0.001))
        if number % 10 == 0:
            engine.add(f"yes-{number}", LightJob())
        engine.turn()
        assert number % 10 == 0 or not deadlines.overloaded(engine.now)
