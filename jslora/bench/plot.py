"""Draw one run: output throughput over time, and how TTFT and ITL are distributed.

Invariant: nothing here is needed to measure; matplotlib is imported by this module only.
"""

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jslora.bench.client import Run
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
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _draw_cdf(axes: Axes, label: str, seconds: list[float]) -> None:
    if seconds:
        axes.ecdf(np.asarray(seconds) * 1e3)
    axes.set(xlabel=label, ylabel="share", ylim=(0, 1))
