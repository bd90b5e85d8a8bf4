"""Runs side by side, as Markdown: several stacks under one load, or simulated and published ones.

What the numbers are is told by `outcomes`; what there was none of is a dash. Host only: no jax.
"""

from collections.abc import Callable, Mapping

from jslora.bench.outcomes import Spread, Summary
from jslora.markdown import aligned


def _percentile(of: str, percentile: str) -> Callable[[Summary], float | None]:
    def value(summary: Summary) -> float | None:
        found: Spread | None = getattr(summary, of)
        return None if found is None else float(getattr(found, percentile))

    return value


METRICS: dict[str, tuple[Callable[[Summary], float | None], int]] = {
    "requests": (lambda s: s.requests, 0),
    "completed": (lambda s: s.completed, 0),
    "aborted": (lambda s: s.aborted, 0),
    "failed": (lambda s: s.failed, 0),
    "requests/s": (lambda s: s.throughput, 3),
    "requests/s, strip": (lambda s: s.strip_throughput, 3),
    "output tokens/s": (lambda s: s.output_tokens_per_s, 1),
    "total tokens/s": (lambda s: s.total_tokens_per_s, 1),
    "latency, s": (lambda s: s.latency, 2),
    "first token, s": (lambda s: s.first_token, 3),
    "attainment": (lambda s: s.attainment, 3),
    "satisfaction": (lambda s: s.satisfaction, 3),
    "TTFT p50, s": (_percentile("ttft", "p50"), 3),
    "TTFT p90, s": (_percentile("ttft", "p90"), 3),
    "TTFT p99, s": (_percentile("ttft", "p99"), 3),
    "ITL p50, s": (_percentile("itl", "p50"), 4),
    "ITL p99, s": (_percentile("itl", "p99"), 4),
    "most waiting": (lambda s: s.most_waiting, 0),
    "longest wait, s": (lambda s: s.longest_wait, 1),
    "fairness": (lambda s: s.fairness, 4),
}
"""Lines of `table`: what of a summary, and digits after the point."""


def figures(summary: Summary) -> dict[str, float | None]:
    """S-LoRA's numbers of a run, by the names that its tables are compared under."""
    return {
        "throughput": summary.throughput,
        "latency": summary.latency,
        "ttft": summary.first_token,
        "attainment": summary.attainment,
        "satisfaction": summary.satisfaction,
        "aborted": summary.aborted,
    }


def table(rows: Mapping[str, Summary]) -> str:
    """Runs side by side as a Markdown table, a column each.

    With a line for each counter, and one for the service of each tenant if there are several.
    """
    counted = dict.fromkeys(name for summary in rows.values() for name in summary.counters)
    lines = [
        [title, *(_number(of(summary), digits) for summary in rows.values())]
        for title, (of, digits) in METRICS.items()
    ]
    lines += [
        [name.replace("_", " "), *(_number(s.counters.get(name), 0) for s in rows.values())]
        for name in counted
    ]
    tenants = dict.fromkeys(name for summary in rows.values() for name in summary.tenants)
    if len(tenants) > 1:
        lines += [
            [f"service, {name}", *(_service(summary, name) for summary in rows.values())]
            for name in tenants
        ]
    return aligned(["", *rows], lines)


def _service(summary: Summary, tenant: str) -> str:
    found = summary.tenants.get(tenant)
    return _number(found.service if found else None, 0)


def compare(
    simulated: Mapping[str, Mapping[str, float | None]],
    published: Mapping[str, Mapping[str, float | None]],
) -> str:
    """A Markdown table of "ours / published (relative difference)", a line for each run of both.

    Args:
        simulated, published: figures by run, named as by `figures`; those columns that some
            published run has are shown.
    """
    runs = [run for run in published if run in simulated]
    columns = list(dict.fromkeys(name for run in runs for name in published[run]))
    lines = [
        [run, *(_beside(simulated[run].get(name), published[run].get(name)) for name in columns)]
        for run in runs
    ]
    return aligned(["", *columns], lines)


def _beside(ours: float | None, theirs: float | None) -> str:
    text = f"{_figure(ours)} / {_figure(theirs)}"
    return text if ours is None or not theirs else f"{text} ({ours / theirs - 1:+.0%})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _figure(value: float | None) -> str:
    """Three significant digits, of large numbers all before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
