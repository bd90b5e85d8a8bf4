"""Tables of what `gpu_check` recorded; what was not measured does not appear, or is "-".

Floors are those of `jslora.bench.floor` at the ceilings measured on the same device in the same
run, never at a data sheet's. Host only: no jax.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jslora.bench import floor

Record = dict[str, Any]

STEP_GOALS = {8: 1.10, 32: 1.25}
"""Adapters of rank 16 at batch 64 and context 1,024: a step's time over that without LoRA."""
MIX_GOAL, COPY_GOAL = 1.15, 0.70
MEMORY_BOUND_BYTES = 20 * 10**6
"""What a layer's LoRA must move for its time to be the memory's, not that of its launches: about
what 8 adapters of rank 16 are in Llama-3-8B."""
SHEETS = {"H100": floor.H100, "H200": floor.H200}


@dataclass(frozen=True)
class Findings:
    """A document's records, by kind."""

    document: dict[str, Any]

    def of(self, kind: str, **wanted: Any) -> list[Record]:
        return [
            record for record in self.document["records"]
            if record["kind"] == kind and all(record.get(k) == v for k, v in wanted.items())
        ]  # fmt: skip

    @property
    def device(self) -> Record | None:
        return next(iter(self.of("device")), None)

    @property
    def measured(self) -> floor.Device | None:
        """The device by its measured ceilings."""
        ceilings = {record["what"]: record for record in self.of("ceiling")}
        if {"copy", "product"} - ceilings.keys():
            return None
        return floor.Device(
            "measured", ceilings["copy"]["bytes_per_second"],
            ceilings["product"]["flops_per_second"],
        )  # fmt: skip

    def floor_of(self, cost: Record) -> float | None:
        """Seconds that a cost takes at least."""
        device = self.measured
        return floor.Cost(cost["bytes"], cost["flops"]).seconds(device) if device else None

    @property
    def sound(self) -> bool:
        """Whether the chosen kernels were checked, nothing was wrong, and no section failed.

        A section that outstayed its time has not failed; what it recorded counts.
        """
        checked = self.of("correctness") + self.of("executable")
        crashed = [
            how for how in self.document["sections"].values()
            if how.get("code") and not how.get("killed")
        ]  # fmt: skip
        finite = all(record["rows"] == record["of"] for record in self.of("finite"))
        right = finite and all(record.get("ok", True) for record in checked)
        return right and not (crashed or self.of("failed") or self.unchecked)

    @property
    def unchecked(self) -> str | None:
        """The chosen kernels' check, if it was asked for and did not get through."""
        section = f"correctness:{self.device['lora']}" if self.device else ""
        if section not in self.document["sections"]:
            return None
        planned = self.planned("correctness", section)
        complete = planned is not None and len(self.of("correctness", section=section)) >= planned
        return None if complete else section

    def planned(self, what: str, section: str) -> int | None:
        """Points that a section set out to do; None if it did not come so far."""
        found = self.of("planned", what=what, section=section)
        return found[0]["points"] if found else None

    def points(self, what: str, section: str, done: int) -> str:
        """How many of a section's points were done, in words."""
        planned = self.planned(what, section)
        return f"{done} of {'?' if planned is None else planned} points"


def render(document: dict[str, Any]) -> str:
    """The whole report as text."""
    findings = Findings(document)
    parts: list[Callable[[Findings], list[str]]] = [
        _device, _correctness, _steps, _gaps, _lora, _attention, _baselines, _executable, _left_out,
    ]  # fmt: skip
    blocks = [part(findings) for part in parts]
    if document["tiny"]:
        blocks.insert(0, ["Tiny shapes: everything ran as it would, and no figure means anything."])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    cells = [list(titles), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *others])

    return [line(row) for row in cells]


def _device(findings: Findings) -> list[str]:
    device = findings.device
    if device is None:
        return ["Device: unknown; its section failed"]
    packages = ", ".join(f"{k} {v}" for k, v in device["packages"].items() if v)
    driver = (device["nvidia_smi"] or {}).get("driver_version", "-")
    return [
        f"{device['kind_of_device']} ({device['platform']}), driver {driver}",
        f"jslora {device['jslora']}, python {device['python']}, {packages}",
        f"kernels by default: lora {device['lora']}, attention {device['attention']}",
        *_ceilings(findings.measured, device["kind_of_device"]),
    ]


