"""What no schedule can exceed, even one that knows all in advance: requests in time, and reward.

The machine. A step computes some tokens of some rows; a row's pages hold all its tokens computed so
far, those of this step included, and all pages held at one moment are at most `pages`. A step
takes at least `fixed`, plus `token` for every token, `row` for every row, and `context` for every
earlier token of a row, which it reads. A prompt of p tokens may be computed in several steps, the
last of which gives the first token of the answer; each further token takes a step. So an answer of
o tokens takes p + o - 1 tokens. What a real machine does beside this (load adapters, keep pages
for them, leave some free) only slows it down.

The schedules. Any that starts no request before it arrives, computes every prompt in full (no
prefix cache), and after its first token gives a request a token in every step until its end. It
may know everything, refuse whom it likes, and let prompts wait halfway. One that stops requests
after their first tokens could give first tokens to everybody and answers to nobody.

The bound. Divide the `fixed` of a step among the pages held in it, 1/`pages` to each. Then a step
takes at least the sum of its rows' costs, and a request has cost at least `spent(k)` when its first
token and k more are there. Take a window of time, and of the requests that arrive in it, and must
have their first token in it, those that do (the served). When the last step within the window
ends, each has its first token and k more, so the sum of spent(k) is at most the window's length.
In each step j from there on, those with j or more tokens to come all run, so their pages in it are
at most `pages`. Times any price, over the next `ahead` steps, and added to the former:

    sum over the served of min over k of (spent(k) + price * pages of the next `ahead` steps)
        <= length of the window + price * ahead * pages

This, over all windows, says that a single machine could serve them all if each took that minimum in
seconds, anywhere between its arrival and its deadline, deadlines put off by price * ahead * pages:
the windows' condition is necessary and sufficient for that (Horn 1974). What jobs can get of such a
machine are the flows from sources to time slots, which form a polymatroid, so that taking the
cheapest first, each as far as it fits, the last in part, serves the most (Edmonds 1970). Every
price and `ahead` give a bound; the least found is told. Fewer windows make it weaker, not wrong.

The reward of a first token after a share u of its allowance is 1 - u^2, the integral of 2v over v
from u to 1. So the rewards add up to the integral of 2v times the number served within shares v,
each of which is bounded as above; between two of `LAYERS` the number at the upper one counts.
Host only: no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from jslora.bench.steptime import Linear
from jslora.bench.workload import Job

WINDOWS = 96
"""Moments at which windows begin, and as many at which they end."""

PRICES = (1.0, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.0, 2.5, 3.0)
"""Prices of a page in a step, over what it costs after first tokens: the median of all requests."""

AHEAD = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of answers that are shorter than the steps that a price is paid for."""

LAYERS = 16
MIXTURES = 9
# Of a sum of many costs: it must not fall below what just fits.
ROUNDING = 1e-6

