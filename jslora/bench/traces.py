"""Finite workloads: S-LoRA's own, and mixes of tenants whose rates, adapters and lengths differ.

Invariants: a trace is in order of arrival, and its jobs are numbered in that order. It is a pure
function of its arguments, and every source of a mix has its own random streams for arrivals,
models, lengths and prompts: a source leaves those before it as they were, and no two send the same
prompts. Host only: no jax.

S-LoRA's prompts repeat one word, so each is the beginning of every longer one and a prefix cache
would serve them for nothing. Ours are random token ids, from a stream that its draws do not touch.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Literal, get_args

import msgspec
import numpy as np

from jslora.bench.workload import Job, Trace, draw_prompt, popularity, stream
from jslora.errors import ConfigError
from jslora.request import MAX_PRIORITY, MAX_SLO_SECONDS

Choice = Literal["zipf", "power", "round-robin"]
Profile = tuple[tuple[float, float], ...]
Range = tuple[int, int]

MAX_JOBS = 2**20
MAX_TOKENS = 2**20
# Ranks of the adapters of S-LoRA's settings; adapter i has the (i mod k)-th (paper, Table 1).
RANKS: dict[str, tuple[int, ...]] = {
    "S1": (8,),
    "S2": (64, 32, 16, 8),
    "S3": (16,),
    "S4": (64, 32, 16),
    "S5": (32,),
    "S6": (64,),
}


def slora(
    *,
    models: Sequence[str],
    rate: float,
    duration: float,
    alpha: float = 1.0,
    cv: float = 1.0,
    input_range: Range = (8, 512),
    output_range: Range = (8, 512),
    seed: int = 42,
    vocab: int = 32000,
) -> Trace:
    """Return the synthetic trace of S-LoRA's `benchmarks/trace.py`, draw for draw.

    floor(rate * duration) requests: one gamma renewal process of coefficient of variation `cv`,
    however long that takes; adapter floor(n * u) for u of density alpha * u^(alpha - 1), so that 1
    is uniform and less prefers the first; lengths uniform, the upper end left out.

    Args:
        models: one name for each adapter; the base model's alone where S-LoRA has n = 0.

    Raises:
        ConfigError: a value is out of its range.
    """
    for name, value in (("alpha", alpha), ("rate", rate), ("cv", cv), ("duration", duration)):
        _check(name, 0 < value < float("inf"), value, "a positive, finite number")
    _check_lengths(models, input_range, output_range, vocab)
    _check("seed", 0 <= seed < 2**32, seed, "at least 0 and below 2^32")
    count = int(rate * duration)
    _check("rate * duration", 1 <= count <= MAX_JOBS, count, f"1 to {MAX_JOBS} requests")
    legacy = np.random.RandomState(seed)
    adapters = (len(models) * legacy.power(alpha, count)).astype(int)
    inputs = legacy.randint(*input_range, count)
    outputs = legacy.randint(*output_range, count)
    arrivals = np.cumsum(legacy.gamma(1 / cv**2, cv**2 / rate, count))
    prompts = stream(seed)
    return tuple(
        Job(
            index=index,
            arrival=arrivals[index].item(),
            # u may round up to 1.
            model=models[min(adapters[index].item(), len(models) - 1)],
            prompt=draw_prompt(prompts, vocab, inputs[index].item()),
            output_tokens=outputs[index].item(),
        )
        for index in range(count)
    )


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stream of like requests.

    Attributes:
        rate: (second, requests a second) points, straight lines between; none come after the last.
        cv: coefficient of variation of the gaps, measured in expected requests; 1 is Poisson.
        choice: how each request chooses its model. zipf: the k-th has weight k^-alpha. power: the
            first k of n together have weight (k / n)^alpha, as S-LoRA has it. round-robin: in turn.
        input_range, output_range: lengths are uniform in it, the upper end left out.

    Raises:
        ConfigError: a value is out of its range.
    """

    models: tuple[str, ...]
    rate: Profile
    tenant: str = "default"
    cv: float = 1.0
    choice: Choice = "zipf"
    alpha: float = 1.0
    input_range: Range = (8, 512)
    output_range: Range = (8, 512)
    priority: int = 0
    ttft_slo: float | None = None

    def __post_init__(self) -> None:
        _check("choice", self.choice in get_args(Choice), self.choice, get_args(Choice))
        _check("alpha", 0 <= self.alpha < 100, self.alpha, "at least 0, below 100")
        _check("cv", 0.01 <= self.cv <= 100, self.cv, "0.01 to 100")
        _check("tenant", self.tenant != "", repr(self.tenant), "a name")
        level, slo = self.priority, self.ttft_slo
        _check("priority", 0 <= level <= MAX_PRIORITY, level, f"0 to {MAX_PRIORITY}")
        in_time = slo is None or 0 < slo <= MAX_SLO_SECONDS
        _check("ttft_slo", in_time, slo, f"above 0, at most {MAX_SLO_SECONDS}")
        _check_lengths(self.models, self.input_range, self.output_range, 1)
        _check_profile(self.rate)


