"""Train LoRA adapters on a base model.

    python scripts/train_lora.py --config configs/train/demo.yaml

Started again after it was stopped, it goes on from its newest checkpoint. Exit codes: 0 done,
2 wrong configuration or data, 3 the base model cannot be read, 4 not published, 130 stopped.
"""

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jslora.errors import ConfigError, JsloraError, ModelError
from jslora.server.bars import Bars
from jslora.training.config import load
from jslora.training.heap import keep_freed_memory
from jslora.training.publish import Server, key_from
from jslora.training.run import Report, train
from jslora.training.trainer import Step


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key (repeatable)"
    )
    parser.add_argument(
        "--publish", metavar="URL", help="hot-load the adapters into the server there when done"
    )
    parser.add_argument(
        "--publish-key", metavar="NAME", help="environment variable that holds the server's API key"
    )
    options = parser.parse_args()
    if options.publish_key and not options.publish:
        parser.error("--publish-key is of the server that --publish names")
    keep_freed_memory()
    try:
        _run(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except JsloraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3 if isinstance(error, ModelError) else 4
    return 0


def _run(options: argparse.Namespace) -> None:
    config = load(options.config, options.set)
    server = None
    if options.publish:
        server = Server(options.publish, key_from(os.environ, options.publish_key))
        server.check()
    with closing(Bars()) as bars, tqdm(total=config.steps, unit="step", disable=None) as steps:
        follower = _Follower(steps)
        folders = train(config, Report(follower.say, follower.stepped, bars))
    for name, folder in folders.items():
        if server is not None:
            server.publish(name, folder)
            print(f"{name} is served at {options.publish}")


class _Follower:
    """Shows steps as a bar with losses and tokens a second; without a terminal, as lines."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._last = bar, time.monotonic()

    def say(self, line: str) -> None:
        self._bar.write(line)
        self._last = time.monotonic()

    def stepped(self, done: int, step: Step) -> None:
        now = time.monotonic()
        rate, self._last = step.tokens / (now - self._last), now
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in step.losses.items())
        shown = f"loss {losses}, {rate:.0f} tokens/s"
        if self._bar.disable:
            print(f"step {done}: {shown}", flush=True)
            return
        self._bar.n = done
        self._bar.set_postfix_str(shown)


if __name__ == "__main__":
    sys.exit(main())