def _ceilings(measured: floor.Device | None, device: str) -> list[str]:
    if measured is None:
        return []
    copy, product = f"{measured.bandwidth / 1e9:,.0f}", f"{measured.flops / 1e12:,.0f}"
    lines = [f"copy {copy} GB/s, read plus written", f"bf16 product {product} TFLOP/s"]
    for name, sheet in SHEETS.items():
        if name in device:
            lines[0] += f" ({_share(measured.bandwidth, sheet.bandwidth)} of the data sheet)"
            lines[1] += f" ({_share(measured.flops, sheet.flops)} of the data sheet)"
    return lines


def _correctness(findings: Findings) -> list[str]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in findings.of("correctness"):
        key = f"{record['operation']}, {record['implementation']}", record["dtype"]
        groups.setdefault(key, []).append(record)
    rows = [
        (
            *key, f"{sum(r['ok'] for r in own)}/{len(own)}", _worst(own), f"{own[0]['limit']:.0e}",
        )
        for key, own in groups.items()
    ]  # fmt: skip
    titles = ("correct against float64", "dtype", "cases", "worst error", "limit")
    return [*(table(titles, rows) if rows else []), *_checked(findings), *_wrong(findings)]


def _worst(records: list[Record]) -> str:
    """The largest error; one that is no number is larger than any."""
    errors = [math.inf if r["error"] is None else r["error"] for r in records]
    return _error(max(errors))


def _error(error: float | None) -> str:
    return "no number" if error is None or math.isinf(error) else f"{error:.1e}"


def _checked(findings: Findings) -> list[str]:
    """How many cases each implementation was checked in."""
    lines = []
    for record in findings.of("planned", what="correctness"):
        done = len(findings.of("correctness", section=record["section"]))
        lines.append(f"{record['section']}: {done} of {record['points']} cases checked")
    if findings.unchecked:
        lines.append(f"NOT CHECKED: {findings.unchecked}: not all cases of the chosen kernels ran")
    return lines


def _wrong(findings: Findings) -> list[str]:
    """Everything that was found wrong, or could not be had, a line each."""
    lines = [
        f"WRONG: {r['operation']}, {r['implementation']}, {r['dtype']}, {r['case']}: "
        f"error {_error(r['error'])} {'; '.join(r['faults'])}"
        for r in findings.of("correctness", ok=False)
    ]
    for r in findings.of("finite"):
        if r["rows"] != r["of"]:
            lines.append(f"WRONG: {r['section']}: logits of {r['rows']} of {r['of']} rows finite")
    for r in findings.of("failed"):
        lines.append(f"FAILED: {r['section']}: {r['what']}: {_first_line(r['error'])}")
    for r in findings.of("unavailable"):
        lines.append(f"not available: {r['section']}: {r['reason']}")
    return lines


def _steps(findings: Findings) -> list[str]:
    lines: list[str] = []
    for section in dict.fromkeys(record["section"] for record in findings.of("step")):
        records = {r["name"]: r for r in findings.of("step", section=section)}
        head = next(iter(records.values()))
        titles = ("adapters x rank", "ms (low..high)", "floor ms", "of floor", "over off",
                  "floor's", "host-bound")  # fmt: skip
        lines += [
            *([""] if lines else []),
            f"Decode step ({section}): batch {head['batch']}, context {head['context']}, greedy "
            f"sampling included; lora {head['lora']}, attention {head['attention']}; each over "
            "the off that was timed beside it",
            *table(titles, [_step(findings, r) for r in records.values()]),
            *_step_goals(records),
        ]
    return lines


def _step(findings: Findings, record: Record) -> tuple[str, ...]:
    least, base = findings.floor_of(record), findings.floor_of(record["base"])
    over = _ratio(record["seconds"], record["off"])
    return (
        record["name"], _spread(record, 1e3), _number(least, 1e3),
        _share(least, record["seconds"]), over, _ratio(least, base), _host_bound(record),
    )  # fmt: skip


