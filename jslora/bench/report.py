"""Turn the records of a run into numbers, a table, JSON and a plot.

Invariants: tokens and latencies are those of successful requests only, but failed ones count in
the duration; what was not measured is null or "-", never zero. Host only: no jax.
"""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import msgspec
import numpy as np

from jslora import __version__
from jslora.bench.client import Record, Run

Key = Literal["model", "tenant"]

SCHEMA = 1
DEFINITIONS = {
    "chunk": "what one read delivered of a stream's text: one token or several",
    "ttft": "from sending a request (connecting included) to its first chunk",
    "itl": "gap between two chunks of a request",
    "tpot": "from first to last chunk of a request / (its output tokens - 1)",
    "e2e": "from sending a request to the end of its stream",
    "duration": "from the start of the run to the end of its last request",
    "throughput": "of successful requests, over the duration",
    "lag": "open loop: how late the client sent a request; not part of its latencies",
}
WIDTH = 62
# An open loop that sends this much late on average is no longer the arrival process asked for.
LATE_MS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Mean and percentiles (linear interpolation) in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    kind: str
    count: int
    example: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of one run, or of one model's share of it.

    Attributes:
        duration: seconds; throughputs are per second of it.
        tokens_per_chunk: above 1, ITL is the gap between groups of tokens.
        client_cpu_us: CPU time of the client per output token; of whole runs only.
    """

    successful: int
    failed: int
    duration: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    peak_concurrency: int
    tokens_per_chunk: float | None
    client_cpu_us: float | None
    ttft: Latency | None
    itl: Latency | None
    tpot: Latency | None
    e2e: Latency | None
    lag: Latency | None
    errors: tuple[ErrorGroup, ...]
    notes: tuple[str, ...]


def summarize(run: Run) -> Summary:
    """Return the numbers of a run."""
    return _summarize(run.records, run.duration, run.cpu_seconds)


def summarize_by(run: Run, key: Key) -> dict[str, Summary]:
    """Return each model's or tenant's share of a run; rates are over the whole run's duration."""
    records: dict[str, list[Record]] = {}
    for record in run.records:
        records.setdefault(getattr(record, key), []).append(record)
    return {name: _summarize(own, run.duration, None) for name, own in sorted(records.items())}


def _summarize(records: Sequence[Record], duration: float, cpu_seconds: float | None) -> Summary:
    good = [record for record in records if record.error is None]
    inputs = sum(record.input_tokens for record in good)
    outputs = sum(record.output_tokens for record in good)
    chunks = sum(len(record.arrivals) for record in good)
    lag = latency(r.sent - r.due for r in records if r.due is not None)
    return Summary(
        successful=len(good),
        failed=len(records) - len(good),
        duration=duration,
        input_tokens=inputs,
        cached_tokens=sum(record.cached_tokens for record in good),
        output_tokens=outputs,
        request_throughput=_over(len(good), duration),
        output_throughput=_over(outputs, duration),
        total_throughput=_over(inputs + outputs, duration),
        peak_concurrency=peak_concurrency(records),
        tokens_per_chunk=outputs / chunks if chunks else None,
        client_cpu_us=cpu_seconds / outputs * 1e6 if outputs and cpu_seconds else None,
        ttft=latency(r.ttft for r in good if r.ttft is not None),
        itl=latency(gap for r in good for gap in gaps(r)),
        tpot=latency(r.tpot for r in good if r.tpot is not None),
        e2e=latency(r.e2e for r in good),
        lag=lag,
        errors=group_errors(records),
        notes=_notes(good, lag),
    )


def latency(seconds: Iterable[float]) -> Latency | None:
    """Return mean and percentiles of durations given in seconds; None if there are none."""
    values = np.fromiter(seconds, dtype=np.float64) * 1e3
    if not values.size:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Latency(mean=values.mean().item(), p50=p50, p90=p90, p99=p99)


def gaps(record: Record) -> list[float]:
    """Return the seconds between the chunks of one request."""
    return [after - before for before, after in pairwise(record.arrivals)]


def peak_concurrency(records: Sequence[Record]) -> int:
    """Return the most requests in flight at one moment."""
    # At equal times ends come first: a request that starts as another ends does not overlap it.
    moments = sorted([(r.sent, 1) for r in records] + [(r.end, -1) for r in records])
    running = peak = 0
    for _, change in moments:
        running += change
        peak = max(peak, running)
    return peak


def group_errors(records: Sequence[Record]) -> tuple[ErrorGroup, ...]:
    """Return the failures by kind, commonest first, each with the detail of its first."""
    counts = Counter(record.error for record in records if record.error is not None)
    examples = {record.error: record.detail for record in reversed(records)}
    return tuple(
        ErrorGroup(kind=kind, count=count, example=examples[kind])
        for kind, count in counts.most_common()
    )


def render(runs: Sequence[Run], tables: Sequence[Key] = ()) -> str:
    """Return the report as text: the run of median output throughput, and how runs spread.

    `tables` adds what each model or each tenant got.
    """
    summaries = [summarize(run) for run in runs]
    shown = middle(summaries)
    lines = _block(summaries[shown])
    for key in tables:
        lines += ["", *_share_table(key, summarize_by(runs[shown], key))]
    if len(runs) > 1:
        lines += ["", *_spread_table(summaries, shown)]
    return "\n".join(lines)


