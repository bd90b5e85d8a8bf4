"""Measure what many adapters cost, and loading them under traffic, with a server of its own.

Exit codes: 0 measured, 1 the server failed (what was measured is still written), 2 wrong arguments,
130 interrupted (likewise).
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from jslora import config
from jslora.bench import comparison, conditions
from jslora.bench.adapters import Slice, measure_adapters, server_command
from jslora.bench.conditions import Plan
from jslora.bench.report import save
from jslora.errors import ConfigError, JsloraError
from jslora.server.bars import Bars

ROOT = Path(__file__).parents[1]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_adapters.py",
        description=(__doc__ or "").splitlines()[0],
        epilog=conditions.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / "bench-thousands.yaml", metavar="F")
    add("--set", action="append", default=[], metavar="a.b=c", help="override a key of it")
    add("--room", type=int, default=9, metavar="K", help="blocks of this experiment (0: none)")
    add("--loads", type=int, default=5, metavar="K", help="the same")
    add("--sweep", type=int, default=3, metavar="K", help="the same")
    add("--streams", type=int, default=16, metavar="N", help="requests in flight")
    add("--requests", type=int, default=64, metavar="N", help="of one slice")
    add("--input-tokens", type=int, default=64, metavar="N")
    add("--output-tokens", type=int, default=64, metavar="N")
    add("--numbers", type=_numbers, default=conditions.SWEEP, metavar="A,B", help="of the sweep")
    add("--load-rate", type=float, default=2.0, metavar="R", help="loads a second")
    add("--load-rank", type=int, default=16, metavar="R", help="rank of what they load")
    add("--seed", type=int, default=0, metavar="N")
    add("--json", type=Path, metavar="F", help="write all numbers")
    add("--plot", type=Path, metavar="F", help="write a PNG")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def make_plan(args: argparse.Namespace) -> Plan:
    """Return what the arguments ask to measure."""
    return Plan(
        blocks={"room": args.room, "loads": args.loads, "sweep": args.sweep},
        streams=args.streams,
        requests=args.requests,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        sweep=args.numbers,
        load_rate=args.load_rate,
        load_rank=args.load_rank,
        seed=args.seed,
    )


def write(args: argparse.Namespace, slices: Sequence[Slice], load: tuple[float, ...]) -> None:
    """Print the report; write the files."""
    print(comparison.render(slices))
    if slices and args.json:
        known = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        save(args.json, comparison.as_json(slices, known | {"load_before": load}))
    if slices and args.plot:
        from jslora.bench.plot import draw_adapters

        save(args.plot, draw_adapters(slices))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args, load = parse(arguments), os.getloadavg()
    slices: list[Slice] = []
    code = 0
    try:
        for path in (args.json, args.plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"cannot write {path}: its folder does not exist")
        loaded, plan = config.load(args.config, args.set), make_plan(args)
        command = server_command(sys.executable, ROOT / "scripts/serve.py", args.config, args.set)
        with contextlib.closing(Bars()) as bars:
            uvloop.run(measure_adapters(command, loaded, plan, bars, slices.append))
    except JsloraError as error:
        print(f"bench_adapters.py: {error.message}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        code = 130
    if slices or not code:
        write(args, slices, load)
    return code


if __name__ == "__main__":
    sys.exit(main())
