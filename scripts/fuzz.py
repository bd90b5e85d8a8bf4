"""Random operations on a small engine that tells whose weights and cached keys made each token.

Prints what was done and what was found. A run that finds something ends there, with exit code 1.
"""

import argparse
import secrets
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz_engine import run_seed  # type: ignore[import-not-found]
from fuzz_world import World  # type: ignore[import-not-found]


def main() -> None:
    args = _parse()
    seed, began, error = args.seed, time.monotonic(), None
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=args.operations, unit="operation", disable=None) as bar,
    ):
        world = World(Path(folder) / "world")
        while error is None and world.tally.operations.total() < args.operations:
            try:
                run_seed(world, seed)
            except Exception as found:
                error = found
            seed += 1
            bar.update(world.tally.operations.total() - bar.n)
        world.close()
    if error is not None:
        traceback.print_exception(error)
    _report(world, args.seed, seed - 1, time.monotonic() - began)
    sys.exit(error is not None)


def _report(world: World, first_seed: int, last_seed: int, seconds: float) -> None:
    tally = world.tally
    rows = [
        *((f"  {kind}", count) for kind, count in sorted(tally.operations.items())),
        ("operations", tally.operations.total()),
        *((f"  ended: {reason}", count) for reason, count in sorted(tally.ends.items())),
        ("requests", tally.requests),
        ("tokens checked", tally.tokens),
        ("prompt tokens from the prefix cache", tally.cached_tokens),
        *((name.replace("_", " "), count) for name, count in tally.engine.items()),
        ("wrong-weight tokens", tally.wrong_tokens),
        ("leaked pages", tally.leaked_pages),
        ("leaked host bytes", tally.leaked_host_bytes),
        ("ledger errors", tally.ledger_errors),
        ("seconds", round(seconds)),
        ("seeds", f"{first_seed} to {last_seed}"),
    ]
    for name, value in rows:
        print(f"{name:<40}{value if isinstance(value, str) else f'{value:,}':>14}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="first of many")
    return parser.parse_args()


if __name__ == "__main__":
    main()
