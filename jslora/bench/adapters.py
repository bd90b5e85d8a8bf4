"""Run the conditions of `bench.conditions` in turn against one server, started for it.

Invariants: before a slice its adapters are brought to the device as far as they fit, and every
adapter has been packed into the server's cache before the first; neither is measured. Slices of one
block draw models by the same seed. No two slices send the same prompts, or the prefix cache would
know them. A probe's requests are no part of its slice's run. Host only: no jax.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from jslora.adapters.synthetic import make_adapters
from jslora.bench.client import Client, Load, Record, Run, Target, drive, warm_up
from jslora.bench.conditions import Experiment, Plan, Probe, Site, Turn, room, turns
from jslora.bench.server import Control, serving
from jslora.bench.workload import Job, Spec, generate
from jslora.config import EngineConfig
from jslora.errors import ConfigError, Unavailable
from jslora.fetch import load_config, resolve
from jslora.model.config import MODULES, from_hf
from jslora.progress import Progress

# More than fit on the device, so that asking for them in turn always loads.
WIDE = 32
SPARE = 8
WIDE_FOLDER = "wide"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one turn brought.

    Attributes:
        adapters: models drawn from.
        room: adapters that fit on the device.
        probes: the probes' requests.
        failures: what went wrong with load and unload calls.
        loads, evictions, preemptions: of the engine meanwhile.
    """

    experiment: Experiment
    block: int
    condition: str
    adapters: int
    room: int
    run: Run
    probes: tuple[Record, ...]
    failures: tuple[str, ...]
    loads: int
    evictions: int
    preemptions: int


async def measure_adapters(
    command: Sequence[str],
    config: EngineConfig,
    plan: Plan,
    progress: Progress,
    ended: Callable[[Slice], None],
) -> None:
    """Start the server that `command` starts with `config`, and run the whole plan against it.

    Args:
        ended: told of each slice when it is over, so that nothing measured is lost by a failure.

    Raises:
        ConfigError: the configuration does not fit the plan.
        Unavailable: the server cannot be started or fails.
    """
    _make_wide_adapters(config, plan.load_rank, progress)
    async with (
        serving(command) as url,
        Client(Target(url=url, ignore_eos=True)) as client,
        Control(url) as control,
    ):
        site = await _prepare(client, control, config, plan, progress)
        order, bench = turns(plan, site), Bench(plan, site, client, control)
        total, done = sum(turn.condition.requests for turn in order), count(1)
        for turn in order:
            note = f"{turn.experiment} {turn.block + 1}: {turn.condition.name}"

            def answered(record: Record, note: str = note) -> None:
                progress("measuring", next(done), total, note)

            ended(await bench.measure(turn, answered))


def _make_wide_adapters(config: EngineConfig, rank: int, progress: Progress) -> None:
    """Write the adapters that probes load, deeper below the root than the server looks itself."""
    if not config.adapters.roots:
        raise ConfigError("adapters.roots is empty; the adapters to be loaded are made there")
    if config.model.source == "dummy":
        model = from_hf(config.model.architecture or {})
    else:
        model = load_config(resolve(config.model.source, config.cache_dir, progress))
    make_adapters(
        config.adapters.roots[0] / WIDE_FOLDER / f"rank-{rank}",
        model,
        count=WIDE + SPARE,
        ranks=[rank],
        targets=[MODULES],
        dtype="bfloat16",
        base_name=config.model.served_name,
        progress=progress,
    )


async def _prepare(
    client: Client, control: Control, config: EngineConfig, plan: Plan, progress: Progress
) -> Site:
    """Register the adapters of the probes, and have every adapter packed."""
    found = await control.adapters()
    if not found:
        raise ConfigError("the configuration has no adapters")
    folders = [f"{WIDE_FOLDER}/rank-{plan.load_rank}/adapter-{i:03d}" for i in range(WIDE + SPARE)]
    names = [f"wide-{i:03d}" for i in range(WIDE + SPARE)]
    for i, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
        await control.load(name, folder)
        progress("loading wide adapters", i, len(names), name)
    for name in names[WIDE:]:
        await control.unload(name)
    unpacked = [adapter.name for adapter in found if not adapter.bytes_disk]
    for at in range(0, len(unpacked), plan.streams):
        await touch(client, unpacked[at : at + plan.streams], plan.streams)
        done = min(at + plan.streams, len(unpacked))
        progress("packing adapters", done, len(unpacked), unpacked[at])
    counters = await control.counters()
    return Site(
        base=config.model.served_name,
        adapters=tuple(adapter.name for adapter in found),
        room=room(
            plan,
            pages=counters.pages,
            page_size=counters.page_size,
            adapter_pages=max(adapter.pages for adapter in found),
        ),
        wide=tuple(names[:WIDE]),
        spare=tuple(folders[WIDE:]),
    )


