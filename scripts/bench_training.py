"""Measure training beside torch + PEFT on the same batches, and beside its floor.

    python scripts/bench_training.py --config configs/train/bench.yaml --peft-python PYTHON

PYTHON is an interpreter with torch, transformers and peft; without one only ours is measured.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from jslora.bench import peft_training
from jslora.bench.training import Failed, Stepper, measure
from jslora.errors import JsloraError
from jslora.fetch import resolve
from jslora.progress import silent
from jslora.training.config import TrainConfig, load


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="of one adapter on all modules")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured (8)")
    parser.add_argument(
        "--peft-python", metavar="PYTHON", help="an interpreter with torch and peft"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sets = [*options.set, f"out={scratch}", f"defaults.steps={options.steps + 1}"]
        try:
            config = load(options.config, sets)
            batches = Path(scratch) / "batches.npz"
            flags = [flag for text in sets for flag in ("--set", text)]
            command = [sys.executable, "-m", "jslora.evaluation.training_speed", "--config"]
            command += [str(options.config), "--batches", str(batches), *flags]
            theirs = None
            if options.peft_python:
                theirs = Stepper("torch + PEFT", _peft(options.peft_python, config, batches))
            print(measure(Stepper("jslora", command), theirs, options.steps))
        except (JsloraError, Failed) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _peft(python: str, config: TrainConfig, batches: Path) -> list[str]:
    """The command that trains the configured adapter with PEFT."""
    (section,) = config.adapters.values()
    model = resolve(config.model.source, config.cache_dir, silent)
    command = [python, str(Path(peft_training.__file__)), "--model", str(model)]
    command += ["--batches", str(batches), "--rank", str(section.rank)]
    command += ["--rate", str(section.learning_rate)]
    return command + ["--recompute"] * config.recompute


if __name__ == "__main__":
    sys.exit(main())
