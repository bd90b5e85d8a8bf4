"""Write a trace for bench.py and simulate.py: S-LoRA's synthetic workload, or a mix of tenants.

Exit codes: 0 written, 2 wrong arguments or a wrong file.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

import msgspec

from jslora.bench import trace_file
from jslora.bench.report import save
from jslora.bench.traces import MAX_JOBS, Source, mix, slora, split
from jslora.bench.workload import Trace
from jslora.errors import ConfigError

EXAMPLES = """\
S-LoRA's default for a 7B model on 24 GB: 200 adapters, 2 requests a second, five minutes
  make_trace.py slora --models 'adapter-{000..199}' --rate 2 --duration 300 --out slora.jsonl

A mix, described in YAML or JSON: a steady tenant, one that is idle for a while and returns, and one
that goes through 200 adapters in turn
  make_trace.py mix mix.yaml --out mix.jsonl

  seed: 0
  sources:
    - {tenant: steady, models: ["adapter-{000..019}"], rate: [[0, 2], [60, 2]], alpha: 1}
    - {tenant: returns, models: [base], rate: [[0, 4], [20, 4], [20, 0], [40, 0], [40, 4], [60, 4]]}
    - {tenant: cycles, models: ["adapter-{100..299}"], rate: [[0, 1], [60, 5]], choice: round-robin}

A source has a rate of (second, requests a second) points with straight lines between, and may have:
  tenant, priority, ttft_slo; cv, of its gaps; choice of adapters (zipf, power, round-robin), with
  alpha; input_range, output_range: [from, below]; own_process: true gives each adapter a gamma
  process of its own, in place of one for all.
"""


class Listed(Source, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source as the file has it; `own_process` gives each of its models one."""

    own_process: bool = False


class Mix(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file of a mix."""

    sources: list[Listed]
    seed: int = 0
    vocab: int = 32000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make_trace.py",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    add = kinds.add_parser("slora", help="S-LoRA's synthetic workload").add_argument
    add("--models", required=True, metavar="A,B", help="such as 'adapter-{000..199}', or base")
    add("--rate", type=float, required=True, metavar="R", help="requests a second")
    add("--duration", type=float, required=True, metavar="S", help="rate * duration requests")
    add(
        "--alpha",
        type=float,
        default=1.0,
        metavar="A",
        help="1 is uniform, less prefers the first adapters",
    )
    add(
        "--cv",
        type=float,
        default=1.0,
        metavar="C",
        help="coefficient of variation of the gaps; 1 is Poisson, more is burstier",
    )
    add("--input-range", type=_range, default=(8, 512), metavar="LOW,HIGH", help="tokens")
    add("--output-range", type=_range, default=(8, 512), metavar="LOW,HIGH", help="tokens")
    add("--seed", type=int, default=42, metavar="N", help="(42, as S-LoRA)")
    add("--vocab", type=int, default=32000, metavar="N", help="random token ids are below this")
    add("--out", type=Path, required=True, metavar="F", help="the JSONL to write")
    add = kinds.add_parser("mix", help="a mix of sources").add_argument
    add("file", type=Path, help="its sources, in YAML or JSON: see make_trace.py --help")
    add("--out", type=Path, required=True, metavar="F", help="the JSONL to write")
    return parser.parse_args(arguments)


def _range(text: str) -> tuple[int, int]:
    low, high = text.split(",")
    return int(low), int(high)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that `names` stand for: x-{08..10} is x-08, x-09, x-10."""
    return tuple(chain.from_iterable(map(_expand, names)))


def _expand(name: str) -> Iterable[str]:
    found = re.fullmatch(r"([^{}]*)\{(\d{1,9})\.\.(\d{1,9})\}([^{}]*)", name, re.ASCII)
    if found is None:
        return (name,)
    before, first, last, after = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= MAX_JOBS:
        raise ConfigError(f"{name!r} stands for {len(numbers)} names; allowed: 1 to {MAX_JOBS}")
    return (f"{before}{number:0{len(first)}d}{after}" for number in numbers)


def load_mix(path: Path) -> Trace:
    """Return the trace of the mix that a file describes."""
    try:
        described = msgspec.yaml.decode(path.read_bytes(), type=Mix)
        sources = [
            msgspec.structs.replace(source, models=expand(source.models))
            for source in described.sources
        ]
        parts = [split(source) if source.own_process else (source,) for source in sources]
        return mix([*chain(*parts)], seed=described.seed, vocab=described.vocab)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def make(args: argparse.Namespace) -> Trace:
    """Return the trace that the arguments describe."""
    if args.kind == "mix":
        return load_mix(args.file)
    return slora(
        models=expand(args.models.split(",")),
        rate=args.rate,
        duration=args.duration,
        alpha=args.alpha,
        cv=args.cv,
        input_range=args.input_range,
        output_range=args.output_range,
        seed=args.seed,
        vocab=args.vocab,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the trace that the command line describes; return the exit code."""
    args = parse(arguments)
    try:
        trace = make(args)
        if not trace:
            raise ConfigError("no request comes in that time")
        save(args.out, trace_file.encode(trace))
    except ConfigError as error:
        print(f"make_trace.py: {error.message}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_trace.py: cannot write {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(
        f"{len(trace)} requests in {trace[-1].arrival:.1f} s, "
        f"{len({job.model for job in trace})} models, {len({job.tenant for job in trace})} tenants,"
        f" {fmean(job.input_tokens for job in trace):.1f} tokens in and "
        f"{fmean(job.output_tokens for job in trace):.1f} out on average"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