async def touch(client: Client, models: Sequence[str], streams: int) -> None:
    """Bring adapters to the device, by the smallest of requests."""
    spec = Spec(models=tuple(models), input_tokens=1, output_tokens=1)
    await warm_up(client, spec, len(models), streams)


class Bench:
    """Measures one turn after another."""

    def __init__(self, plan: Plan, site: Site, client: Client, control: Control) -> None:
        self._plan = plan
        self._site = site
        self._client = client
        self._control = control
        self._runs = count(1)
        self._probes = count()

    async def measure(self, turn: Turn, answered: Callable[[Record], None]) -> Slice:
        """Run a turn; `answered` sees each of its requests.

        Raises:
            Unavailable: the server cannot be asked for its counters, or cannot warm up.
        """
        condition, plan, site = turn.condition, self._plan, self._site
        await touch(self._client, condition.models[: max(1, site.room)], plan.streams)
        if condition.probe == "resident":
            await touch(self._client, site.wide[:1], plan.streams)
        prober = Prober(self._client, self._control, site, plan, self._probes)
        before = await self._control.counters()
        run = await self._run(turn, prober, answered)
        after = await self._control.counters()
        return Slice(
            experiment=turn.experiment,
            block=turn.block,
            condition=condition.name,
            adapters=len(condition.models),
            room=site.room,
            run=run,
            probes=tuple(prober.records),
            failures=tuple(prober.failures),
            loads=after.loads - before.loads,
            evictions=after.evictions - before.evictions,
            preemptions=after.preemptions - before.preemptions,
        )

    async def _run(self, turn: Turn, prober: "Prober", answered: Callable[[Record], None]) -> Run:
        condition = turn.condition
        spec = Spec(
            models=condition.models,
            assignment="random",
            input_tokens=condition.input_tokens,
            output_tokens=condition.output_tokens,
            seed=self._plan.seed + turn.block,
        )
        jobs = generate(spec, next(self._runs))
        load = Load(concurrency=condition.streams, requests=condition.requests)
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            if condition.probe is not None:
                group.create_task(prober.run(condition.probe, over))
            run = await drive(self._client, jobs, load, answered)
            over.set()
        return run


@dataclass(slots=True)
class Prober:
    """Sends probes of one kind at the plan's rate, whatever is in flight.

    Attributes:
        numbers: one for each probe, never the same twice.
    """

    client: Client
    control: Control
    site: Site
    plan: Plan
    numbers: Iterator[int]
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def run(self, kind: Probe, over: asyncio.Event) -> None:
        """Send until `over`, then wait for the last."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        async with asyncio.TaskGroup() as group:
            for sent in count(1):
                group.create_task(self._send(kind, next(self.numbers)))
                with suppress(TimeoutError):
                    due = begin + sent / self.plan.load_rate
                    await asyncio.wait_for(over.wait(), max(due - clock(), 0.0))
                if over.is_set():
                    return

    async def _send(self, kind: Probe, number: int) -> None:
        first, *others = self.site.wide
        match kind:
            case "resident":
                await self._ask(first, number)
            case "absent":
                await self._ask(others[number % len(others)], number)
            case "called":
                await self._load(number)

    async def _load(self, number: int) -> None:
        name = f"called-{number}"
        try:
            await self.control.load(name, self.site.spare[number % len(self.site.spare)])
            await self._ask(name, number)
            await self.control.unload(name)
        except Unavailable as error:
            self.failures.append(error.message)

    async def _ask(self, model: str, number: int) -> None:
        # A prompt of one token is one more row of a decoding step: as little as a request can cost.
        job = Job(index=number, arrival=0.0, model=model, prompt=(1,), output_tokens=1)
        self.records.append(await self.client.send(job, 0.0, None))


def server_command(python: str, script: Path, config: Path, overrides: Sequence[str]) -> list[str]:
    """The command that starts the server to be measured, on a free port."""
    settings = [*overrides, "server.port=0", "server.host=127.0.0.1", "logging.level=warning"]
    command = [python, str(script), "--config", str(config)]
    return command + [part for setting in settings for part in ("--set", setting)]
