"""Time of calls that run on the device while the host dispatches the next ones.

A sample is as many calls as fill `SAMPLE_SECONDS`, dispatched one behind the other and waited for
once, so that the host's overhead hides behind the device's work; where it does not, `dispatch` says
so and the time is the host's. Samples of all variants take turns, so that a drift of the machine's
clocks falls on all alike. Nothing is subtracted.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

SAMPLE_SECONDS = 0.03
ROUNDS = 7
MAX_CALLS = 24
"""Fewer than the 32 calls after which the runtime makes the host wait, which is no overhead."""

Call = Callable[[], Any]
"""Dispatches one call and returns arrays that are ready when it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds a call: the median of the samples, the fastest and the slowest.

    Attributes:
        dispatch: seconds in which the host dispatched a call, of the median sample.
        calls: in a sample.
    """

    seconds: float
    low: float
    high: float
    dispatch: float
    samples: int
    calls: int

    @property
    def host_bound(self) -> bool:
        """Whether the device waited for the host, so that its own time is shorter."""
        return self.dispatch > 0.9 * self.seconds

    def record(self, per: int = 1) -> dict[str, Any]:
        """Its numbers by name; times of one of the `per` equal parts that a call has."""
        times = {name: getattr(self, name) / per for name in ("seconds", "low", "high")}
        return times | {
            "host_bound": self.host_bound, "samples": self.samples, "calls": self.calls
        }  # fmt: skip


def measure(
    calls: Mapping[str, Call], rounds: int = ROUNDS, sample_seconds: float = SAMPLE_SECONDS
) -> dict[str, Timing]:
    """Time variants of something side by side, warmed up first."""
    counts = {name: _count(call, sample_seconds) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_sample(call, counts[name]))
    return {name: _timing(samples[name], counts[name]) for name in calls}


def _count(call: Call, sample_seconds: float) -> int:
    """Calls that fill a sample; the first two also warm up."""
    _sample(call, 2)
    each, _ = _sample(call, 3)
    return min(MAX_CALLS, max(1, round(sample_seconds / max(each, 1e-9))))


def _sample(call: Call, count: int) -> tuple[float, float]:
    """(seconds, seconds of dispatch) a call."""
    started = time.perf_counter()
    for _ in range(count):
        result = call()
    dispatched = time.perf_counter()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / count, (dispatched - started) / count


def _timing(samples: list[tuple[float, float]], calls: int) -> Timing:
    ordered = sorted(samples)
    middle = ordered[(len(ordered) - 1) // 2]
    return Timing(
        seconds=statistics.median(seconds for seconds, _ in ordered),
        low=ordered[0][0],
        high=ordered[-1][0],
        dispatch=middle[1],
        samples=len(ordered),
        calls=calls,
    )
