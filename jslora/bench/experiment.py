"""Simulations side by side: one workload or several, under several stacks, on several seeds.

Every run is one pure function call, so they may be spread over processes, and neither their number
nor the order in which they end changes a result. Host only: no jax.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from jslora.bench.outcomes import Summary, summarize
from jslora.bench.simulate import Machine, Simulated, simulate
from jslora.bench.workload import Trace
from jslora.progress import Progress, silent
from jslora.schedule.settings import SchedulerSection

COUNTERS = ("loads", "evictions", "preemptions", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run; `trace` makes its workload where it is run.

    Attributes:
        slo: seconds to the first token of a job without its own, for the summary.
        rate: requests/s that the workload was made with, if that is known.
    """

    trace: Callable[[], Trace]
    machine: Machine
    section: SchedulerSection
    slo: float
    rate: float | None = None

    def run(self) -> Simulated:
        """Simulate it."""
        return simulate(self.trace(), self.machine, self.section)

    def summarize(self, run: Simulated) -> Summary:
        """The numbers of a run of this task."""
        weights = {name: tenant.share for name, tenant in self.section.tenants.items()}
        counters = {name: getattr(run, name) for name in COUNTERS}
        return summarize(run.outcomes, self.slo, weights, self.rate, **counters)


def run_all[Key: Hashable](
    tasks: Mapping[Key, Task], processes: int = 1, progress: Progress = silent
) -> dict[Key, Simulated]:
    """Run all tasks; the results are in their order."""
    done: dict[Key, Simulated] = {}
    for key, run in _run(tasks, processes):
        done[key] = run
        progress("runs", len(done), len(tasks), str(key))
    return {key: done[key] for key in tasks}


def _run[Key: Hashable](
    tasks: Mapping[Key, Task], processes: int
) -> Iterable[tuple[Key, Simulated]]:
    if processes == 1:
        yield from ((key, task.run()) for key, task in tasks.items())
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        running = {pool.submit(task.run): key for key, task in tasks.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def mean(summaries: Sequence[Summary]) -> Summary:
    """The mean of each number over several runs; None where one of them has none."""
    found: Summary = _each(summaries, statistics.fmean)
    return found


def deviation(summaries: Sequence[Summary]) -> Summary:
    """The standard deviation of each number over several runs."""
    found: Summary = _each(summaries, statistics.stdev)
    return found


def _each(values: Sequence[Any], of: Callable[[list[float]], float]) -> Any:
    """The same of every number in equal structures, None where one of them is."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if is_dataclass(first) and not isinstance(first, type):
        names = [part.name for part in fields(first)]
        return type(first)(**{n: _each([getattr(v, n) for v in values], of) for n in names})
    if isinstance(first, dict):
        return {n: _each([v[n] for v in values], of) for n in first if all(n in v for v in values)}
    if isinstance(first, tuple):
        return tuple(_each(parts, of) for parts in zip(*values, strict=True))
    return of([float(value) for value in values])
