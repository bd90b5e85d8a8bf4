"""Measure any OpenAI-compatible server: throughput, TTFT, ITL, TPOT, E2E, over one or many models.

Exit codes: 0 measured, 1 no request succeeded or the server cannot be reached, 2 wrong arguments,
130 interrupted (nothing is written).
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tqdm import tqdm

from jslora.bench import report, trace_file
from jslora.bench.client import Client, Load, Record, Run, Target, measure
from jslora.bench.traces import scale
from jslora.bench.workload import Spec, Trace, load_prompts
from jslora.errors import ConfigError, JsloraError

EXAMPLES = """\
Prompts are lists of random token ids, so input lengths are exact; with --ignore-eos output lengths
are too. A server with a prefix cache has seen them when the same seed comes again: change --seed.

The acceptance workloads: 64 prompt and 64 output tokens
  base only, 16 streams:
    bench.py --concurrency 16 --requests 128 --ignore-eos --warmup 16 --repeat 3
  8 adapters in turn:
    bench.py --all-adapters 8 --concurrency 16 --requests 128 --ignore-eos --warmup 16 --repeat 3
  64 adapters in turn:
    bench.py --all-adapters 64 --concurrency 16 --requests 128 --ignore-eos --warmup 64 --repeat 3
  one stream:
    bench.py --concurrency 1 --requests 8 --ignore-eos --warmup 2

An open loop: 4 requests a second for a minute, bursty, popular adapters asked for more often
    bench.py --all-adapters --assignment zipf --rate 4 --burstiness 0.5 --duration 60

A trace, with its own arrivals, models, lengths and tenants (make_trace.py writes some)
    bench.py --trace mix.jsonl --tenant-keys keys.yaml --ignore-eos --per-tenant --warmup 16
"""

# What a trace says itself.
REPLACED_BY_TRACE = (
    "models", "models_file", "all_adapters", "assignment", "zipf_alpha", "burstiness",
    "input_tokens", "output_tokens", "prompt_file", "repeat",
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES + "\nDefinitions\n" + _definitions(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("workload"))
    _add_output(parser.add_argument_group("output"))
    args = parser.parse_args(arguments)
    if args.trace is not None:
        for name in REPLACED_BY_TRACE:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is not allowed with --trace")
        return args
    if args.speed != parser.get_default("speed"):
        parser.error("--speed needs a --trace")
    if args.concurrency is None and args.rate is None:
        args.concurrency = 16
    if args.requests is None and args.duration is None:
        args.requests = 64
    return args


def _definitions() -> str:
    return "".join(f"  {name:<11}{text}\n" for name, text in report.DEFINITIONS.items())


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--tenant-keys", type=Path, metavar="F",
        help="JSON or YAML: the key of each tenant of a trace")  # fmt: skip
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for one request")
    models = group.add_mutually_exclusive_group()
    models.add_argument("--models", metavar="A,B", help="default: the server's first base model")
    models.add_argument("--models-file", type=Path, metavar="F", help="one name a line")
    models.add_argument(
        "--all-adapters",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="the (first N) models that /v1/models lists with a parent",
    )


def _add_workload(group: Any) -> None:
    add = group.add_argument
    add("--assignment", choices=("round-robin", "random", "zipf"), default="round-robin")
    add(
        "--zipf-alpha",
        type=float,
        default=1.0,
        metavar="A",
        help="the k-th model has weight k^-alpha",
    )
    loop = group.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, metavar="N", help="closed loop (default, 16)")
    loop.add_argument("--rate", type=float, metavar="R", help="open loop: requests a second")
    loop.add_argument("--trace", type=Path, metavar="F", help="open loop: a JSONL file's requests")
    add("--speed", type=float, default=1.0, metavar="S", help="send a trace so many times as fast")
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="gamma shape of the gaps; 1 is Poisson",
    )
    end = group.add_mutually_exclusive_group()
    end.add_argument(
        "--requests", type=int, metavar="N", help="how many to send (default: 64, or a whole trace)"
    )
    end.add_argument("--duration", type=float, metavar="S", help="send for so many seconds")
    add("--input-tokens", type=int, default=64, metavar="N")
    add("--output-tokens", type=int, default=64, metavar="N")
    add("--vocab", type=int, default=32000, metavar="N", help="random token ids are below this")
    add("--prompt-file", type=Path, metavar="F",
        help='JSONL of {"prompt": text} or {"messages": [...]}, taken in turn')  # fmt: skip
    add("--ignore-eos", action="store_true", help="ask for exactly the output tokens")
    add("--temperature", type=float, default=0.0, metavar="T")
    add("--warmup", type=int, default=0, metavar="N", help="requests sent before, not measured")
    add("--repeat", type=int, default=1, metavar="K", help="runs; with new random prompts each")
    add("--seed", type=int, default=0, metavar="N")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--per-model", action="store_true", help="add a table with a line for each model")
    add("--per-tenant", action="store_true", help="add a table with a line for each tenant")
    add("--json", type=Path, metavar="F", help="write everything, each request included")
    add("--plot", type=Path, metavar="F", help="write a PNG: throughput over time, TTFT, ITL")


async def choose_models(args: argparse.Namespace, target: Target) -> tuple[str, ...]:
    """Return the models to ask for, as the arguments or the server name them."""
    if args.models is not None:
        return tuple(name.strip() for name in args.models.split(",") if name.strip())
    if args.models_file is not None:
        try:
            return tuple(args.models_file.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --models-file {args.models_file}: {error}") from None
    async with Client(target) as client:
        bases, adapters = await client.models()
    if args.all_adapters is None:
        if not bases:
            raise ConfigError("the server lists no base model: give --models")
        return (bases[0],)
    if not 0 <= args.all_adapters <= len(adapters) or not adapters:
        wanted = args.all_adapters or "all"
        raise ConfigError(f"--all-adapters {wanted}: the server lists {len(adapters)} adapters")
    return tuple(adapters[: args.all_adapters or None])


def make_spec(args: argparse.Namespace, models: tuple[str, ...]) -> Spec:
    """Return the workload that the arguments describe."""
    if args.prompt_file is None and args.endpoint == "chat":
        raise ConfigError("--endpoint chat takes no token ids: give a --prompt-file")
    return Spec(
        models=models,
        assignment=args.assignment,
        zipf_alpha=args.zipf_alpha,
        rate=args.rate,
        burstiness=args.burstiness,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        vocab=args.vocab,
        prompts=load_prompts(args.prompt_file, args.endpoint) if args.prompt_file else (),
        seed=args.seed,
    )


def load_keys(path: Path) -> dict[str, str]:
    """Read the API key of each tenant; no error shows any of the file's text."""
    try:
        keys = msgspec.yaml.decode(path.read_bytes(), type=dict[str, str])
    except OSError as error:
        raise ConfigError(f"cannot read --tenant-keys {path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigError(f"--tenant-keys {path} is not a map from tenants to keys") from None
    for tenant, key in keys.items():
        if not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"--tenant-keys {path}: {tenant!r} has no key of printable ASCII")
    return keys


