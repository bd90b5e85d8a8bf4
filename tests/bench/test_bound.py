"""The bound against schedules: all of them on tiny machines, random and greedy ones on others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from jslora.bench import bound
from jslora.bench.bound import Machine, clairvoyant
from jslora.bench.floor import Device
from jslora.bench.steptime import Linear, Parts, Roofline, Shares, Work
from jslora.bench.workload import Job
from jslora.model.config import ModelConfig


def make_job(index: int, arrival: float, prompt: int, output: int, slo: float | None = None) -> Job:
    return Job(
        index=index, arrival=arrival, model="m", prompt=(0,) * prompt, output_tokens=output,
        ttft_slo=slo,
    )  # fmt: skip


def step_seconds(machine: Machine, rows: Sequence[tuple[int, int]]) -> float:
    """What a step takes: of each row, the tokens before this step and those of it."""
    each = [machine.token * n + machine.row + machine.context * past for past, n in rows]
    return machine.fixed + sum(each)


def in_time(job: Job, first: float, slo: float) -> float:
    return first - job.arrival <= (slo if job.ttft_slo is None else job.ttft_slo)


def reward(job: Job, first: float, slo: float) -> float:
    allowed = slo if job.ttft_slo is None else job.ttft_slo
    return max(0.0, 1 - ((first - job.arrival) / allowed) ** 2)


def length(job: Job) -> int:
    """Tokens of a job that are computed, in the end."""
    return job.input_tokens + job.output_tokens - 1


def pages(machine: Machine, tokens: int) -> int:
    return -(-tokens // machine.page_size)


# All schedules ------------------------------------------------------------------------------------


def best(jobs: Sequence[Job], machine: Machine, slo: float, worth: Callable[..., float]) -> float:
    """The most that any schedule of the class gets, by trying every one."""

    @cache
    def onward(now: float, computed: tuple[int, ...]) -> float:
        running = any(j.input_tokens <= n < length(j) for j, n in zip(jobs, computed, strict=True))
        later = [job.arrival for job in jobs if job.arrival > now]
        idle = [onward(min(later), computed)] if later else [0.0]
        found = [] if running else idle
        for step in choices(jobs, now, computed):
            after = tuple(map(sum, zip(computed, step, strict=True)))
            busy = [n if m or n < length(j) else 0
                    for j, n, m in zip(jobs, after, step, strict=True)]  # fmt: skip
            if not any(step) or sum(pages(machine, n) for n in busy) > machine.pages:
                continue
            rows = [(past, n) for past, n in zip(computed, step, strict=True) if n]
            then = now + step_seconds(machine, rows)
            begun = [
                job
                for job, past, n in zip(jobs, computed, after, strict=True)
                if past < job.input_tokens <= n
            ]
            got = sum(worth(job, then, slo) for job in begun)
            found.append(got + onward(then, after))
        # Rows that outgrow the pool would have to stop: there is no such schedule.
        return max(found, default=-np.inf)

    return onward(0.0, (0,) * len(jobs))


def choices(jobs: Sequence[Job], now: float, computed: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The tokens that each job may get in a step."""
    allowed: list[Sequence[int]] = []
    for job, past in zip(jobs, computed, strict=True):
        if job.arrival > now or past == length(job):
            allowed.append((0,))
        elif past < job.input_tokens:
            allowed.append(sorted({0, 1, job.input_tokens - past}))
        else:
            allowed.append((1,))
    return product(*allowed)


tiny_jobs = st.lists(
    st.tuples(
        st.integers(0, 8).map(lambda n: n / 8), st.integers(1, 3), st.integers(1, 5),
        st.sampled_from([None, None, 1.25, 1.5]),
    ),
    min_size=3, max_size=4,
).map(lambda rows: [make_job(i, *row) for i, row in enumerate(rows)])  # fmt: skip
tiny_machines = st.builds(
    Machine,
    fixed=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    token=st.sampled_from([0.0, 0.125, 0.25]),
    row=st.sampled_from([0.0, 0.125]),
    context=st.sampled_from([0.0, 0.0625]),
    pages=st.integers(2, 5),
    page_size=st.integers(1, 2),
)


@settings(max_examples=60, deadline=None)
@given(tiny_jobs, tiny_machines, st.sampled_from([0.5, 1.0]))
def test_no_schedule_of_a_tiny_machine_exceeds_it(
    jobs: list[Job], machine: Machine, slo: float
) -> None:
    found = clairvoyant(jobs, [machine], slo)
    assert best(jobs, machine, slo, in_time) <= found.attained <= found.requests == len(jobs)
    assert best(jobs, machine, slo, reward) <= found.reward + 1e-9
    assert found.reward <= found.attained


# Larger machines ----------------------------------------------------------------------------------

