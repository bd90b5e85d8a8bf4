"""Compile what a GPU would run, for an H100, without a GPU, and hold it to rules.

Every program is compiled at its largest size, and nothing is executed. Exit codes: 0 all rules
hold, 1 some rule is broken or something does not compile, 2 wrong arguments or something is not
installed, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from jslora import config
from jslora.aot import rules, target
from jslora.aot.cases import cases
from jslora.aot.check import EXECUTABLE, check
from jslora.errors import ConfigError
from jslora.server.bars import Bars

CONFIGS = Path(__file__).parents[1] / "configs"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="check_gpu_build.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--config", type=Path, default=CONFIGS / "llama3-8b.yaml", metavar="F",
        help="limits of the dense models")  # fmt: skip
    add("--only", action="append", default=[], metavar="WORDS", help="cases with all these words")
    add("--all-layers", action="store_true", help="of each model, not four")
    add("--processes", type=int, default=2, metavar="N", help="compilers at once")
    add("--json", type=Path, metavar="F", help="write all figures")
    add("--executable", type=Path, metavar="F",
        help=f"write the compiled executable of {EXECUTABLE!r}, and F.json beside it")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check as the command line says; return the exit code."""
    args = parse(arguments)
    try:
        if missing := target.missing():
            wanted = " ".join(f"'{requirement}'" for requirement in missing)
            raise ConfigError(f"compiling for a GPU needs more: pip install {wanted}")
        demo = config.load(CONFIGS / "demo.yaml")
        found = cases(config.load(args.config), demo, all_layers=args.all_layers)
        only = [set(words.split()) for words in args.only] or [set()]
        chosen = [case for case in found if any(w <= set(case.name.split()) for w in only)]
        for path in (args.json, args.executable):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"cannot write {path}: its folder does not exist")
        if not chosen:
            raise ConfigError(f"no case has the words {args.only}")
        if args.executable and EXECUTABLE not in {case.name for case in chosen}:
            raise ConfigError(f"--executable writes {EXECUTABLE!r}, which --only leaves out")
        with closing(Bars()) as bars:
            report = check(
                chosen, rules.committed(), bars,
                executable=args.executable, processes=args.processes,
            )  # fmt: skip
    except ConfigError as error:
        print(f"check_gpu_build.py: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report.render())
    if args.json:
        args.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
