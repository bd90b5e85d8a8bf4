"""Check and measure jslora on a machine with one NVIDIA GPU: one command, within some minutes.

Runs from a checkout; needs Python 3.12, jax with its CUDA plugin, flax, numpy, safetensors,
tokenizers, jaxtyping and PyYAML, no network; jax-triton is used, and a plot drawn, where they can
be. Writes gpu_check.json as it goes, gpu_check.log and gpu_check.png into --out.

Exit codes: 0 everything that ran is correct, 1 something is wrong, a section failed, or the chosen
kernels were not checked to the end, 2 wrong arguments or no GPU, 130 interrupted (what was recorded
until then is kept).
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing needs to be installed

from jslora.gpu import report
from jslora.gpu.supervise import (
    IMPLEMENTATIONS,
    Document,
    Group,
    Supervisor,
    first_group,
    groups,
    only,
    unmatched,
    work_folder,
)

PLOT_SECONDS = 10.0
"""Kept back for the table and the plot."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the files")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget in all (default 8)")
    parser.add_argument(
        "--only", metavar="NAMES", help="sections that begin so, separated by commas"
    )
    parser.add_argument(
        "--executable", type=Path, default=Path("step.xla"),
        help="what check_gpu_build.py --executable wrote (default step.xla)",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", action="store_true",
        help="tiny shapes, also without a GPU: everything runs, the figures mean nothing",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw a former run's file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections there is time for, print the tables, draw the plot."""
    args = parse(arguments)
    if args.plot:
        print(report.render(json.loads(args.plot.read_text())))
        return 0 if draw(args.plot) else 2
    args.out.mkdir(parents=True, exist_ok=True)
    head = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "tiny": args.tiny,
            "minutes": args.minutes}  # fmt: skip
    document = Document(args.out / "gpu_check.json", head)
    try:
        code = run(args, document)
    except KeyboardInterrupt:
        code = 130
    if code == 2:
        return code
    print("\n" + report.render(document.data()), flush=True)
    draw(document.path)
    return code


def run(args: argparse.Namespace, document: Document) -> int:
    """Run the sections; returns the exit code."""
    seconds, say = 60 * args.minutes - PLOT_SECONDS, lambda text: print(text, flush=True)
    with work_folder() as folder, (args.out / "gpu_check.log").open("wb") as log:
        supervisor = Supervisor(document, log, seconds, say)
        first = first_group(folder, tiny=args.tiny)
        make = partial(groups, folder, executable=args.executable.resolve(), tiny=args.tiny)
        every = [group for chosen in IMPLEMENTATIONS for group in make(chosen)]
        if not known(args.only, first + every):
            return 2
        supervisor.run(first)
        devices = document.of("device")
        if not devices or (devices[0]["platform"] != "cuda" and not args.tiny):
            found = f"jax found {devices[0]['kind_of_device']}" if devices else "see gpu_check.log"
            print(f"no NVIDIA GPU can be used: {found}", file=sys.stderr)
            return 2
        todo = make(devices[0]["lora"])
        if not known(args.only, first + todo):
            return 2
        supervisor.run(only(todo, args.only))
    return 0 if report.Findings(document.data()).sound else 1


def known(names: str | None, found: list[Group]) -> bool:
    """Whether each name begins some section's; said which are there if not."""
    wrong = unmatched(found, names) if names is not None else []
    if wrong:
        sections = dict.fromkeys(task.section for group in found for task in group)
        print(f"--only: no section begins with {', '.join(map(repr, wrong))}; there are "
              f"{', '.join(sections)}", file=sys.stderr)  # fmt: skip
    return not wrong


def draw(file: Path) -> bool:
    """Draw a run's file into a PNG beside it; False, and said, where that cannot be."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot: matplotlib is not installed; --plot {file} draws it elsewhere")
        return False
    from jslora.gpu import plot

    picture = plot.draw(json.loads(file.read_text()))
    if picture is None:
        print("no plot: nothing was timed")
        return False
    file.with_suffix(".png").write_bytes(picture)
    print(f"wrote {file.with_suffix('.png')}")
    return True


if __name__ == "__main__":
    sys.exit(main())