def _step_goals(records: dict[str, Record]) -> list[str]:
    """What the step had to hold, and whether it does."""
    lines = []
    for adapters, goal in STEP_GOALS.items():
        if record := records.get(f"{adapters} x 16"):
            ratio = record["seconds"] / record["off"]
            lines.append(_goal(f"{adapters} adapters of rank 16: {ratio:.3f} of off", ratio, goal))
    for record in records.values():
        if ratio := mix_ratio(record, records):
            what = f"{record['name']}: adds {ratio:.2f} of what its true ranks add alone"
            lines.append(_goal(what, ratio, MIX_GOAL))
    return lines


def mix_ratio(record: Record, records: dict[str, Record]) -> float | None:
    """What a mix adds to a step, over the mean of what each of its ranks adds for all rows."""
    ranks = record["ranks"]
    alone = [_added(records[name]) for name in _alone(record) if name in records]
    if len(ranks) < 2 or len(alone) < len(ranks) or sum(alone) <= 0:
        return None
    return _added(record) / (sum(alone) / len(alone))


def _added(record: Record) -> float:
    """Seconds over the step without LoRA that was timed beside it."""
    return record["seconds"] - record["off"]


def _alone(record: Record) -> list[str]:
    """The mixes of as many adapters that have each of its ranks alone."""
    return [f"{record['adapters']} x {rank}" for rank in record["ranks"]]


def _gaps(findings: Findings) -> list[str]:
    """Launches with command buffers and without; idle is the time between kernels."""
    rows = []
    for record in findings.of("gaps"):
        step = findings.of("step", section=record["section"], name=record["name"])
        told = [_number(record.get(name), 1e3) for name in ("span", "busy", "idle")]
        kernels = f"{record['kernels']:.0f}" if record["readable"] else "-"
        seconds = step[0]["seconds"] if step else None
        label = f"{record['section']}, {record['name']}"
        rows.append((label, _number(seconds, 1e3), kernels, *told))
    titles = ("launches (uncaptured: without command buffers)", "step ms", "kernels", "span ms",
              "busy ms", "idle ms")  # fmt: skip
    return table(titles, rows) if rows else []


def _lora(findings: Findings) -> list[str]:
    lines = _kernels(findings, "lora", lambda r: f"batch {r['batch']}, {r['mix']}")
    return lines + _copy_goals(findings)


def _copy_goals(findings: Findings) -> list[str]:
    """What the kernels had to reach of the copy, where the floor is the memory's."""
    device, lines = findings.measured, []
    if device is None:
        return []
    for section in dict.fromkeys(r["section"] for r in findings.of("lora")):
        records = findings.of("lora", section=section)
        shares = {
            f"batch {r['batch']}, {r['mix']}": r["bytes"] / r["seconds"] / device.bandwidth
            for r in records
            if r["bytes"] >= MEMORY_BOUND_BYTES
            and r["bytes"] / device.bandwidth >= r["flops"] / device.flops
        }
        points = findings.points("lora", section, len(records))
        if shares:
            where = min(shares, key=shares.__getitem__)
            what = (
                f"{section}: {shares[where]:.2f} of the copy at {where}, the least of the "
                f"{len(shares)} that move {MEMORY_BOUND_BYTES / 1e6:.0f} MB; {points}"
            )
            lines.append(_goal(what, shares[where], COPY_GOAL, least=True))
    return lines


def _attention(findings: Findings) -> list[str]:
    return _kernels(findings, "attention", lambda r: f"batch {r['batch']}, context {r['context']}")


def _kernels(findings: Findings, kind: str, point: Callable[[Record], str]) -> list[str]:
    rows = [
        (f"{r['implementation']}, {point(r)}", *_kernel(findings, r)) for r in findings.of(kind)
    ]
    return table((f"{kind} kernels, one layer", *_KERNEL_TITLES), rows) if rows else []


