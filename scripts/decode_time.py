"""Time of a decode step with weights kept in several ways: python scripts/decode_time.py --config F

Exit codes: 0 measured, 2 wrong arguments, configuration or model.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

import numpy as np

from jslora import config, markdown
from jslora.errors import JsloraError
from jslora.evaluation.decode_time import measure
from jslora.server.bars import Bars

COLUMNS = ("weights", "MB", "ms a step, median (10 %, 90 %)", "times as fast as the first")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="decode_time.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file")
    add("--set", action="append", default=[], metavar="a.b=c", help="override a key (repeatable)")
    add(
        "--quantize", nargs="+", default=["none", "int8"], choices=get_args(config.Quantize),
        help="ways, of which the first is what the others are compared with (none int8)",
    )  # fmt: skip
    add("--rows", type=int, default=16, metavar="N", help="that decode (16)")
    add("--context", type=int, default=128, metavar="N", help="positions of each row (128)")
    add("--steps", type=int, default=200, metavar="N", help="measured, of each way (200)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args, load = parse(arguments), os.getloadavg()[0]
    try:
        with closing(Bars()) as progress:
            times = measure(
                config.load(args.config, args.set), args.quantize,
                rows=args.rows, context=args.context, steps=args.steps, progress=progress,
            )  # fmt: skip
    except JsloraError as error:
        print(f"decode_time.py: {error.message}", file=sys.stderr)
        return 2
    print(f"{args.rows} rows, {args.context} positions each; load before: {load:.1f}")
    rows, first = [], np.median(times.seconds[args.quantize[0]])
    for way, seconds in times.seconds.items():
        low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)) * 1e3
        spread = f"{middle:.1f} ({low:.1f}, {high:.1f})"
        ratio = f"{first * 1e3 / middle:.2f}"
        rows.append([way, f"{times.weights[way] / 1e6:.0f}", spread, ratio])
    print("\n".join(markdown.lines(COLUMNS, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
