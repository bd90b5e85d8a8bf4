"""Draw what policies make of the same load: a sweep of it, first tokens, and who was served when.

One figure: attainment and throughput of each stack over the swept parameter; the distribution of
first tokens of each run; and, of each run, every tenant's service over time. A stack has the same
colour everywhere. matplotlib is imported by this module and `jslora.bench.plot` only.
"""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jslora.bench.outcomes import Outcome, Summary, service

MOMENTS = 300
TENANTS = 8
"""Tenants drawn each with a line of its own, the rest being one."""


def draw(
    sweep: Mapping[str, Mapping[float, Summary]], parameter: str,
    runs: Mapping[str, Sequence[Outcome]], bound: Mapping[float, float] | None = None,
) -> bytes:  # fmt: skip
    """Return a PNG.

    Args:
        sweep: stack -> value of the swept parameter -> numbers of that run; may be empty.
        parameter: the swept parameter's name and unit.
        runs: stack -> one run's outcomes, drawn request by request; may be empty.
        bound: value of the parameter -> the attainment that no schedule exceeds.
    """
    stacks = {name: f"C{i}" for i, name in enumerate(dict.fromkeys([*sweep, *runs]))}
    columns = 2
    rows = bool(sweep) + -(-(1 + len(runs)) // columns) * bool(runs)
    assert rows, "nothing to draw"
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    if sweep:
        _draw_attainment(panels.pop(0), sweep, parameter, bound or {}, stacks)
        _draw_throughput(panels.pop(0), sweep, parameter, stacks)
    if runs:
        _draw_first_tokens(panels.pop(0), runs, stacks)
        most = max(
            _draw_service(axes, *run) for axes, run in zip(panels, runs.items(), strict=False)
        )
        for axes in panels[: len(runs)]:
            axes.set(ylim=(0, 1.05 * most))
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _draw_attainment(
    axes: Axes, sweep: Mapping[str, Mapping[float, Summary]], parameter: str,
    bound: Mapping[float, float], stacks: Mapping[str, str],
) -> None:  # fmt: skip
    for name, points in sweep.items():
        values = [points[x].attainment for x in sorted(points)]
        axes.plot(sorted(points), values, "o-", markersize=4, color=stacks[name], label=name)
    if bound:
        best = [bound[x] for x in sorted(bound)]
        axes.plot(sorted(bound), best, ":", color="black", label="no schedule exceeds")
    axes.set(xlabel=parameter, ylabel="SLO attainment", ylim=(0, 1.02))
    axes.legend(fontsize=7)


def _draw_throughput(
    axes: Axes, sweep: Mapping[str, Mapping[float, Summary]], parameter: str,
    stacks: Mapping[str, str],
) -> None:  # fmt: skip
    for name, points in sweep.items():
        values = [points[x].throughput for x in sorted(points)]
        axes.plot(sorted(points), values, "o-", markersize=4, color=stacks[name], label=name)
    axes.set(xlabel=parameter, ylabel="completed requests/s", ylim=(0, None))


def _draw_first_tokens(
    axes: Axes, runs: Mapping[str, Sequence[Outcome]], stacks: Mapping[str, str]
) -> None:
    """Shares of all requests, so that what was refused is missing at the top."""
    for name, run in runs.items():
        seconds = np.sort([o.first_token for o in run if o.first_token is not None])
        shares = np.arange(1, len(seconds) + 1) / len(run)
        axes.step(seconds, shares, where="post", color=stacks[name], label=name)
    axes.set(xlabel="time to first token (s)", ylabel="share of all requests", ylim=(0, 1.02))
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=0)
    axes.legend(fontsize=7)


def _draw_service(axes: Axes, name: str, run: Sequence[Outcome]) -> float:
    """Each tenant's service over time; returns the most of any."""
    moments = np.linspace(0, max((o.last for o in run), default=0.0), MOMENTS)
    lines = _largest(service(run, moments.tolist()))
    axes.set_prop_cycle(color=list(colormaps["Dark2"](range(TENANTS))))
    for tenant, values in lines:
        axes.plot(moments, values, linewidth=1.2, label=tenant)
    axes.set(title=name, xlabel="time (s)", ylabel="service (1 prompt, 2 generated)")
    axes.legend(fontsize=7)
    return max((values[-1].item() for _, values in lines), default=0.0)


def _largest(served: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """The tenants with the most service, and the mean of the others if there are too many."""
    ranked = sorted(served.items(), key=lambda line: -line[1][-1])
    if len(ranked) <= TENANTS:
        return ranked
    others = np.mean([values for _, values in ranked[TENANTS - 1 :]], axis=0)
    return [*ranked[: TENANTS - 1], (f"mean of {len(ranked) - TENANTS + 1} others", others)]
