"""Draw one run (throughput over time, distributions of TTFT and ITL), or what adapters cost.

Invariant: nothing here is needed to measure; matplotlib is imported by this module only.
"""

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jslora.bench.adapters import Slice
from jslora.bench.client import Run
from jslora.bench.comparison import METRICS, answers, rows
from jslora.bench.report import gaps

MIN_BINS, MAX_BINS = 10, 100


def draw(run: Run) -> bytes:
    """Return a PNG of the successful requests of a run."""
    good = [record for record in run.records if record.error is None]
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    over_time, ttft, itl = figure.subplots(1, 3)

    arrivals = [arrival for record in good for arrival in record.arrivals]
    weights = [r.output_tokens / len(r.arrivals) for r in good for _ in r.arrivals]
    bins = min(max(int(run.duration), MIN_BINS), MAX_BINS)
    edges = np.linspace(0, max(run.duration, 1e-3), bins + 1)
    tokens, _ = np.histogram(arrivals, edges, weights=weights)
    over_time.stairs(tokens / np.diff(edges), edges)
    over_time.set(xlabel="time (s)", ylabel="output tokens/s", ylim=(0, None))

    _draw_cdf(ttft, "TTFT (ms)", [r.ttft for r in good if r.ttft is not None])
    _draw_cdf(itl, "ITL (ms)", [gap for record in good for gap in gaps(record)])
    return _png(figure)


def draw_adapters(slices: Sequence[Slice]) -> bytes:
    """Return a PNG of the sweep, the ratios and the streams beside loads, as far as measured."""
    measured = {each.experiment for each in slices}
    panels: list[Callable[[Axes, Sequence[Slice]], None]] = []
    if "sweep" in measured:
        panels += [_draw_throughput, _draw_ttft]
    if measured & {"room", "loads"}:
        panels += [_draw_ratios]
    if "loads" in measured:
        panels += [_draw_gaps]
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    for axes, panel in zip(np.ravel(figure.subplots(len(panels))), panels, strict=True):
        panel(axes, slices)
    return _png(figure)


def _draw_throughput(axes: Axes, slices: Sequence[Slice]) -> None:
    _draw_sweep(axes, slices, "output tok/s")
    axes.set(ylabel="output tokens/s", ylim=(0, None))


def _draw_ttft(axes: Axes, slices: Sequence[Slice]) -> None:
    _draw_sweep(axes, slices, "TTFT p50")
    _draw_sweep(axes, slices, "TTFT p99")
    axes.set(ylabel="TTFT (ms)", ylim=(0, None))


def _draw_sweep(axes: Axes, slices: Sequence[Slice], metric: str) -> None:
    """A line through the numbers of all blocks, each block a dot, and where the room ends."""
    sweep = sorted((s for s in slices if s.experiment == "sweep"), key=lambda s: s.adapters)
    line = {row.adapters: row.metrics[metric][0] for row in rows(sweep)}
    (drawn,) = axes.plot(list(line), list(line.values()), label=metric)
    dots = [METRICS[metric].of([each.run]) for each in sweep]
    axes.scatter([s.adapters for s in sweep], dots, s=12, alpha=0.5, color=drawn.get_color())
    axes.axvline(sweep[0].room, linestyle=":", color="gray")
    axes.set(xlabel="adapters", xscale="log", title="dotted: the room ends")
    axes.legend()


def _draw_ratios(axes: Axes, slices: Sequence[Slice]) -> None:
    """Each comparison's blocks as dots, its ratio and what was wanted as bars."""
    found = [each for each in answers(slices) if each.question.experiment != "sweep"]
    labels = [f"{a.question.metric}, {a.question.condition} / {a.question.against}" for a in found]
    for height, each in enumerate(found):
        axes.scatter(each.ratios, [height] * len(each.ratios), s=12, alpha=0.5, color="C0")
        axes.plot(each.ratio, height, "|", markersize=14, color="black")
        if each.question.wanted is not None:
            axes.plot(each.question.wanted, height, "x", color="red")
    axes.axvline(1, linestyle=":", color="gray")
    axes.set_yticks(range(len(found)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="ratio (dots: blocks; bar: told; cross: wanted)")


def _draw_gaps(axes: Axes, slices: Sequence[Slice]) -> None:
    conditions = dict.fromkeys(s.condition for s in slices if s.experiment == "loads")
    for condition in conditions:
        own = [s.run for s in slices if (s.experiment, s.condition) == ("loads", condition)]
        good = [record for run in own for record in run.records if record.error is None]
        found = np.asarray([gap for record in good for gap in gaps(record)]) * 1e3
        if found.size:
            axes.ecdf(found, label=condition, complementary=True)
    axes.set(xlabel="ITL of the streams (ms)", ylabel="share above", yscale="log", ylim=(1e-4, 1))
    axes.legend()


def _png(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _draw_cdf(axes: Axes, label: str, seconds: list[float]) -> None:
    if seconds:
        axes.ecdf(np.asarray(seconds) * 1e3)
    axes.set(xlabel=label, ylabel="share", ylim=(0, 1))
