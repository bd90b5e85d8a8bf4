"""What adapters save that are stored as integers, and what that changes.

    python scripts/adapter_storage.py FOLDER ...

Exit codes: 0 measured, 2 wrong arguments, configuration, model or adapter.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jslora import markdown
from jslora.config import load
from jslora.errors import JsloraError
from jslora.evaluation.adapter_storage import COLUMNS, cells, measure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="adapter_storage.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="PEFT folders below one folder")
    add("--config", type=Path, default=Path("configs/demo.yaml"), help="YAML file (the demo's)")
    add("--tokens", type=int, default=32, metavar="N", help="of each answer, at most (32)")
    args = parser.parse_args(arguments)
    args.folders = [folder.resolve() for folder in args.folders]
    if len({folder.parent for folder in args.folders}) > 1:
        parser.error("the folders must lie below one folder")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args = parse(arguments)
    try:
        rows = map(cells, measure(load(args.config), args.folders, args.tokens))
        for line in markdown.lines(COLUMNS, rows):
            print(line, flush=True)
    except JsloraError as error:
        print(f"adapter_storage.py: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
