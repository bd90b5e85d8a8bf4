"""Perplexity of a text with weights kept in several ways: python scripts/perplexity.py --config F

Exit codes: 0 measured, 2 wrong arguments, configuration or model.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

from jslora import config, markdown
from jslora.errors import JsloraError
from jslora.evaluation.perplexity import TEXT, compare, score_ways
from jslora.server.bars import Bars

COLUMNS = ("weights", "tokens", "perplexity", "against the first", "same likeliest token")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="perplexity.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file")
    add("--set", action="append", default=[], metavar="a.b=c", help="override a key (repeatable)")
    add(
        "--quantize", nargs="+", default=["none", "int8"], choices=get_args(config.Quantize),
        help="ways, of which the first is what the others are compared with (none int8)",
    )  # fmt: skip
    add("--text", type=Path, default=TEXT, help="a file of UTF-8; by default the one that comes")
    add("--window", type=int, default=512, metavar="N", help="tokens seen together (512)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    args = parse(arguments)
    try:
        loaded, text = config.load(args.config, args.set), args.text.read_text(encoding="utf-8")
        with closing(Bars()) as progress:
            found = score_ways(loaded, args.quantize, text, args.window, progress)
    except (JsloraError, OSError, UnicodeDecodeError) as error:
        print(f"perplexity.py: {error}", file=sys.stderr)
        return 2
    rows, first = [], found[args.quantize[0]]
    for way, scores in found.items():
        seen = compare(first, scores)
        change = f"{seen.ratio - 1:+.2%} (standard error {seen.error:.2%})"
        agreement = f"{seen.agreement:.1%}"
        rows.append([way, scores.logprobs.size, f"{scores.perplexity:.4f}", change, agreement])
    print("\n".join(markdown.lines(COLUMNS, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
