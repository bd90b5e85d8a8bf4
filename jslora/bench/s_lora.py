"""S-LoRA's experiments: what it measured, and the same settings as arguments of a simulation.

The figures in `s_lora.tsv` are those of the result files in its repository. Sizes of pools, shares
of the split pools and adapters' ranks are those it ran with; a page here holds 16 of its slots.
Host only: no jax.

What is not as it was: S-LoRA runs prefills alone, looks for new requests after every tenth decoding
step only, and brings adapters just before they run, while nothing else does; the scheduler here
fills every step and transfers meanwhile. Of its pools without unified memory only the slots of KV
are known; here the adapters have the rest of the unified pool. Its test of admission takes the
adapters in use off the slots of KV, unified or not, and so does the one here.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from jslora.bench.hardware import HARDWARE, LLAMA_7B, LLAMA_13B
from jslora.bench.simulate import Machine
from jslora.bench.steptime import Parts, Roofline, Shares
from jslora.bench.synthetic_store import BASE, Ranks
from jslora.bench.traces import RANKS, slora
from jslora.bench.workload import Trace
from jslora.schedule.settings import SchedulerSection

PAGE = 16
SLO = 6.0

MODELS = {"S1": LLAMA_7B, "S2": LLAMA_7B, "S4": LLAMA_13B}

SLOTS = {
    ("a10g", "S1"): 14500, ("a10g", "S2"): 14500, ("a100-40", "S2"): 14000,
    ("a100-40", "S4"): 14000, ("a100-80", "S1"): 125000, ("a100-80", "S2"): 125000,
    ("a100-80", "S4"): 65000,
}  # fmt: skip
"""Slots of the unified pool; those of S2 on 40 GB are not recorded, S4's are taken."""

SPLIT = {
    ("a10g", "S2"): ((50, 9000), (20, 10000), (0, 13500)),
    ("a100-40", "S4"): ((20, 9000), (0, 14000)),
    ("a100-80", "S2"): ((100, 90000), (50, 100000), (20, 110000), (0, 125000)),
    ("a100-80", "S4"): ((200, 35000), (100, 40000), (0, 65000)),
}
"""(adapters, slots of KV from so many on) without unified memory."""

FILE = Path(__file__).with_name("s_lora.tsv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A run in S-LoRA's terms: requests/s; means of seconds; means over all requests; a count."""

    throughput: float
    latency: float
    ttft: float
    satisfaction: float
    attainment: float
    aborted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One of S-LoRA's runs.

    Attributes:
        table: what it is a row of, see `TABLES`.
        variant: "s-lora" (first come first served); "lifo", the newest first; "abort"; "cluster d",
            d adapters at a time; "split", without unified memory.
    """

    table: str
    device: str
    setting: str
    variant: str
    adapters: int
    alpha: float
    rate: float
    cv: float
    duration: float
    figures: Figures

    @property
    def slots(self) -> int:
        return SLOTS[self.device, self.setting]

    @property
    def group(self) -> str:
        """The table it stands in."""
        return f"{self.table}/{self.device}/{self.setting}"

    @property
    def name(self) -> str:
        """What tells it from the others of its table."""
        numbers = f"n={self.adapters} alpha={self.alpha:g} R={self.rate:g} cv={self.cv:g}"
        return f"{self.variant}, {numbers}"

    @property
    def run(self) -> str:
        """Equal for rows that are the same run in several tables."""
        return f"{self.device}/{self.setting}/{self.name} {self.duration:g} s"


def load(path: Path = FILE) -> tuple[Row, ...]:
    """All published rows."""
    with path.open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return tuple(_row(line) for line in csv.DictReader(lines, delimiter="\t"))


def _row(line: dict[str, str]) -> Row:
    figures = {name: line[name] for name in Figures.__dataclass_fields__}
    rest = {name: line[name] for name in Row.__dataclass_fields__ if name != "figures"}
    return msgspec.convert(rest | {"figures": figures}, Row, strict=False)


def names(adapters: int) -> tuple[str, ...]:
    """The adapters' names, in order; the base model's where there are none."""
    return tuple(f"adapter-{i:04}" for i in range(adapters)) or (BASE,)


def ranks(setting: str, adapters: int) -> dict[str, Ranks]:
    """Each adapter's ranks: those of the setting in turn."""
    return in_turn(RANKS[setting], names(adapters))


def in_turn(kinds: Sequence[int], names: Sequence[str]) -> dict[str, Ranks]:
    """Adapters of these ranks in turn, on q, k, v and o; the base model is none."""
    adapters = [name for name in names if name != BASE]
    return {name: (kinds[i % len(kinds)],) * 4 + (0, 0, 0) for i, name in enumerate(adapters)}


def trace(row: Row, seed: int = 42) -> Trace:
    """The requests of a run; 42 is the seed that S-LoRA used."""
    return slora(
        models=names(row.adapters), rate=row.rate, duration=row.duration, alpha=row.alpha,
        cv=row.cv, seed=seed,
    )  # fmt: skip


def machine(row: Row, shares: Shares | None = None) -> Machine:
    """The device, model, pool and adapters of a run; by default with the shares that were found."""
    model, hardware, adapter_pages = MODELS[row.setting], HARDWARE[row.device], None
    if row.variant == "split" and row.adapters:
        kv = next(slots for least, slots in SPLIT[row.device, row.setting] if row.adapters >= least)
        adapter_pages = max(row.slots - kv, 4 * max(RANKS[row.setting])) // PAGE
    return Machine(
        model=model,
        step_time=(
            Roofline(Parts(model), hardware.device, shares) if shares else hardware.step_time(model)
        ),
        pages=row.slots // PAGE + 1,
        adapters=ranks(row.setting, row.adapters),
        page_size=PAGE,
        transfer=hardware.transfer,
        adapter_pages=adapter_pages,
        writes=_ALL,
        prefix_cache=False,
    )


def section(row: Row) -> SchedulerSection:
    """The scheduler of a run: one of S-LoRA's policies, and its admission by declared lengths."""
    options: dict[str, Any] = {}
    match row.variant.split():
        case ["lifo"]:
            options = {"policy": ["newest"], "starvation_seconds": _NEVER}
        case ["abort"]:
            options = {"policy": ["slo"], "ttft_slo": SLO}
        case ["cluster", most]:
            options = {
                "policy": ["cluster", "fcfs"],
                "cluster_fraction": cluster_fraction(row, int(most)),
                "starvation_seconds": _NEVER,
            }
    return limits(row.slots, **options)


_NEVER = 1e6
_ALL = 2**20  # a whole load waits for nothing


def limits(slots: int, **options: Any) -> SchedulerSection:
    """S-LoRA's limits on a step and its queue, beside other options."""
    return SchedulerSection(
        max_running=1000, max_step_tokens=max(slots // 6, 3072), max_queued=2**20,
        max_queued_tokens=2**30, reserve="declared", **options,
    )  # fmt: skip


def cluster_fraction(row: Row, most: int) -> float:
    """The share of the pool that so many adapters of mean rank take."""
    kinds: Sequence[int] = RANKS[row.setting]
    return min(1.0, most * 4 * sum(kinds) / len(kinds) / row.slots)