def steps(*parts: tuple[float, float]) -> Profile:
    """Return the rate that holds each (requests a second) for so long: (seconds, rate) in turn."""
    ends = [0.0, *accumulate(seconds for seconds, _ in parts)]
    return tuple(
        (moment, rate)
        for begin, end, (_, rate) in zip(ends, ends[1:], parts, strict=False)
        for moment in (begin, end)
    )


def ramp(first: float, last: float, seconds: float) -> Profile:
    """Return the rate that changes from `first` to `last` in a straight line."""
    return ((0.0, first), (seconds, last))


def mix(sources: Sequence[Source], *, seed: int = 0, vocab: int = 32000) -> Trace:
    """Return what all `sources` send together.

    Raises:
        ConfigError: a value is out of its range, or more than `MAX_JOBS` are expected.
    """
    _check("seed", seed >= 0, seed, "at least 0")
    _check("vocab", 0 < vocab < 2**31, vocab, "at least 1, below 2^31")
    expected = sum(_expected(source.rate)[-1].item() for source in sources)
    _check("the number of requests expected", expected <= MAX_JOBS, expected, f"to {MAX_JOBS}")
    return merge(*(_draw(source, seed, number, vocab) for number, source in enumerate(sources)))


def split(source: Source) -> tuple[Source, ...]:
    """Return a source for each model, at its share of the rate.

    Mixed, each adapter's requests are a gamma process of its own rate, as the text of S-LoRA's
    paper has it; its program draws one process for all of them.
    """
    shares = _shares(source)
    return tuple(
        msgspec.structs.replace(
            source,
            models=(model,),
            rate=tuple((moment, rate * share) for moment, rate in source.rate),
        )
        for model, share in zip(source.models, shares.tolist(), strict=True)
    )


def merge(*traces: Trace) -> Trace:
    """Return all jobs in order of arrival, numbered anew; of equal ones those given first lead."""
    jobs = sorted(chain(*traces), key=lambda job: job.arrival)
    return tuple(replace(job, index=index) for index, job in enumerate(jobs))


def scale(trace: Trace, speed: float) -> Trace:
    """Return the trace with the same jobs coming `speed` times as fast.

    Raises:
        ConfigError: `speed` is out of its range.
    """
    _check("speed", 1e-6 <= speed <= 1e6, speed, "1e-6 to 1e6")
    return tuple(replace(job, arrival=job.arrival / speed) for job in trace)


def _draw(source: Source, seed: int, number: int, vocab: int) -> Trace:
    """One source's trace, from the four streams of its number."""
    arrivals, models, lengths, prompts = (stream(seed, number, part) for part in range(4))
    moments = _arrivals(source, arrivals)
    adapters = _adapters(source, len(moments), models)
    inputs = lengths.integers(*source.input_range, len(moments))
    outputs = lengths.integers(*source.output_range, len(moments))
    return tuple(
        Job(
            index=index,
            arrival=moments[index].item(),
            model=source.models[adapters[index]],
            prompt=draw_prompt(prompts, vocab, inputs[index].item()),
            output_tokens=outputs[index].item(),
            tenant=source.tenant,
            priority=source.priority,
            ttft_slo=source.ttft_slo,
        )
        for index in range(len(moments))
    )


