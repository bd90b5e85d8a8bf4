"""Turn the slices of `bench.adapters` into ratios, tables and JSON.

A ratio is taken within a block, whose slices stand close together; what is told is the median over
the blocks, with the lowest and the highest. TTFT p99 alone, for which one slice has too few
requests, is that of all blocks' requests together. Failed requests have no latency and bring no
tokens, but their time counts. Host only: no jax.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np

from jslora.bench.adapters import Slice
from jslora.bench.client import Run
from jslora.bench.conditions import Experiment
from jslora.bench.report import client_facts, gaps, latency, summarize

SCHEMA = 1


def throughput(runs: Sequence[Run]) -> float:
    """Return the output tokens a second of successful requests."""
    tokens = sum(r.output_tokens for run in runs for r in run.records if r.error is None)
    return tokens / sum(run.duration for run in runs)


def ttft(runs: Sequence[Run], percent: float) -> float:
    """Return a percentile of the times to the first chunk, in ms; nan if there are none."""
    records = [r for run in runs for r in run.records if r.error is None]
    return _percentile([r.ttft for r in records if r.ttft is not None], percent)


def itl(runs: Sequence[Run], percent: float) -> float:
    """Return a percentile of the gaps between chunks, in ms; nan if there are none."""
    records = [r for run in runs for r in run.records if r.error is None]
    return _percentile([gap for record in records for gap in gaps(record)], percent)


def _percentile(seconds: Sequence[float], percent: float) -> float:
    return np.percentile(seconds, percent).item() * 1e3 if seconds else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number of some runs taken together; `pooled` if one slice has too few requests for it."""

    of: Callable[[Sequence[Run]], float]
    pooled: bool = False


