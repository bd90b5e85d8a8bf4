"""What is compared to learn what many adapters cost, and in which order it runs; nothing is sent.

Machines are noisy for minutes, so only slices of one server's life that stand close together are
compared. An experiment is a set of conditions; a block runs each of them once, on requests of the
same lengths and draws, in an order that turns round from block to block, so that a machine's drift
falls on all alike.

  room   as many adapters as fit on the device, against twice as many and against all of them
  loads  a few adapters' long answers while others are loaded so many times a second, by requests
         of one token for adapters that are not on the device ("absent"), or by load and unload
         calls with such a request between ("called"); against no probes at all, and requests for
         one that is there ("resident"), which cost what the request costs without its load. Not
         all rows are taken, so that probes need not wait for one, and there is no prefill but that
         of short prompts at the start, so that gaps are those of decoding
  sweep  ever more adapters, past the number where the room ends
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jslora.errors import ConfigError

Experiment = Literal["room", "loads", "sweep"]
Probe = Literal["resident", "absent", "called"]

SWEEP = (1, 2, 5, 10, 20, 50, 90, 100, 110, 150, 200, 500, 1000, 2000)
FEW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        blocks: of each experiment, in this order; 0 leaves it out.
        streams: requests in flight; in "loads" three quarters of it.
        requests: of one slice; in "loads" one a stream.
        input_tokens: of one request; in "loads" a quarter of it.
        output_tokens: of one request; in "loads" as many as a stream has in a slice elsewhere.
        sweep: numbers of adapters.
        load_rate: probes a second.
        load_rank: rank of what they load, in all linear layers.

    Raises:
        ConfigError: a value is out of its range.
    """

    blocks: dict[Experiment, int]
    streams: int = 16
    requests: int = 64
    input_tokens: int = 64
    output_tokens: int = 64
    sweep: tuple[int, ...] = SWEEP
    load_rate: float = 2.0
    load_rank: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("streams", "requests", "input_tokens", "output_tokens", "load_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if min(self.blocks.values()) < 0 or not any(self.blocks.values()):
            raise ConfigError(f"blocks are {self.blocks}; none may be negative, nor all 0")
        if not self.sweep or min(self.sweep) < 1:
            raise ConfigError(f"the sweep is over {list(self.sweep)}; each number is at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is measured.

    Attributes:
        base: the base model's name.
        adapters: those of the working sets, all of one size.
        room: how many of them fit on the device when every row has its full length.
        wide: adapters that probes ask for in turn, more than fit; the first is the resident one.
        spare: folders below the server's roots that load calls name.
    """

    base: str
    adapters: tuple[str, ...]
    room: int
    wide: tuple[str, ...]
    spare: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What one slice runs: models drawn alike often, and perhaps probes beside them."""

    name: str
    models: tuple[str, ...]
    streams: int
    requests: int
    input_tokens: int
    output_tokens: int
    probe: Probe | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One condition's place in the order of measuring."""

    experiment: Experiment
    block: int
    condition: Condition


def room(plan: Plan, *, pages: int, page_size: int, adapter_pages: int) -> int:
    """How many adapters fit in a pool of `pages` when every row has its full length."""
    row = -(-(plan.input_tokens + plan.output_tokens) // page_size)
    null = 1
    return max(0, pages - null - plan.streams * row) // adapter_pages


def turns(plan: Plan, site: Site) -> list[Turn]:
    """The whole measurement in its order: every experiment's blocks, there and back again.

    Raises:
        ConfigError: the server has too few adapters for it, or too little or too much room.
    """
    found = []
    for experiment, blocks in plan.blocks.items():
        there = list(_conditions(experiment, plan, site)) if blocks else []
        for block in range(blocks):
            order = there if block % 2 == 0 else there[::-1]
            found += [Turn(experiment=experiment, block=block, condition=each) for each in order]
    return found


def _conditions(experiment: Experiment, plan: Plan, site: Site) -> Iterator[Condition]:
    match experiment:
        case "room":
            sizes = {"fits": site.room, "twice": 2 * site.room, "all": len(site.adapters)}
            if site.room < 1:
                raise ConfigError("no adapter fits on the device beside the rows: set pool.pages")
        case "sweep":
            sizes = {str(size): size for size in plan.sweep}
        case "loads":
            yield from _loads(plan, site)
            return
    if max(sizes.values()) > len(site.adapters):
        raise ConfigError(
            f"{experiment}: {max(sizes.values())} adapters are needed for it, "
            f"{len(site.adapters)} are registered, {site.room} fit on the device"
        )
    for name, size in sizes.items():
        yield Condition(
            name=name,
            models=site.adapters[:size],
            streams=plan.streams,
            requests=plan.requests,
            input_tokens=plan.input_tokens,
            output_tokens=plan.output_tokens,
        )


def _loads(plan: Plan, site: Site) -> Iterator[Condition]:
    streams = plan.streams - plan.streams // 4
    probes: tuple[Probe | None, ...] = (None, "resident", "absent", "called")
    for probe in probes:
        yield Condition(
            name=probe or "no probes",
            models=(site.base, *site.adapters[: FEW - 1]),
            streams=streams,
            requests=streams,
            input_tokens=max(1, plan.input_tokens // 4),
            output_tokens=max(1, plan.output_tokens * plan.requests // plan.streams),
            probe=probe,
        )
