"""What came of each request of a run, and the numbers that tell one policy from another.

Two kinds of numbers. S-LoRA's own: throughput (also "strip": without the first and the last ten
seconds), latency, first-token latency, attainment, satisfaction, aborts. And ours: tokens/s,
percentiles, and fairness. Service is what a tenant got, counted as by the virtual token counter
(arXiv 2401.00588): 1 for a prompt token, 2 for a generated one, each when it was there. Fairness is
Jain's index, (sum x)^2 / (n * sum x^2), of each tenant's service over its weight, in the longest
interval in which all tenants are backlogged: only then can one take from another.

Invariants: shares are of all requests, latencies of those that succeeded, first tokens of those
that got one; seconds throughout; what there was none of is None, never zero. Host only: no jax.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np

from jslora.bench.workload import Job
from jslora.errors import TooLate
from jslora.schedule.shares import GENERATED, PROMPT

SCHEMA = 1
TOO_LATE = TooLate.type
STRIP = 10.0
"""Seconds at either end that S-LoRA's "strip" throughput leaves out."""

DEFINITIONS = {
    "throughput": "requests completed / (last response - start of the run)",
    "strip_throughput": "the same without ten seconds, and what comes in them, at either end",
    "latency": "mean, from arrival to the last token, of requests completed",
    "first_token": "mean, from arrival to the first token, of requests that got one",
    "attainment": "share of all requests whose first token came within their SLO, and no error",
    "satisfaction": "mean over all requests of 1 - (t/SLO)^2, 0 where the first token was late",
    "aborted": f"ended by {TOO_LATE!r}",
    "service": "1 per prompt token, 2 per generated token",
    "fairness": "Jain's index of service / weight while all tenants are backlogged",
    "most_waiting": "the most requests without a first token at one moment",
    "longest_wait": "the longest from arrival to first token or error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one job, on the clock of `job.arrival`, in seconds.

    Attributes:
        times: when each generated token was there.
        error: the type of the error that ended it; `TOO_LATE` is an abort.
        ended: when the error came; None if that is not known, or there was none.
    """

    job: Job
    times: tuple[float, ...] = ()
    error: str | None = None
    ended: float | None = None

    @property
    def completed(self) -> bool:
        return self.error is None and bool(self.times)

    @property
    def first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.job.arrival if self.times else None

    @property
    def waited(self) -> float | None:
        """Seconds from arrival to the first token, or to an error before it."""
        end = self.times[0] if self.times else self.ended
        return None if end is None else end - self.job.arrival

    @property
    def last(self) -> float:
        """When it was last heard of."""
        return max(self.ended or 0.0, self.times[-1] if self.times else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and percentiles (linear interpolation) in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSummary:
    """One tenant's share of a run; `contended` is its service while all tenants were backlogged."""

    requests: int
    completed: int
    attainment: float
    satisfaction: float
    ttft: Spread | None
    service: float
    contended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of a run; `DEFINITIONS` says what they are.

    Attributes:
        failed: ended by other errors than `TOO_LATE`.
        duration: seconds from the start of the run to the last response.
        interval: (begin, end) of that in which all tenants were backlogged.
        counters: what the run counted itself: loads, evictions, preemptions.
    """

    requests: int
    completed: int
    aborted: int
    failed: int
    duration: float
    throughput: float
    strip_throughput: float | None
    latency: float | None
    first_token: float | None
    attainment: float
    satisfaction: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Spread | None
    itl: Spread | None
    most_waiting: int
    longest_wait: float | None
    fairness: float | None
    interval: tuple[float, float] | None
    tenants: dict[str, TenantSummary]
    counters: dict[str, float] = field(default_factory=dict)


def summarize(
    outcomes: Sequence[Outcome], slo: float, weights: Mapping[str, float] | None = None,
    rate: float | None = None, **counters: float,
) -> Summary:  # fmt: skip
    """The numbers of a run that began at time 0.

    Args:
        slo: seconds from arrival to first token, for jobs without their own.
        weights: of tenants, "*" for all others; 1 where none is given.
        rate: requests/s that the workload was made with; needed for the strip throughput.
        counters: what the run counted itself, by name.
    """
    assert outcomes, "a run without requests has no numbers"
    done = [o for o in outcomes if o.completed]
    errors = Counter(o.error for o in outcomes if o.error is not None)
    duration = max(o.last for o in outcomes)
    generated = sum(len(o.times) for o in outcomes)
    prompts = sum(o.job.input_tokens for o in outcomes if o.times)
    rewards = [reward(o, slo) for o in outcomes]
    waits = [o.waited for o in outcomes if o.waited is not None]
    interval = contention(outcomes)
    tenants = _tenants(outcomes, slo, interval)
    ttft = spread(_first_tokens(outcomes))
    return Summary(
        requests=len(outcomes),
        completed=len(done),
        aborted=errors[TOO_LATE],
        failed=errors.total() - errors[TOO_LATE],
        duration=duration,
        throughput=_over(len(done), duration),
        strip_throughput=_strip(len(done), duration, rate),
        latency=_mean([o.times[-1] - o.job.arrival for o in done]),
        first_token=ttft.mean if ttft else None,
        attainment=sum(in_time(o, slo) for o in outcomes) / len(outcomes),
        satisfaction=sum(rewards) / len(outcomes),
        output_tokens_per_s=_over(generated, duration),
        total_tokens_per_s=_over(prompts + generated, duration),
        ttft=ttft,
        itl=spread(np.concatenate([np.diff(o.times) for o in outcomes])),
        most_waiting=_most_waiting(outcomes),
        longest_wait=max(waits, default=None),
        fairness=_fairness(tenants, weights or {}) if interval else None,
        interval=interval,
        tenants=tenants,
        counters=dict(counters),
    )


def in_time(outcome: Outcome, slo: float) -> bool:
    """Whether a request got its first token before its SLO, and no error after it."""
    first = outcome.first_token
    return outcome.completed and first is not None and first < _slo(outcome, slo)


def reward(outcome: Outcome, slo: float) -> float:
    """S-LoRA's user satisfaction."""
    first = outcome.first_token
    if first is None or not in_time(outcome, slo):
        return 0.0
    return 1 - (first / _slo(outcome, slo)) ** 2


def spread(seconds: Iterable[float] | np.ndarray) -> Spread | None:
    """Mean and percentiles, or None if there are no values."""
    values = np.asarray(seconds if isinstance(seconds, np.ndarray) else list(seconds), np.float64)
    if not values.size:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Spread(mean=values.mean().item(), p50=p50, p90=p90, p99=p99)


def jain(values: Sequence[float]) -> float | None:
    """Jain's index: 1 if all are equal, 1/n if one has everything; None if all are 0."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def service(outcomes: Iterable[Outcome], moments: Sequence[float]) -> dict[str, np.ndarray]:
    """Each tenant's service from the start up to and with each of the moments, by tenant's name."""
    by_tenant: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_tenant.setdefault(outcome.job.tenant, []).append(outcome)
    return {tenant: _served(own, moments) for tenant, own in sorted(by_tenant.items())}


def contention(outcomes: Iterable[Outcome]) -> tuple[float, float] | None:
    """The longest interval in which each of several tenants has a request without first token.

    A request whose error came at an unknown time is not known to have waited.
    """
    waits: dict[str, list[tuple[float, int]]] = {o.job.tenant: [] for o in outcomes}
    for o in outcomes:
        if o.waited:
            changes = [(o.job.arrival, 1), (o.job.arrival + o.waited, -1)]
            waits[o.job.tenant] += changes
    if len(waits) < 2:
        return None
    # Within one moment arrivals come first, or a tenant would seem to have nothing in between.
    moments = sorted(
        (moment, -change, tenant) for tenant, own in waits.items() for moment, change in own
    )
    waiting = dict.fromkeys(waits, 0)
    begin, longest = None, None
    for moment, less, tenant in moments:
        waiting[tenant] -= less
        if all(waiting.values()):
            begin = moment if begin is None else begin
        elif begin is not None:
            if moment > begin and (longest is None or moment - begin > longest[1] - longest[0]):
                longest = begin, moment
            begin = None
    return longest


def as_json(rows: Mapping[str, Summary], conditions: Mapping[str, Any]) -> bytes:
    """The numbers of several runs by name, and under what `conditions` they ran."""
    document = {
        "schema": SCHEMA,
        "conditions": conditions,
        "definitions": DEFINITIONS,
        "runs": {name: asdict(summary) for name, summary in rows.items()},
    }
    return msgspec.json.encode(document) + b"\n"


def _slo(outcome: Outcome, slo: float) -> float:
    return slo if outcome.job.ttft_slo is None else outcome.job.ttft_slo


def _first_tokens(outcomes: Iterable[Outcome]) -> list[float]:
    return [o.first_token for o in outcomes if o.first_token is not None]


def _over(amount: float, duration: float) -> float:
    return amount / duration if duration else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _strip(completed: int, duration: float, rate: float | None) -> float | None:
    if rate is None or duration <= 2 * STRIP:
        return None
    return max(0, completed - 2 * int(STRIP * rate)) / (duration - 2 * STRIP)


def _most_waiting(outcomes: Iterable[Outcome]) -> int:
    """Ends come first within one moment: who starts as another comes does not wait with it."""
    changes = [
        change
        for o in outcomes
        if o.waited
        for change in ((o.job.arrival, 1), (o.job.arrival + o.waited, -1))
    ]
    return int(max(np.cumsum([change for _, change in sorted(changes)]), default=0))


def _tenants(
    outcomes: Sequence[Outcome], slo: float, interval: tuple[float, float] | None
) -> dict[str, TenantSummary]:
    total = service(outcomes, [np.inf])
    between = service(outcomes, interval) if interval else None
    found = {}
    for tenant in total:
        own = [o for o in outcomes if o.job.tenant == tenant]
        found[tenant] = TenantSummary(
            requests=len(own),
            completed=sum(o.completed for o in own),
            attainment=sum(in_time(o, slo) for o in own) / len(own),
            satisfaction=sum(reward(o, slo) for o in own) / len(own),
            ttft=spread(_first_tokens(own)),
            service=total[tenant].item(),
            contended=float(np.diff(between[tenant]).item()) if between else None,
        )
    return found


def _fairness(tenants: Mapping[str, TenantSummary], weights: Mapping[str, float]) -> float | None:
    assert all(own.contended is not None for own in tenants.values()), "no interval to compare in"
    others = weights.get("*", 1.0)
    return jain(
        [(own.contended or 0.0) / weights.get(name, others) for name, own in tenants.items()]
    )


def _served(outcomes: Iterable[Outcome], moments: Sequence[float]) -> np.ndarray:
    """The service of all these, up to and with each moment."""
    some = [o for o in outcomes if o.times]
    if not some:
        return np.zeros(len(moments))
    generated = np.sort(np.concatenate([o.times for o in some]))
    firsts = sorted((o.times[0], o.job.input_tokens) for o in some)
    prompts = np.cumsum([0, *(tokens for _, tokens in firsts)])
    begun = np.searchsorted([first for first, _ in firsts], moments, "right")
    return PROMPT * prompts[begun] + GENERATED * np.searchsorted(generated, moments, "right")
