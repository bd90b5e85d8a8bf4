"""Draw what `gpu_check` recorded: steps against their floors, kernels against the copy, baselines.

Invariant: nothing here is needed to measure; matplotlib is imported by this module only.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jslora.gpu.report import COPY_GOAL, Findings, Record

Panel = Callable[[Axes, Findings], None]


def draw(document: dict[str, Any]) -> bytes | None:
    """Return a PNG of whatever was measured; None if that is nothing."""
    findings = Findings(document)
    panels = {"step": _steps, "lora": _lora, "attention": _attention, "baseline": _baselines}
    drawn = [panel for kind, panel in panels.items() if findings.of(kind)]
    if not drawn:
        return None
    figure = Figure(figsize=(9, 4.5 * len(drawn)), layout="constrained")
    device = findings.device
    figure.suptitle(f"{device['kind_of_device']}" if device else "unknown device")
    for axes, panel in zip(np.ravel(figure.subplots(len(drawn))), drawn, strict=True):
        panel(axes, findings)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _steps(axes: Axes, findings: Findings) -> None:
    """Each mix's step by implementation; the floor as a bar across."""
    records = findings.of("step")
    names = [*dict.fromkeys(record["name"] for record in records)]
    for section in dict.fromkeys(record["section"] for record in records):
        own = [record for record in records if record["section"] == section]
        places = [names.index(record["name"]) for record in own]
        axes.errorbar(places, [r["seconds"] * 1e3 for r in own], _whiskers(own, 1e3), fmt="o",
                      label=section)  # fmt: skip
    for at, name in enumerate(names):
        least = findings.floor_of(next(r for r in records if r["name"] == name))
        if least:
            axes.plot([at - 0.3, at + 0.3], [least * 1e3] * 2, color="gray")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set(ylabel="decode step (ms)", xlabel="adapters x rank (gray: floor)", ylim=(0, None))
    axes.legend()


def _lora(axes: Axes, findings: Findings) -> None:
    _bandwidth(axes, findings, findings.of("lora"), "LoRA kernels")


def _attention(axes: Axes, findings: Findings) -> None:
    _bandwidth(axes, findings, findings.of("attention"), "attention kernel")


def _bandwidth(axes: Axes, findings: Findings, records: list[Record], what: str) -> None:
    """Rate over the bytes of one layer: small work is bound by launches, large by memory."""
    for batch in sorted({record["batch"] for record in records}):
        for implementation in dict.fromkeys(record["implementation"] for record in records):
            own = [r for r in records if (r["batch"], r["implementation"])
                   == (batch, implementation)]  # fmt: skip
            own.sort(key=lambda record: record["bytes"])
            sizes = [record["bytes"] / 1e6 for record in own]
            rates = [record["bytes"] / record["seconds"] / 1e9 for record in own]
            axes.plot(sizes, rates, "o-", markersize=3, label=f"{implementation}, {batch} rows")
    if findings.measured:
        copy = findings.measured.bandwidth / 1e9
        axes.axhline(copy, color="gray")
        axes.axhline(COPY_GOAL * copy, color="gray", linestyle=":")
    axes.set(xscale="log", xlabel="MB a layer", ylabel="GB/s", ylim=(0, None))
    axes.set_title(f"{what} (gray: copy; dotted: {COPY_GOAL:.0%} of it)")
    axes.legend(fontsize=6)


def _baselines(axes: Axes, findings: Findings) -> None:
    records = findings.of("baseline")
    points = [*dict.fromkeys((r["batch"], r["mix"]) for r in records)]
    names = [*dict.fromkeys(record["name"] for record in records)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = [record for record in records if record["name"] == name]
        at = [points.index((r["batch"], r["mix"])) + (i - len(names) / 2) * width for r in own]
        axes.bar(at, [record["seconds"] * 1e6 for record in own], width, label=name)
    axes.set_xticks(range(len(points)), [f"{b} rows, {mix}" for b, mix in points], rotation=30)
    axes.set(ylabel="LoRA of one layer (us)", yscale="log")
    axes.legend()


def _whiskers(records: list[Record], per: float) -> np.ndarray:
    below = [(record["seconds"] - record["low"]) * per for record in records]
    above = [(record["high"] - record["seconds"]) * per for record in records]
    return np.maximum(np.array([below, above]), 0)