def check_keys(trace: Trace, keys: Mapping[str, str]) -> None:
    """Refuse a trace of several tenants unless each has its own key: they would pass for one."""
    tenants = {job.tenant for job in trace}
    missing = sorted(tenants - keys.keys())
    if missing and len(tenants) > 1:
        raise ConfigError(f"the trace has {len(tenants)} tenants: --tenant-keys lacks {missing[0]}")


def make_target(args: argparse.Namespace) -> Target:
    """Return the server that the arguments describe."""
    return Target(
        url=args.url,
        endpoint=args.endpoint,
        api_key=args.api_key,
        tenant_keys=load_keys(args.tenant_keys) if args.tenant_keys else {},
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        timeout=args.timeout,
    )


def make_load(args: argparse.Namespace, workload: Spec | Trace) -> Load:
    """Return how the arguments drive the workload; a trace has an end of its own."""
    requests = args.requests
    if requests is None and args.duration is None:
        assert isinstance(workload, tuple), "other workloads get a number when they are parsed"
        requests = len(workload)
    return Load(
        concurrency=args.concurrency,
        requests=requests,
        duration=args.duration,
        warmup=args.warmup,
        repeat=args.repeat,
    )


async def make_workload(args: argparse.Namespace, target: Target) -> Spec | Trace:
    """Return what the arguments describe: a trace, or jobs for models that the server may list."""
    if args.trace is None:
        return make_spec(args, await choose_models(args, target))
    trace = trace_file.load(args.trace, args.endpoint, seed=args.seed, vocab=args.vocab)
    check_keys(trace, target.tenant_keys)
    return scale(trace, args.speed)


async def bench(args: argparse.Namespace) -> tuple[list[Run], Spec | Trace]:
    """Measure with a progress bar; return the runs and the workload."""
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: its folder does not exist")
    target = make_target(args)
    workload = await make_workload(args, target)
    load = make_load(args, workload)
    total = None if load.requests is None else load.requests * load.repeat
    with tqdm(total=total, unit="req", disable=None, leave=False) as bar:

        def ended(record: Record) -> None:
            bar.update()

        return await measure(target, workload, load, ended), workload


def conditions(args: argparse.Namespace, workload: Spec | Trace) -> dict[str, Any]:
    """Return what the measurement can be repeated from; never an API key."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    del values["api_key"]
    if isinstance(workload, Spec):
        return values | {"models": workload.models}
    return values | {"models": sorted({job.model for job in workload})}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args = parse(arguments)
    load_before = os.getloadavg()
    try:
        runs, workload = uvloop.run(bench(args))
    except JsloraError as error:
        print(f"bench.py: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    wanted: dict[report.Key, bool] = {"model": args.per_model, "tenant": args.per_tenant}
    print(report.render(runs, [key for key, given in wanted.items() if given]))
    if args.json:
        known = conditions(args, workload) | {"load_before": load_before}
        report.save(args.json, report.as_json(runs, known))
    if args.plot:
        from jslora.bench.plot import draw

        shown = report.middle([report.summarize(run) for run in runs])
        report.save(args.plot, draw(runs[shown]))
    return 0 if any(record.error is None for run in runs for record in run.records) else 1


if __name__ == "__main__":
    sys.exit(main())