_KERNEL_TITLES = ("us (low..high)", "MB", "GB/s", "of copy", "of floor", "host-bound")


def _kernel(findings: Findings, record: Record) -> tuple[str, ...]:
    rate, measured = record["bytes"] / record["seconds"], findings.measured
    return (
        _spread(record, 1e6), f"{record['bytes'] / 1e6:.1f}", f"{rate / 1e9:,.0f}",
        _share(rate, measured.bandwidth if measured else None),
        _share(findings.floor_of(record), record["seconds"]),
        _host_bound(record),
    )  # fmt: skip


def _baselines(findings: Findings) -> list[str]:
    records = findings.of("baseline")
    names = [*dict.fromkeys(r["name"] for r in records)]
    rows, ahead = [], {}
    for batch, mix in dict.fromkeys((r["batch"], r["mix"]) for r in records):
        own = {r["name"]: r["seconds"] for r in findings.of("baseline", batch=batch, mix=mix)}
        if not {"jslora", "merged"} < own.keys():  # cut off when the time was over
            continue
        others = [seconds for name, seconds in own.items() if name not in ("jslora", "merged")]
        point, ours, base = f"batch {batch}, {mix}", own["jslora"], own["merged"]
        ahead[point] = min(others) / ours
        times = (_number(own.get(name), 1e6) for name in names)
        rows.append((point, *times, f"{ahead[point]:.3f}", _ratio(base + ours, base)))
    if not rows:
        return []
    worst = min(ahead, key=ahead.__getitem__)
    points = findings.points("baseline", records[0]["section"], len(rows))
    return [
        *table(("us a layer", *names, "best other/ours", "base + ours/merged"), rows),
        "merged: the base products alone, for one adapter at a time; the others come in addition",
        _goal(f"best other over ours {ahead[worst]:.3f} at {worst}, the least; {points}",
              ahead[worst], 1.0, least=True),
    ]  # fmt: skip


def _executable(findings: Findings) -> list[str]:
    records = findings.of("executable")
    if not records:
        return []
    last: Record = {}
    for record in records:
        last |= record
    if not last["found"]:
        return [f"Executable compiled without a GPU: none at {last['path']}"]
    says = "runs" if last.get("ran") else "was loaded, and did not run"
    if "ok" in last:
        right = "and computes the same" if last["ok"] else "and computes SOMETHING ELSE"
        says += f" {right} (error {_error(last['error'])}, limit {last['limit']:.0e})"
    return [f"Executable compiled without a GPU, by jax {last['jax']} for {last['device']}: {says}"]


def _left_out(findings: Findings) -> list[str]:
    lines = [
        f"{record['section']}: no time for {'; '.join(record['points'])}"
        for record in findings.of("skipped")
    ]
    for section, how in findings.document["sections"].items():
        if how.get("skipped"):
            lines.append(f"{section}: skipped, too little time left")
        elif how.get("killed"):
            lines.append(f"{section}: out of time, killed after {how['seconds']} s")
        elif how.get("code"):
            lines.append(f"{section}: ended with code {how['code']}; see the log")
    return ["Left out:", *lines] if lines else []


def _goal(what: str, value: float, goal: float, *, least: bool = False) -> str:
    holds = value >= goal if least else value <= goal
    return (
        f"{'holds' if holds else 'MISSED'}: {what} (at {'least' if least else 'most'} {goal:.2f})"
    )


def _first_line(text: str) -> str:
    return text.splitlines()[0][:300] if text else ""


def _spread(record: Record, per: float) -> str:
    low, middle, high = (f"{record[k] * per:.4g}" for k in ("low", "seconds", "high"))
    return f"{middle} ({low}..{high})"


def _host_bound(record: Record) -> str:
    return "yes" if record["host_bound"] else ""


def _number(value: float | None, per: float = 1) -> str:
    return "-" if value is None else f"{value * per:.4g}"


def _share(part: float | None, of: float | None) -> str:
    return "-" if part is None or not of else f"{part / of:.0%}"


def _ratio(value: float | None, over: float | None) -> str:
    return "-" if value is None or not over else f"{value / over:.3f}"