Order = Callable[[Job], float]


def play(
    jobs: Sequence[Job], machine: Machine, slo: float, order: Order, lazy: float, random: Random
) -> dict[int, float]:
    """First tokens of a schedule of the class: of those still in time, the first in order starts,
    as far as all pages fit in every step to come; each is passed over with the chance `lazy`."""
    now, firsts = 0.0, {}
    running: list[tuple[Job, int]] = []
    waiting = sorted(jobs, key=lambda job: job.arrival)
    while running or waiting:
        allowed = {j.index: slo if j.ttft_slo is None else j.ttft_slo for j in waiting}
        waiting = [job for job in waiting if now <= job.arrival + allowed[job.index]]
        come = sorted((job for job in waiting if job.arrival <= now), key=order)
        begun: list[Job] = []
        for job in come:
            if random.random() >= lazy and fits(
                [*running, *((j, 0) for j in [*begun, job])], machine
            ):
                begun.append(job)
        waiting = [job for job in waiting if job not in begun]
        rows = [(n, 1) for _, n in running] + [(0, job.input_tokens) for job in begun]
        if not rows:
            now = min((job.arrival for job in waiting if job.arrival > now), default=now + slo / 7)
            continue
        now += step_seconds(machine, rows)
        firsts |= {job.index: now for job in begun}
        running = [(job, n + 1) for job, n in running] + [(j, j.input_tokens) for j in begun]
        running = [(job, n) for job, n in running if n < length(job)]
    return firsts


