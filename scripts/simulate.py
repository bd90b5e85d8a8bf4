"""Simulate the scheduler on a virtual clock: a workload, under one policy stack or several.

Exit codes: 0 simulated, 2 wrong arguments, 130 interrupted.
"""

import argparse
import contextlib
import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jslora.bench import s_lora, tables, trace_file
from jslora.bench.calibrate import FITTED, fit_device
from jslora.bench.experiment import Task, deviation, mean, run_all
from jslora.bench.hardware import HARDWARE, MODELS
from jslora.bench.outcomes import Summary, as_json
from jslora.bench.report import save
from jslora.bench.simulate import Machine, Simulated
from jslora.bench.steptime import load_steps
from jslora.bench.synthetic_store import HostTier, Ranks
from jslora.bench.traces import RANKS, slora
from jslora.bench.workload import Trace
from jslora.errors import ConfigError, JsloraError
from jslora.schedule.settings import SchedulerSection
from jslora.schedule.stack import NAMES
from jslora.server.bars import Bars

EXAMPLES = """\
S-LoRA's policies and some stacks of ours at twice the load that an A10G can bear
  simulate.py --policy fcfs --policy newest --policy slo --policy cluster,shortest,slo --rate 3.2
Attainment against the rate, on five seeds
  simulate.py --policy fcfs --policy slo --sweep rate=1,1.5,2,2.5,3 --seeds 1,2,3,4,5 --plot p.png
A recorded trace on an H100 whose steps take twice the least time
  simulate.py --trace requests.jsonl --device h100 --model llama3-8b --floor 2 --policy fair_tenants
S-LoRA's published tables beside simulated ones
  simulate.py --tables
  simulate.py --tables 'cv/*' 'cluster/a100-40/S4' --jobs 8
The numbers that these rest on, found anew
  simulate.py --fit a10g
"""

QUICK = ("adapters/a10g/*", "rate/a10g/*", "cv/a10g/S2", "alpha/*", "cluster/*", "table3/*/S2")
"""Tables that take minutes, not tens of them."""