def _adapters(source: Source, count: int, rng: np.random.Generator) -> np.ndarray:
    if source.choice == "round-robin":
        return np.arange(count) % len(source.models)
    edges = np.cumsum(_shares(source))
    # The sum of the shares may round to just below 1.
    return np.minimum(edges.searchsorted(rng.random(count), "right"), len(edges) - 1)


def _shares(source: Source) -> np.ndarray:
    models = len(source.models)
    if source.choice == "power":
        return np.diff(np.linspace(0, 1, models + 1) ** source.alpha)
    return popularity(models, source.alpha if source.choice == "zipf" else 0.0)


def _arrivals(source: Source, rng: np.random.Generator) -> np.ndarray:
    """Moments of a renewal process of rate 1, on a clock that counts expected requests."""
    times, rates = np.array(source.rate, dtype=np.float64).T
    expected = _expected(source.rate)
    points = _renewal(expected[-1].item(), source.cv, rng)
    part = expected.searchsorted(points, "right") - 1
    done = (points - expected[part]) / np.diff(expected)[part]
    first, last = rates[part], rates[part + 1]
    # The share of a part's time in which a share `done` of its requests comes: the root of
    # first * x + (last - first) * x^2 / 2 = done * (first + last) / 2, fit for equal rates too.
    below = first + np.sqrt(first**2 * (1 - done) + last**2 * done)
    share = np.divide(done * (first + last), below, out=np.zeros_like(done), where=below > 0)
    return times[part] + np.minimum(share, 1) * np.diff(times)[part]


def _expected(profile: Profile) -> np.ndarray:
    """Requests expected before each point of a rate's profile."""
    times, rates = np.array(profile, dtype=np.float64).T
    return np.append(0.0, np.cumsum(np.diff(times) * (rates[1:] + rates[:-1]) / 2))


def _renewal(span: float, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Points in [0, span) of a stationary gamma renewal process of rate 1.

    The wait for the first is a uniform part of a gap that is chosen by its length: with a whole gap
    a bursty process would begin with a burst, each adapter's at the same moment.
    """
    shape = cv**-2
    last = rng.random() * rng.gamma(shape + 1) / shape
    points = [np.array([last])]
    while last < span:
        gaps = rng.gamma(shape, size=1024) / shape
        points.append(last + np.cumsum(gaps))
        last = points[-1][-1].item()
    everything = np.concatenate(points)
    return everything[everything < span]


def _check(name: str, holds: bool, value: object, allowed: object) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; allowed: {allowed}")


def _check_lengths(models: Sequence[str], inputs: Range, outputs: Range, vocab: int) -> None:
    _check("models", 0 < len(models) <= MAX_JOBS, f"{len(models)} names", "at least one")
    _check("vocab", 0 < vocab < 2**31, vocab, "at least 1, below 2^31")
    for name, (low, high) in (("input_range", inputs), ("output_range", outputs)):
        fine = 1 <= low < high <= MAX_TOKENS
        _check(name, fine, f"[{low}, {high})", f"1 <= low < high <= {MAX_TOKENS}")


def _check_profile(profile: Profile) -> None:
    times, rates = [moment for moment, _ in profile], [rate for _, rate in profile]
    _check("rate", len(profile) >= 2 and times[0] == 0, profile, "points, the first at second 0")
    rising = times == sorted(times) and times[-1] < 1e9
    _check("rate", rising, profile, "points in order of their seconds, below 1e9")
    _check("rate", all(0 <= rate <= 1e6 for rate in rates), profile, "0 to 1e6 requests a second")
