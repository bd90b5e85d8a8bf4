"""Check what the policies promise, in simulations; print each claim with its figure.

Exit codes: 0 all hold, 1 one does not, 2 wrong arguments, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain

from jslora.bench.scenarios import SCENARIOS, Claim


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="check_policies.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "scenario", nargs="*", metavar="S", help=f"of {', '.join(SCENARIOS)}; default: all"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.scenario) - set(SCENARIOS):
        parser.error(
            f"no scenario {' or '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}"
        )
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Check as the command line says; return the exit code."""
    args = parse(arguments)
    print("| claim | figure | bound | holds |\n|---|---|---|---|")
    broken = 0
    try:
        for case in chain.from_iterable(SCENARIOS[name] for name in args.scenario or SCENARIOS):
            for claim in case():
                print(line(claim), flush=True)
                broken += not claim.holds
    except KeyboardInterrupt:
        return 130
    return 1 if broken else 0


def line(claim: Claim) -> str:
    """A row of the table."""
    holds = "yes" if claim.holds else "NO"
    return f"| {claim.text} | {claim.figure:.3f} | {claim.bounds} | {holds} |"


if __name__ == "__main__":
    sys.exit(main())