SWEPT = ("rate", "cv", "alpha", "adapters")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="simulate.py",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_workload(parser.add_argument_group("workload"))
    _add_machine(parser.add_argument_group("machine"))
    _add_scheduler(parser.add_argument_group("scheduler", f"policies: {', '.join(NAMES)}"))
    add = parser.add_argument_group("output").add_argument
    add("--tables", nargs="*", metavar="T", help="S-LoRA's beside simulated ones; default: quick")
    add("--fit", choices=FITTED, help="find a device's numbers anew, from two of S-LoRA's runs")
    add("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    add("--json", type=Path, metavar="F", help="write all numbers")
    add("--plot", type=Path, metavar="F", help="draw the sweep, TTFT and tenants")
    return parser.parse_args(arguments)


def _add_workload(group: Any) -> None:
    add = group.add_argument
    add("--trace", type=Path, metavar="F", help="JSONL, such as make_trace.py writes")
    add("--setting", choices=s_lora.MODELS, default="S2", help="S-LoRA's model and ranks (S2)")
    add("--adapters", type=int, default=200, metavar="N", help="(200); 0: the base model alone")
    add("--rate", type=float, default=2.0, metavar="R", help="requests a second (2)")
    add("--cv", type=float, default=1.0, metavar="C", help="coefficient of variation of gaps (1)")
    add("--alpha", type=float, default=1.0, metavar="A", help="popularity (1, which is uniform)")
    add("--duration", type=float, default=300.0, metavar="S", help="seconds (300)")
    add("--seeds", type=_integers, default=(42,), metavar="A,B", help="a run each; shown are means")
    add("--sweep", type=_sweep, metavar="X=A,B", help=f"X of {', '.join(SWEPT)}: a run for each")


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--device", choices=HARDWARE, default="a10g", help="(a10g)")
    add("--model", choices=MODELS, help="default: the setting's")
    add("--ranks", type=_integers, metavar="A,B", help="of adapters in turn (the setting's)")
    times = group.add_mutually_exclusive_group()
    times.add_argument("--floor", type=float, metavar="X", help="steps take X times the least time")
    times.add_argument("--steps", type=Path, metavar="F", help="JSON of measured steps, to fit")
    add("--pages", type=int, metavar="N", help="of the pool; default: S-LoRA's, or what fits")
    add("--split", type=int, metavar="N", help="pages of it for adapters alone, the others for KV")
    add("--transfer", type=float, metavar="X", help="bytes/s to the device")
    add("--host-bytes", type=int, metavar="N", help="of adapters in host memory; default: all")
    add("--disk", type=float, default=2e9, metavar="X", help="bytes/s, for the others (2e9)")
    add("--max-tokens", type=int, metavar="N", help="that requests declare; default: true lengths")
    add("--prefix-cache", action="store_true", help="find equal beginnings of prompts again")


def _add_scheduler(group: Any) -> None:
    add = group.add_argument
    add("--policy", action="append", metavar="A,B", help="a stack; repeat to compare (fcfs)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        help="an option of the scheduler section",
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _sweep(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    if name not in SWEPT or not values:
        raise argparse.ArgumentTypeError(f"{text!r}; expected is X=A,B with X of {SWEPT}")
    return name, tuple(float(value) for value in values.split(","))


def make_trace(args: argparse.Namespace, seed: int) -> Trace:
    """The requests that the arguments describe."""
    if args.trace is not None:
        return trace_file.load(args.trace, seed=seed)
    return slora(
        models=s_lora.names(args.adapters), rate=args.rate, duration=args.duration,
        alpha=args.alpha, cv=args.cv, seed=seed,
    )  # fmt: skip


def make_machine(args: argparse.Namespace) -> Machine:
    """The machine that the arguments describe."""
    hardware = HARDWARE[args.device]
    model = MODELS[args.model] if args.model else s_lora.MODELS[args.setting]
    if args.steps is not None:
        step_time: Any = load_steps(args.steps)
    else:
        step_time = hardware.step_time(model, args.floor)
    slots = s_lora.SLOTS.get((args.device, args.setting)) if args.model is None else None
    pages = hardware.pages(model, s_lora.PAGE) if slots is None else slots // s_lora.PAGE + 1
    host = HostTier(args.host_bytes, 0.0, args.disk) if args.host_bytes is not None else None
    return Machine(
        model=model,
        step_time=step_time,
        pages=args.pages or pages,
        adapters=make_adapters(args),
        page_size=s_lora.PAGE,
        transfer=args.transfer or hardware.transfer,
        host=host,
        adapter_pages=args.split,
        declared=args.max_tokens,
        prefix_cache=args.prefix_cache,
    )


def make_adapters(args: argparse.Namespace) -> dict[str, Ranks]:
    """Each adapter's ranks."""
    names = s_lora.names(args.adapters)
    if args.trace is not None:
        names = tuple(dict.fromkeys(job.model for job in make_trace(args, args.seeds[0])))
    return s_lora.in_turn(args.ranks or RANKS[args.setting], names)


def make_section(args: argparse.Namespace, stack: str, pages: int) -> SchedulerSection:
    """S-LoRA's limits, this stack, and what `--set` gives.

    Raises:
        ConfigError: an option is unknown or out of its range.
    """
    options = s_lora.limits(pages * s_lora.PAGE).model_dump() | {"policy": stack.split(",")}
    for text in args.set:
        name, _, value = text.partition("=")
        options[name] = yaml.safe_load(value)
    try:
        return SchedulerSection(**options)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"scheduler.{where} of stack {stack}: {first['msg']}") from None


Key = tuple[str, float, int]


def make_tasks(args: argparse.Namespace) -> dict[Key, Task]:
    """A run for each stack, swept value and seed."""
    parameter, values = args.sweep or ("rate", (args.rate,))
    tasks: dict[Key, Task] = {}
    for stack, value, seed in product(args.policy or ["fcfs"], values, args.seeds):
        own = argparse.Namespace(**vars(args) | {parameter: _like(parameter, value)})
        machine = make_machine(own)
        section = make_section(own, stack, machine.pages)
        tasks[stack, value, seed] = Task(
            trace=partial(make_trace, own, seed), machine=machine, section=section,
            slo=section.ttft_slo, rate=None if args.trace else own.rate,
        )  # fmt: skip
    return tasks


def _like(parameter: str, value: float) -> float | int:
    return int(value) if parameter == "adapters" else value


def compare_stacks(args: argparse.Namespace, bars: Bars) -> None:
    """Run what the arguments ask for; print tables, write files."""
    tasks = make_tasks(args)
    runs = run_all(tasks, args.jobs, bars)
    bars.close()
    found = {key: tasks[key].summarize(run) for key, run in runs.items()}
    seeds = args.seeds
    groups = dict.fromkeys((stack, value) for stack, value, _ in tasks)
    means = {g: mean([found[*g, seed] for seed in seeds]) for g in groups}
    spreads = {g: deviation([found[*g, seed] for seed in seeds]) for g in groups if seeds[1:]}
    for value in dict.fromkeys(value for _, value in groups):
        title = f"{args.sweep[0]} = {value:g}" if args.sweep else ""
        _print(title, {stack: means[stack, v] for stack, v in groups if v == value})
        if spreads:
            deviations = {stack: spreads[stack, v] for stack, v in groups if v == value}
            _print(f"standard deviation over {len(seeds)} seeds", deviations)
    if args.json:
        named = {f"{stack} {value:g} seed {seed}": s for (stack, value, seed), s in found.items()}
        save(args.json, as_json(named, conditions(args)))
    if args.plot:
        _plot(args, means, runs)


def _print(title: str, rows: Mapping[str, Summary]) -> None:
    print(f"\n{title}\n" if title else "")
    print(tables.table(rows))


def _plot(
    args: argparse.Namespace, means: Mapping[tuple[str, float], Summary],
    runs: Mapping[Key, Simulated],
) -> None:  # fmt: skip
    from jslora.bench.policy_plot import draw

    sweep: dict[str, dict[float, Summary]] = {}
    for (stack, value), summary in means.items() if args.sweep else ():
        sweep.setdefault(stack, {})[value] = summary
    last = [*means][-1][1]
    shown = {s: runs[s, last, args.seeds[0]].outcomes for s, value in means if value == last}
    save(args.plot, draw(sweep, args.sweep[0] if args.sweep else "rate", shown))


def compare_tables(args: argparse.Namespace, bars: Bars) -> None:
    """Print S-LoRA's tables with simulated figures beside its own; write them."""
    wanted = args.tables or QUICK
    rows = [r for r in s_lora.load() if any(fnmatch.fnmatch(r.group, name) for name in wanted)]
    if not rows:
        groups = sorted({row.group for row in s_lora.load()})
        raise ConfigError(f"no table is named {' or '.join(wanted)}; there are {', '.join(groups)}")
    tasks = {
        row.run: Task(
            trace=partial(s_lora.trace, row, args.seeds[0]), machine=s_lora.machine(row),
            section=s_lora.section(row), slo=s_lora.SLO, rate=row.rate,
        )
        for row in rows
    }  # fmt: skip
    runs = run_all(tasks, args.jobs, bars)
    bars.close()
    found = {name: tasks[name].summarize(run) for name, run in runs.items()}
    for group in dict.fromkeys(row.group for row in rows):
        own = {row.name: row for row in rows if row.group == group}
        ours = {name: tables.figures(found[row.run]) for name, row in own.items()}
        print(f"\n{group}: simulated / published\n")
        print(tables.compare(ours, {name: asdict(row.figures) for name, row in own.items()}))
    if args.json:
        named = {row.run: found[row.run] for row in rows}
        save(args.json, as_json(named, conditions(args)))


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the simulation can be repeated from."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate as the command line says; return the exit code."""
    args = parse(arguments)
    try:
        for path in (args.json, args.plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"cannot write {path}: its folder does not exist")
        with contextlib.closing(Bars()) as bars:
            if args.fit is not None:
                print(fit_device(args.fit, bars))
            elif args.tables is not None:
                compare_tables(args, bars)
            else:
                compare_stacks(args, bars)
    except JsloraError as error:
        print(f"simulate.py: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
