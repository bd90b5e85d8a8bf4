"""Check what the policies promise, in simulations; print each claim with its figure.

Exit codes: 0 all hold, 1 one does not, 2 wrong arguments, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from jslora import markdown
from jslora.bench.scenarios import SCENARIOS, Case, Claim

COLUMNS = ("claim", "figure", "bound", "holds")


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
    cases = chain.from_iterable(SCENARIOS[name] for name in args.scenario or SCENARIOS)
    checked: list[Claim] = []
    try:
        for line in markdown.lines(COLUMNS, _rows(cases, checked)):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0 if all(claim.holds for claim in checked) else 1


def _rows(cases: Iterable[Case], checked: list[Claim]) -> Iterator[tuple[str, ...]]:
    """A row for each claim, which then is among those `checked`."""
    for claim in chain.from_iterable(case() for case in cases):
        checked.append(claim)
        yield row(claim)


def row(claim: Claim) -> tuple[str, ...]:
    """Cells of the table."""
    return claim.text, f"{claim.figure:.3f}", claim.bounds, "yes" if claim.holds else "NO"


if __name__ == "__main__":
    sys.exit(main())