def fits(rows: Sequence[tuple[Job, int]], machine: Machine) -> bool:
    """Whether rows with so many tokens computed can all run to their ends, from this step on."""
    after = np.array([n + 1 if n else job.input_tokens for job, n in rows])
    last = np.array([length(job) for job, _ in rows])
    # Pages are the most when some row takes its last token.
    return all(
        sum(-(-(after + step)[after + step <= last] // machine.page_size)) <= machine.pages
        for step in set((last - after).tolist())
    )


def work(job: Job) -> float:
    return length(job) ** 2 - job.input_tokens**2


ORDERS: dict[str, Order] = {
    "first": lambda job: job.arrival,
    "newest": lambda job: -job.arrival,
    "shortest": work,
    "short prompts": lambda job: job.input_tokens,
    "longest last": lambda job: job.output_tokens if job.arrival < 4 else -job.output_tokens,
}

machines = st.builds(
    Machine,
    fixed=st.sampled_from([0.0, 0.05, 0.1]),
    token=st.sampled_from([0.0, 0.002, 0.01]),
    row=st.sampled_from([0.0, 0.005]),
    context=st.sampled_from([0.0, 0.001]),
    pages=st.integers(8, 24),
    page_size=st.integers(1, 3),
)
crowds = st.lists(
    st.tuples(
        st.floats(0, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([None, None, 0.2, 2])
    ),
    min_size=10, max_size=80,
).map(lambda rows: [make_job(i, *row) for i, row in enumerate(rows)])  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(crowds, machines, st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.3]), st.randoms())
def test_no_schedule_of_a_larger_machine_exceeds_it(
    jobs: list[Job], machine: Machine, slo: float, lazy: float, random: Random
) -> None:
    found = clairvoyant(jobs, [machine], slo)
    for order in ORDERS.values():
        firsts = play(jobs, machine, slo, order, lazy, random)
        assert sum(in_time(jobs[i], t, slo) for i, t in firsts.items()) <= found.attained
        assert sum(reward(jobs[i], t, slo) for i, t in firsts.items()) <= found.reward + 1e-9


def crowd(rate: float, seconds: float, seed: int) -> list[Job]:
    """Poisson arrivals, prompts and answers of evenly drawn lengths below 64."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    lengths = rng.integers(1, 64, (len(arrivals), 2))
    return [
        make_job(i, arrival, *pair)
        for i, (arrival, pair) in enumerate(zip(arrivals.tolist(), lengths.tolist(), strict=True))
    ]


BUSY = Machine(fixed=0.02, token=2e-4, row=1e-4, context=1e-6, pages=120, page_size=16)


def test_at_overload_the_shortest_first_come_near_it() -> None:
    jobs = crowd(rate=100, seconds=15, seed=1)
    found = clairvoyant(jobs, [BUSY], 2.0)
    firsts = play(jobs, BUSY, 2.0, work, 0.0, Random(0))
    got = sum(in_time(jobs[i], t, 2.0) for i, t in firsts.items())
    assert found.attainment < 0.9, "the load is not worth a bound"
    assert 0.85 * found.attained <= got <= found.attained


def test_with_time_enough_everything_is_possible() -> None:
    jobs = crowd(rate=1, seconds=60, seed=1)
    found = clairvoyant(jobs, [BUSY], 2.0)
    assert found.attained == len(jobs)
    assert found.reward == pytest.approx(len(jobs))


def test_what_cannot_be_in_time_even_alone_is_not_counted() -> None:
    jobs = [make_job(0, 0.0, 10, 5), make_job(1, 0.0, 1000, 5), make_job(2, 0.0, 10, 5, slo=0.02)]
    assert clairvoyant(jobs, [BUSY], 0.1).attained == 1


def test_the_least_of_several_machines_holds() -> None:
    jobs = crowd(rate=100, seconds=6, seed=1)
    fast = replace(BUSY, fixed=0.0, row=2e-4)
    both, each = (
        clairvoyant(jobs, [BUSY, fast], 2.0),
        [clairvoyant(jobs, [machine], 2.0) for machine in (BUSY, fast)],
    )
    assert both.attained == min(found.attained for found in each)
    assert both.reward <= min(found.reward for found in each)


# Its parts ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(0.5, 3), st.floats(0.1, 2)), min_size=1, max_size=12
    ),
    st.floats(0, 1),
)
def test_the_cheapest_first_serve_as_many_as_the_best_division(
    rows: list[tuple[float, float, float]], slack: float
) -> None:
    arrival, slo, cost = map(np.array, zip(*rows, strict=True))
    ones = np.ones(len(rows), dtype=np.int64)
    demand = bound._Demand(arrival, slo, ones, ones)
    free = Machine(fixed=0, token=0, row=0, context=0, pages=1, page_size=1)
    deadline = arrival + slo
    windows = [(b, e) for b in arrival for e in deadline if b < e]
    inside = [(arrival >= b) & (deadline <= e) for b, e in windows]
    best = linprog(
        -np.ones(len(rows)), A_ub=np.array(inside) * cost,
        b_ub=[e - b + slack for b, e in windows], bounds=(0, 1),
    )  # fmt: skip
    assert bound._most(demand, free, cost, slack) == int(-best.fun + 1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_costs_are_the_least_over_all_stages(prompt: int, output: int, ahead: int) -> None:
    machine = Machine(fixed=0.5, token=0.02, row=0.01, context=0.003, pages=7, page_size=3)
    one = np.ones(1)
    demand = bound._Demand(one, one, np.array([prompt]), np.array([output]))
    steps = [(0, prompt), *((prompt + k, 1) for k in range(output - 1))]
    held = [pages(machine, past + n) for past, n in steps]
    costs = [
        machine.fixed * h / machine.pages + step_seconds(machine, [row]) - machine.fixed
        for row, h in zip(steps, held, strict=True)
    ]
    stages = [sum(costs[:k]) + 0.04 * sum(held[k : k + ahead]) for k in range(1, output + 1)]
    got = bound._costs(bound._stages(demand, machine), machine, 0.04, ahead)
    assert got == pytest.approx([min(stages)])


LLAMA = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32000, hidden=4096, layers=32, heads=32,
    kv_heads=8, head_dim=128, feed_forward=11008, max_positions=4096,
)  # fmt: skip
DEVICE = Device("of 24 GB", bandwidth=600e9, flops=70e12)
SHARES = Shares(overhead=3e-3, memory=0.8, compute=0.6, lora_overhead=2e-3, lora_compute=0.1)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 4000)), min_size=1, max_size=40))
def test_mixtures_are_never_slower_than_what_they_are_below(rows: list[tuple[int, int]]) -> None:
    step_time = Roofline(Parts(LLAMA), DEVICE, SHARES)
    work = Work(adapters=1)
    for tokens, position in rows:
        work.add(tokens, position)
    machines = bound.mixtures(step_time.below(), 900, 16)
    seconds = [step_seconds(machine, [(past, n) for n, past in rows]) for machine in machines]
    assert len(set(seconds)) > 2
    assert max(seconds) <= step_time.seconds(work) * (1 + 1e-9)


def test_a_mixture_bounds_what_neither_of_two_does() -> None:
    """Long prompts with short answers and the reverse: each sum leaves room for one kind."""
    lengths = [(120, 1), (1, 60)]
    jobs = [make_job(i, i / 100, *lengths[i % 2]) for i in range(1200)]
    sums = [Linear(0.025, 0.0, 0.0, 1e-6), Linear(0.0, 4e-4, 0.0, 1e-6)]
    machines = bound.mixtures(sums, BUSY.pages, BUSY.page_size)
    alone = [clairvoyant(jobs, [each], 0.5).attained for each in (machines[0], machines[-1])]
    assert clairvoyant(jobs, machines, 0.5).attained < 0.95 * min(alone)
    assert len(bound.mixtures(sums[:1], BUSY.pages, BUSY.page_size)) == 1