def middle(summaries: Sequence[Summary]) -> int:
    """Return the index of the run of median output throughput; of two, that of the lower."""
    ranked = sorted(range(len(summaries)), key=lambda i: summaries[i].output_throughput)
    return ranked[(len(ranked) - 1) // 2]


def as_json(runs: Sequence[Run], conditions: dict[str, Any]) -> bytes:
    """Return everything measured, each request included, and under what `conditions`."""
    summaries = [summarize(run) for run in runs]
    document = {
        "schema": SCHEMA,
        "conditions": conditions,
        "client": client_facts(),
        "definitions": DEFINITIONS,
        "spread": spread(summaries),
        "runs": [
            {
                "started": run.started,
                "summary": asdict(summary),
                **{
                    f"{key}s": {name: asdict(own) for name, own in summarize_by(run, key).items()}
                    for key in get_args(Key)
                },
                "requests": [_request(record) for record in run.records],
            }
            for run, summary in zip(runs, summaries, strict=True)
        ],
    }
    return msgspec.json.encode(document) + b"\n"


def spread(summaries: Sequence[Summary]) -> dict[str, dict[str, float]]:
    """Return median, lowest and highest throughput over the runs."""
    names = ("request_throughput", "output_throughput", "total_throughput")
    values = {name: [getattr(summary, name) for summary in summaries] for name in names}
    return {
        name: {"median": statistics.median(of), "min": min(of), "max": max(of)}
        for name, of in values.items()
    }


def save(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _over(amount: float, duration: float) -> float:
    return amount / duration if duration else 0.0


def _notes(good: Sequence[Record], lag: Latency | None) -> tuple[str, ...]:
    """What a reader must know before comparing these numbers with others."""
    short = sum(record.output_tokens < record.asked_tokens for record in good)
    uncounted = sum(not record.counted for record in good)
    silent = sum(not record.arrivals for record in good)
    notes = []
    if short:
        notes.append(f"{short} requests got fewer tokens than they asked for")
    if uncounted:
        notes.append(f"{uncounted} requests came without usage: their events were counted instead")
    if silent:
        notes.append(f"{silent} requests brought no text and have no TTFT")
    if lag and lag.mean > LATE_MS:
        notes.append(f"the client was late: requests left {lag.mean:.1f} ms after they were due")
    return tuple(notes)


def _block(summary: Summary) -> list[str]:
    cached = f" ({summary.cached_tokens} cached)" if summary.cached_tokens else ""
    rows: list[tuple[str, str]] = [
        ("Successful requests", str(summary.successful)),
        ("Failed requests", str(summary.failed)),
        ("Benchmark duration (s)", f"{summary.duration:.2f}"),
        ("Total input tokens", f"{summary.input_tokens}{cached}"),
        ("Total generated tokens", str(summary.output_tokens)),
        ("Request throughput (req/s)", f"{summary.request_throughput:.2f}"),
        ("Output token throughput (tok/s)", f"{summary.output_throughput:.2f}"),
        ("Total token throughput (tok/s)", f"{summary.total_throughput:.2f}"),
        ("Peak concurrent requests", str(summary.peak_concurrency)),
        ("Tokens per chunk", _number(summary.tokens_per_chunk)),
        ("Client CPU per output token (us)", _number(summary.client_cpu_us)),
    ]
    stages = ("ttft", "itl", "tpot", "e2e") + (("lag",) if summary.lag else ())
    return [
        " Serving Benchmark Result ".center(WIDTH, "="),
        *(f"{name + ':':<{WIDTH - 22}}{value:>22}" for name, value in rows),
        "-" * WIDTH,
        f"{'(ms)':<18}" + "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p99")),
        *(_latency_row(stage.upper(), getattr(summary, stage)) for stage in stages),
        "=" * WIDTH,
        *(f"{stage.upper()}: {DEFINITIONS[stage]}" for stage in stages),
        *(f"Error: {e.count} x {e.kind}: {e.example}" for e in summary.errors),
        *(f"Note: {note}" for note in summary.notes),
    ]


def _latency_row(name: str, latency: Latency | None) -> str:
    values = (latency.mean, latency.p50, latency.p90, latency.p99) if latency else (None,) * 4
    return f"{name:<18}" + "".join(f"{_number(value):>11}" for value in values)


def _share_table(key: Key, shares: dict[str, Summary]) -> list[str]:
    width = max(len(name) for name in (key, *shares))
    titles = ("ok", "failed", "tok/s", "TTFT p50", "TTFT p99", "ITL p50", "TPOT p50", "E2E p50")
    lines = [f"{key:<{width}}" + "".join(f"{title:>10}" for title in titles)]
    for name, own in shares.items():
        cells = [
            str(own.successful),
            str(own.failed),
            _number(own.output_throughput),
            _number(own.ttft.p50 if own.ttft else None),
            _number(own.ttft.p99 if own.ttft else None),
            _number(own.itl.p50 if own.itl else None),
            _number(own.tpot.p50 if own.tpot else None),
            _number(own.e2e.p50 if own.e2e else None),
        ]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _spread_table(summaries: Sequence[Summary], shown: int) -> list[str]:
    units = {"request_throughput": "req/s", "output_throughput": "output tok/s",
             "total_throughput": "total tok/s"}  # fmt: skip
    return [
        f"Above: run {shown + 1} of {len(summaries)}. Over all runs:",
        f"{'':<18}" + "".join(f"{name:>11}" for name in ("median", "min", "max")),
        *(
            f"{units[name]:<18}" + "".join(f"{value:>11.2f}" for value in values.values())
            for name, values in spread(summaries).items()
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def client_facts() -> dict[str, Any]:
    """Return what measured, and when."""
    return {
        "jslora": __version__,
        "aiohttp": aiohttp.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _request(record: Record) -> dict[str, Any]:
    """One request as JSON, in seconds to the microsecond."""
    values = asdict(record) | {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e}
    values["arrivals"] = [round(arrival, 6) for arrival in record.arrivals]
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