Seconds = Float[np.ndarray, " jobs"]
Counts = Int[np.ndarray, " jobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Seconds of a step, at least, and the pool.

    Attributes:
        fixed, token, row, context: seconds per step, per token computed, per row of a step, and per
            earlier token of a row in a step.
        pages: of the pool, without the null page.
        page_size: tokens that a page holds.
    """

    fixed: float
    token: float
    row: float
    context: float
    pages: int
    page_size: int

    def __post_init__(self) -> None:
        assert min(self.fixed, self.token, self.row, self.context) >= 0, f"negative times: {self}"
        assert min(self.pages, self.page_size) > 0, f"no pool: {self}"

    def pages_up_to(self, tokens: np.ndarray) -> np.ndarray:
        """The pages that 1, 2, ... so many tokens need, added up."""
        full, more = np.divmod(tokens, self.page_size)
        return self.page_size * full * (full + 1) // 2 + more * (full + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """At most so many of `requests` get their first token in time, and add up to such a reward."""

    requests: int
    attained: int
    reward: float

    @property
    def attainment(self) -> float:
        return self.attained / self.requests

    @property
    def satisfaction(self) -> float:
        return self.reward / self.requests


@dataclass(frozen=True, slots=True)
class _Demand:
    """Requests: when they come, their allowance to the first token, and their tokens."""

    arrival: Seconds
    slo: Seconds
    prompt: Counts
    output: Counts


@dataclass(frozen=True, slots=True)
class _Stages:
    """All requests, one after the other, each with its first token and k = 0, 1, ... more."""

    starts: Counts
    k: Int[np.ndarray, " stages"]
    last: Int[np.ndarray, " stages"]
    prompt: Int[np.ndarray, " stages"]
    spent: Float[np.ndarray, " stages"]


def mixtures(sums: Sequence[Linear], pages: int, page_size: int) -> tuple[Machine, ...]:
    """Machines between two sums that no step is faster than, or the one of a single sum.

    A step takes the longer of the two at least, so any mixture too. One bound by memory, say, and
    one by arithmetic are far below a load that needs much of both; a mixture is not.

    Args:
        sums: one or two, such as `Roofline.below` gives.
        pages: of the pool, without the null page.
    """
    assert 1 <= len(sums) <= 2, f"{len(sums)} sums"
    first, last = (
        np.array([each.constant, each.token, each.row, each.position])
        for each in (sums[0], sums[-1])
    )
    shares = np.linspace(0, 1, MIXTURES if len(sums) > 1 else 1)
    found = ((first + (last - first) * share).tolist() for share in shares)
    return tuple(
        Machine(fixed=fixed, token=token, row=row, context=context, pages=pages,
                page_size=page_size)
        for fixed, token, row, context in found
    )  # fmt: skip


def clairvoyant(jobs: Sequence[Job], machines: Sequence[Machine], slo: float) -> Bound:
    """The bound on a trace.

    Args:
        jobs: their prompts are token ids, and their answers exactly `output_tokens` long.
        machines: none of them slower than the real one; the least of their bounds holds.
        slo: seconds from arrival to first token, for jobs without their own.
    """
    assert jobs and all(job.input_tokens > 0 and job.output_tokens > 0 for job in jobs), (
        "no jobs, or such without token ids"
    )
    demand = _Demand(
        arrival=np.array([job.arrival for job in jobs], dtype=np.float64),
        slo=np.array([slo if j.ttft_slo is None else j.ttft_slo for j in jobs], dtype=np.float64),
        prompt=np.array([job.input_tokens for job in jobs], dtype=np.int64),
        output=np.array([job.output_tokens for job in jobs], dtype=np.int64),
    )
    # The last layer's number is that of all that are in time.
    layers = np.min([_layers(demand, machine) for machine in machines], axis=0)
    return Bound(requests=len(jobs), attained=int(layers[-1]), reward=float(layers.sum() / LAYERS))


def _layers(demand: _Demand, machine: Machine) -> np.ndarray:
    """Bounds on the numbers served within the layers' shares of their allowances, all at last."""
    attained, cost, slack = _least(demand, machine)
    shares = np.sqrt(np.arange(1, LAYERS) / LAYERS)
    within = [
        _most(replace(demand, slo=share * demand.slo), machine, cost, slack) for share in shares
    ]
    # More time never serves fewer, though windows that lie otherwise may bound them worse.
    return np.minimum.accumulate([attained, *reversed(within)])[::-1]


def _least(demand: _Demand, machine: Machine) -> tuple[int, Seconds, float]:
    """The least bound found on the number served, and the costs and the slack that gave it."""
    stages = _stages(demand, machine)
    ends = np.append(stages.starts[1:], len(stages.k)) - 1
    page_steps = machine.pages_up_to(demand.prompt + demand.output - 1) - machine.pages_up_to(
        demand.prompt
    )
    rest = (stages.spent[ends] - stages.spent[stages.starts]) / np.maximum(page_steps, 1)
    usual = float(np.median(rest[page_steps > 0])) if page_steps.any() else 0.0

    def bound(price: float, ahead: int) -> tuple[int, Seconds, float]:
        cost, slack = _costs(stages, machine, price, ahead), price * ahead * machine.pages
        return _most(demand, machine, cost, slack), cost, slack

    steps = np.quantile(demand.output, AHEAD, method="nearest").tolist()
    ahead = min(steps, key=lambda n: bound(usual * PRICES[3], n)[0])
    return min((bound(usual * p, ahead) for p in PRICES), key=lambda found: found[0])


def _stages(demand: _Demand, machine: Machine) -> _Stages:
    starts = np.cumsum(demand.output) - demand.output
    last = np.repeat(demand.output - 1, demand.output)
    prompt = np.repeat(demand.prompt, demand.output)
    k = np.arange(len(last)) - np.repeat(starts, demand.output)
    page_steps = machine.pages_up_to(prompt + k) - machine.pages_up_to(prompt - 1)
    spent = machine.fixed / machine.pages * page_steps
    spent += machine.token * (prompt + k) + machine.row * (1 + k)
    spent += machine.context * (k * prompt + k * (k - 1) // 2)
    return _Stages(starts, k, last, prompt, spent)


def _costs(stages: _Stages, machine: Machine, price: float, ahead: int) -> Seconds:
    """Of each request, the least seconds, whatever of it has come when the window ends."""
    now, then = stages.prompt + stages.k, stages.prompt + np.minimum(stages.k + ahead, stages.last)
    owed = price * (machine.pages_up_to(then) - machine.pages_up_to(now))
    return np.minimum.reduceat(stages.spent + owed, stages.starts)


def _most(demand: _Demand, machine: Machine, cost: Seconds, slack: float) -> int:
    """The most that get their first token in time if each costs so much and windows are as long as
    they are and `slack`."""
    alone = machine.fixed + machine.token * demand.prompt + machine.row
    able = alone <= demand.slo * (1 + ROUNDING)
    if not able.any():
        return 0
    cost, arrival, deadline = cost[able], demand.arrival[able], (demand.arrival + demand.slo)[able]
    begins, ends = _moments(arrival), _moments(deadline)
    # room[b, e]: seconds not taken yet of the window from begin b to end e.
    room = ends[None] - begins[:, None] + slack
    begin = np.searchsorted(begins, arrival, "right") - 1
    end = np.searchsorted(ends, deadline, "left")
    served = 0.0
    for job in np.argsort(cost, kind="stable"):
        around = room[: begin[job] + 1, end[job] :]
        share = min(1.0, around.min() / cost[job]) if cost[job] > 0 else 1.0
        if share > 0:
            around -= share * cost[job]
            served += share
    return min(int(served + ROUNDING * len(cost)), len(cost))


def _moments(times: Seconds) -> Float[np.ndarray, " moments"]:
    """The first and the last of some times, and others evenly between by rank."""
    return np.unique(np.quantile(times, np.linspace(0, 1, WINDOWS), method="nearest"))
