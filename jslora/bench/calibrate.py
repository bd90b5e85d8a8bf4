"""Find the free numbers of a step-time model from what an engine was measured to do as a whole.

S-LoRA published no step times, only throughput and latencies of runs. So the runs are simulated,
and the model's `Shares` are changed until they come out: damped least squares (Levenberg 1944,
Marquardt 1963) of the logarithms, on slopes taken by differences. Host only: no jax.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from jslora.bench import s_lora
from jslora.bench.outcomes import Outcome
from jslora.bench.simulate import simulate
from jslora.bench.steptime import Shares
from jslora.progress import Progress, silent

FITTED = MappingProxyType(
    {
        "a10g": (
            ("rate/a10g/S1", "s-lora, n=200 alpha=1 R=1 cv=1"),
            ("rate/a10g/S2", "s-lora, n=200 alpha=1 R=2 cv=1"),
        ),
        "a100-40": (
            ("adapters/a100-40/S4", "s-lora, n=1 alpha=1 R=2 cv=1"),
            ("adapters/a100-40/S4", "s-lora, n=200 alpha=1 R=2 cv=1"),
        ),
        "a100-80": (
            ("rate/a100-80/S4", "s-lora, n=400 alpha=1 R=2 cv=1"),
            ("table3/a100-80/S2", "s-lora, n=1000 alpha=1 R=10 cv=1"),
        ),
    }
)
"""The two rows, by table and name, from which each device's shares come. The A100s stand in
different machines, whose hosts add more to a step than the devices differ."""

START = Shares(overhead=0.01, memory=0.8, compute=0.6, lora_overhead=0.003, lora_compute=0.3)

FREE = ("overhead", "compute", "lora_overhead", "lora_compute")
"""Memory's share is left as it was: it can hardly be told from the overhead."""

ROUNDS = 6
_STEP = 0.05  # of a logarithm, for a slope
_PRIOR = 0.05  # pull of what was assumed before, against a relative error of 1


def fit_device(device: str, progress: Progress = silent) -> Shares:
    """The shares of one of `FITTED`; `hardware` has what this found."""
    rows = {(row.group, row.name): row for row in s_lora.load()}
    return fit([rows[key] for key in FITTED[device]], START, progress)


def fit(rows: Sequence[s_lora.Row], start: Shares, progress: Progress = silent) -> Shares:
    """The shares nearest to `start` with which the rows come out best.

    Counted of each row are its throughput, its time to the first token and the rest of its latency.
    """

    def misses(x: np.ndarray) -> np.ndarray:
        shares = _shares(start, x)
        return np.concatenate([_PRIOR * (x - origin), *(_miss(row, shares) for row in rows)])

    origin = np.log([getattr(start, name) for name in FREE])
    return _shares(start, _least_squares(misses, origin, progress))


def _miss(row: s_lora.Row, shares: Shares) -> np.ndarray:
    """How far a simulated row is from the published one, in logarithms."""
    run = simulate(s_lora.trace(row), s_lora.machine(row, shares), s_lora.section(row))
    found, wanted = _observed(run.outcomes), row.figures
    # An unloaded engine's first token hangs on when it looks for new requests, not on its steps.
    weight = np.array([1.0, 0.1 if wanted.attainment == 1 else 0.5, 1.0])
    published = [wanted.throughput, wanted.ttft, wanted.latency - wanted.ttft]
    return weight * np.log(found / np.array(published))


def _observed(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Throughput, mean time to the first token, mean time from there to the last."""
    done = [o for o in outcomes if o.error is None]
    first = [o.times[0] - o.job.arrival for o in done]
    rest = [o.times[-1] - o.times[0] for o in done]
    return np.array([len(done) / max(o.times[-1] for o in done), np.mean(first), np.mean(rest)])


def _shares(start: Shares, x: np.ndarray) -> Shares:
    return replace(start, **dict(zip(FREE, np.exp(x).tolist(), strict=True)))


def _least_squares(
    misses: Callable[[np.ndarray], np.ndarray], x: np.ndarray, progress: Progress
) -> np.ndarray:
    """The x of least |misses(x)| that `ROUNDS` rounds find."""
    here, damping = misses(x), 0.01
    for done in range(ROUNDS):
        progress("fit", done, ROUNDS, f"error {np.sqrt(np.mean(here**2)):.4f}")
        slope = np.stack([(misses(x + step) - here) / _STEP for step in _STEP * np.eye(len(x))], 1)
        square = slope.T @ slope
        while damping < 1e3:
            move = np.linalg.solve(square + damping * np.eye(len(x)), -slope.T @ here)
            there = misses(x + np.clip(move, -1, 1))
            if there @ there < here @ here:
                x, here, damping = x + np.clip(move, -1, 1), there, damping / 4
                break
            damping *= 4
        else:
            break
    progress("fit", ROUNDS, ROUNDS, f"error {np.sqrt(np.mean(here**2)):.4f}")
    return x
