"""Measure what a group of processes costs its leader in each step, on loopback.

Exit codes: 0 measured, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from jslora import markdown
from jslora.distributed.overhead import Costs, Load, measure

COLUMNS = ("followers", "steps", "ms, median", "90 %", "99 %", "bytes to each, median")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_distributed.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--rows", type=int, default=256, metavar="N", help="that decode (256)")
    add("--adapters", type=int, default=64, metavar="N", help="among them (64)")
    add("--followers", type=int, nargs="+", default=[1, 3], metavar="N", help="processes (1 3)")
    add("--turnover", type=int, default=4, metavar="N", help="steps for one sequence to end (4)")
    add("--steps", type=int, default=400, metavar="N", help="measured (400)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args = parse(arguments)
    load = Load(rows=args.rows, adapters=args.adapters, turnover=args.turnover)
    for line in markdown.lines(COLUMNS, _rows(load, args.followers, args.steps)):
        print(line, flush=True)
    return 0


def _rows(load: Load, groups: Sequence[int], steps: int) -> Iterator[list[object]]:
    for followers in groups:
        costs = measure(load, followers, steps)
        for name, which in (
            ("all", np.ones(steps, bool)),
            ("same rows", ~costs.changed),
            ("a new row", costs.changed),
        ):
            yield [followers, name, *_cells(costs, which)]


def _cells(costs: Costs, which: np.ndarray) -> list[str]:
    times = [np.quantile(costs.seconds[which], q) * 1e3 for q in (0.5, 0.9, 0.99)]
    return [*(f"{t:.2f}" for t in times), f"{np.median(costs.sizes[which]):,.0f}"]


if __name__ == "__main__":
    sys.exit(main())
