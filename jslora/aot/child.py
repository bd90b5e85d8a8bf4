"""The process that compiles one case: reads the case, prints a record a line.

The parent (`check`) sets the environment that the compiler reads.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jslora.aot.build import Workshop, compile_case
from jslora.aot.cases import Case
from jslora.aot.saved import save


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the case that standard input describes."""
    parser = argparse.ArgumentParser(prog="python -m jslora.aot.child", description=__doc__)
    for name in ("--words", "--ptx", "--toolkit"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--executable", type=Path)
    args = parser.parse_args(arguments)
    told = json.load(sys.stdin)
    case = Case(**told | {"storages": tuple(told["storages"])})
    for record, executable in compile_case(case, Workshop(args.words, args.ptx, args.toolkit)):
        if args.executable is not None:
            save(args.executable, executable, dataclasses.asdict(case))
        print(json.dumps(dataclasses.asdict(record)), flush=True)


if __name__ == "__main__":
    main()