METRICS = {
    "output tok/s": Metric(of=throughput),
    "TTFT p50": Metric(of=lambda runs: ttft(runs, 50)),
    "TTFT p99": Metric(of=lambda runs: ttft(runs, 99), pooled=True),
    "ITL p50": Metric(of=lambda runs: itl(runs, 50)),
    "ITL p90": Metric(of=lambda runs: itl(runs, 90)),
    "ITL p99": Metric(of=lambda runs: itl(runs, 99)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How a metric under one condition compares with it under another.

    Attributes:
        wanted: what the ratio should at most be, or at least for a throughput; None asks nothing.
    """

    experiment: Experiment
    metric: str
    condition: str
    against: str
    wanted: float | None = None


QUESTIONS = (
    Question(
        experiment="room", metric="output tok/s", condition="all", against="fits", wanted=0.95
    ),
    Question(experiment="room", metric="TTFT p50", condition="all", against="fits", wanted=1.5),
    Question(experiment="room", metric="TTFT p99", condition="all", against="fits"),
    Question(experiment="room", metric="output tok/s", condition="twice", against="fits"),
    Question(experiment="room", metric="TTFT p50", condition="twice", against="fits", wanted=1.5),
    Question(experiment="room", metric="TTFT p99", condition="twice", against="fits", wanted=2.0),
    *(
        Question(
            experiment="loads", metric=metric, condition=condition, against=against, wanted=wanted
        )
        for condition in ("absent", "called")
        for against in ("no probes", "resident")
        for metric, wanted in (("ITL p90", 1.2), ("ITL p99", None), ("output tok/s", None))
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The ratio, and how it spreads over the blocks.

    Attributes:
        ratio: the median of `ratios`, or the ratio of all blocks together for a pooled metric.
        ratios: one a block.
        holds: whether it is as wanted; None where nothing is.
    """

    question: Question
    ratio: float
    ratios: tuple[float, ...]
    holds: bool | None


def answer(question: Question, slices: Sequence[Slice]) -> Answer | None:
    """Answer a question by the blocks that have both conditions; None if no block has."""
    own = [s for s in slices if s.experiment == question.experiment]
    ours = {s.block: s.run for s in own if s.condition == question.condition}
    theirs = {s.block: s.run for s in own if s.condition == question.against}
    blocks = sorted(ours.keys() & theirs.keys())
    if not blocks:
        return None
    metric = METRICS[question.metric]
    ratios = tuple(_ratio(metric.of([ours[b]]), metric.of([theirs[b]])) for b in blocks)
    together = _ratio(metric.of([ours[b] for b in blocks]), metric.of([theirs[b] for b in blocks]))
    ratio = together if metric.pooled else statistics.median(ratios)
    holds = None
    if question.wanted is not None:
        at_least = question.metric == "output tok/s"
        holds = ratio >= question.wanted if at_least else ratio <= question.wanted
    return Answer(question=question, ratio=ratio, ratios=ratios, holds=holds)


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def answers(slices: Sequence[Slice]) -> list[Answer]:
    """Answer all that was measured: the fixed questions, and what the sweep does at its step."""
    asked = [*QUESTIONS, *_at_the_step(slices)]
    return [found for question in asked if (found := answer(question, slices)) is not None]


def _at_the_step(slices: Sequence[Slice]) -> Iterator[Question]:
    """Compare the first number of adapters that does not fit with the last that does."""
    sweep = [s for s in slices if s.experiment == "sweep"]
    fit = [s.adapters for s in sweep if s.adapters <= s.room]
    beyond = [s.adapters for s in sweep if s.adapters > s.room]
    if fit and beyond:
        for metric in ("output tok/s", "TTFT p50", "TTFT p99"):
            yield Question(
                experiment="sweep",
                metric=metric,
                condition=str(min(beyond)),
                against=str(max(fit)),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One condition over all its blocks.

    Attributes:
        metrics: metric → median over the blocks (or of all together, if pooled), lowest, highest.
        loads: adapters brought to the device, per request of the run.
        load_rate: the same, a second.
        probe: TTFT p50 of the probes, in ms.
        failed: requests, probes and calls that failed.
    """

    experiment: Experiment
    condition: str
    adapters: int
    blocks: int
    metrics: dict[str, tuple[float, float, float]]
    loads: float
    load_rate: float
    evictions: int
    preemptions: int
    probe: float | None
    failed: int


def rows(slices: Sequence[Slice]) -> list[Row]:
    """Return a row for each condition, by experiment and number of adapters."""
    groups: dict[tuple[Experiment, str], list[Slice]] = {}
    for each in slices:
        groups.setdefault((each.experiment, each.condition), []).append(each)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Slice]) -> Row:
    runs = [each.run for each in group]
    probes = [record for each in group for record in each.probes]
    first = latency(r.ttft for r in probes if r.error is None and r.ttft is not None)
    records = [record for run in runs for record in run.records]
    loads = sum(each.loads for each in group)
    return Row(
        experiment=group[0].experiment,
        condition=group[0].condition,
        adapters=group[0].adapters,
        blocks=len(group),
        metrics={name: _over_blocks(metric, runs) for name, metric in METRICS.items()},
        loads=loads / len(records),
        load_rate=loads / sum(run.duration for run in runs),
        evictions=sum(each.evictions for each in group),
        preemptions=sum(each.preemptions for each in group),
        probe=first.p50 if first else None,
        failed=sum(record.error is not None for record in [*records, *probes])
        + sum(len(each.failures) for each in group),
    )


def _over_blocks(metric: Metric, runs: Sequence[Run]) -> tuple[float, float, float]:
    values = [metric.of([run]) for run in runs]
    middle = metric.of(runs) if metric.pooled else statistics.median(values)
    return middle, min(values), max(values)


def render(slices: Sequence[Slice]) -> str:
    """Return the report as text: a line for each condition, then one for each comparison."""
    if not slices:
        return "Nothing was measured."
    titles = (*METRICS, "loads/req", "loads/s", "probe p50", "preempted", "failed")
    lines = [
        f"{slices[0].room} adapters fit on the device. Latencies in ms; medians over the blocks "
        "[lowest … highest];",
        "TTFT p99 is of all blocks' requests together.",
        "",
        f"{'experiment':<11}{'condition':<11}{'models':>7}{'blocks':>7}"
        + "".join(f"{title:>13}" for title in titles),
    ]
    for row in rows(slices):
        numbers = [f"{row.metrics[name][0]:.1f}" for name in METRICS]
        numbers += [f"{row.loads:.2f}", f"{row.load_rate:.2f}"]
        numbers += ["-" if row.probe is None else f"{row.probe:.1f}"]
        numbers += [str(row.preemptions), str(row.failed)]
        lines.append(
            f"{row.experiment:<11}{row.condition:<11}{row.adapters:>7}{row.blocks:>7}"
            + "".join(f"{number:>13}" for number in numbers)
        )
    return "\n".join([*lines, "", *(_line(found) for found in answers(slices)), *_failed(slices)])


def _line(found: Answer) -> str:
    asked = found.question
    text = (
        f"{asked.experiment + ':':<7}{asked.metric:<13}{asked.condition:>7} / {asked.against:<10}"
        f"{found.ratio:6.3f}  [{min(found.ratios):.3f} … {max(found.ratios):.3f}]"
    )
    if asked.wanted is None:
        return text
    bound = "≥" if asked.metric == "output tok/s" else "≤"
    return f"{text}  wanted {bound} {asked.wanted}: {'holds' if found.holds else 'FAILS'}"


def _failed(slices: Sequence[Slice]) -> Iterator[str]:
    """The first failures, with their slices."""
    for each in slices:
        records = [record for record in [*each.run.records, *each.probes] if record.error]
        told = [f"{r.model}: {r.error}: {r.detail}" for r in records] + [*each.failures]
        if told:
            yield (
                f"Failed in {each.experiment} {each.block + 1}, {each.condition}: {len(told)}, "
                f"the first: {told[0]}"
            )


def as_json(slices: Sequence[Slice], conditions: dict[str, Any]) -> bytes:
    """Return all numbers, each slice's included, and under what `conditions` they were taken."""
    document = {
        "schema": SCHEMA,
        "conditions": conditions,
        "client": client_facts(),
        "answers": [asdict(found) for found in answers(slices)],
        "rows": [asdict(row) for row in rows(slices)],
        "slices": [_slice(each) for each in slices],
    }
    return msgspec.json.encode(document) + b"\n"


def _slice(each: Slice) -> dict[str, Any]:
    values = {
        name: getattr(each, name) for name in Slice.__slots__ if name not in ("run", "probes")
    }
    first = [None if r.ttft is None else round(r.ttft, 6) for r in each.run.records]
    probes = [None if r.ttft is None else round(r.ttft, 6) for r in each.probes]
    return values | {
        "started": each.run.started,
        "summary": asdict(summarize(each.run)),
        "ttft_seconds": first,
        "probe_ttft_seconds": probes,
    }
