"""Measure what the scheduler itself takes of a step, under one policy stack or several.

Exit codes: 0 measured, 2 wrong arguments.
"""

import argparse
import cProfile
import pstats
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jslora import markdown
from jslora.bench.scheduler_time import Size, Times, measure
from jslora.schedule import stack

COLUMNS = (
    "ms a step, median (90 %)", "fetch", "plan", "commit", "all", "all, mean", "rows", "waiting",
    "free pages",
)  # fmt: skip
POLICIES = ("fcfs", "fair_tenants,cluster,slo", "priority,fair_tenants,fair_adapters,newest")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_scheduler.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--policy",
        action="append",
        metavar="A,B",
        help=f"a stack of {', '.join(stack.NAMES)}; repeat to compare",
    )
    add("--rows", type=int, default=256, metavar="N", help="that run (256)")
    add("--adapters", type=int, default=2000, metavar="N", help="(2000)")
    add("--waiting", type=int, default=10_000, metavar="N", help="requests (10000)")
    add("--pages", type=int, default=24_000, metavar="N", help="of the pool (24000)")
    add("--fill", type=int, default=1500, metavar="N", help="steps before, to fill the pool (1500)")
    add("--steps", type=int, default=500, metavar="N", help="measured (500)")
    add("--profile", type=Path, metavar="F", help="write where the time goes, and no table")
    args = parser.parse_args(arguments)
    args.policy = [tuple(names.split(",")) for names in args.policy or POLICIES]
    for names in args.policy:
        if problem := (
            f"unknown policy in {','.join(names)}"
            if set(names) - set(stack.NAMES)
            else stack.problem(names)
        ):
            parser.error(f"--policy: {problem}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args = parse(arguments)
    size = Size(rows=args.rows, adapters=args.adapters, waiting=args.waiting, pages=args.pages)
    rows: list[list[str]] = []
    profile = cProfile.Profile()
    with tqdm(total=(args.fill + args.steps) * len(args.policy), unit="step", disable=None) as bar:

        def advance(stage: str, done: int, total: int, note: str) -> None:
            bar.update()

        for names in args.policy:
            if args.profile:
                profile.enable()
            times = measure(names, size, fill=args.fill, steps=args.steps, progress=advance)
            profile.disable()
            rows.append(_row(names, times))
    if args.profile:
        with args.profile.open("w") as file:
            pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(40)
    else:
        print("\n".join(markdown.lines(COLUMNS, rows)))
    return 0


def _row(names: Sequence[str], times: Times) -> list[str]:
    parts = [times.fetch, times.plan, times.commit, times.step]
    cells = [f"{np.median(p) * 1e3:.2f} ({np.quantile(p, 0.9) * 1e3:.2f})" for p in parts]
    cells.append(f"{times.step.mean() * 1e3:.2f}")
    counts = [str(times.rows), str(times.waiting), str(times.free_pages)]
    return [", ".join(names), *cells, *counts]


if __name__ == "__main__":
    sys.exit(main())
