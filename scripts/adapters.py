"""Work on LoRA adapters: say how they bind, convert and merge them, compare what they answer.

Adapters are PEFT folders. --model is their base: a folder, its config.json alone where no weights
are needed, or anything that model.source may be. Nothing is ever overwritten. Exit codes: 0 done,
2 wrong arguments or adapters, 3 the base model cannot be read.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path

from jslora.adapters.peft import Limits
from jslora.adapters.synthetic import DTYPES
from jslora.adapters.tools.combine import combine, common_base
from jslora.adapters.tools.fit import Fitted, total_error
from jslora.adapters.tools.into_base import merge_into_base
from jslora.adapters.tools.make import make_adapter, read_parts
from jslora.adapters.tools.report import changes_text, inspect, report_text
from jslora.bench.workload import Prompt, load_prompts
from jslora.bench.workload import fit as fit_prompt
from jslora.errors import ConfigError, JsloraError, ModelError
from jslora.fetch import load_config, resolve
from jslora.files import read_json
from jslora.logs import printable
from jslora.model.config import ModelConfig, from_hf
from jslora.server.bars import Bars
from pallas_kernels.lora.pieces import STORAGES

EXAMPLES = """\
  adapters.py inspect --model MODEL adapters/sql
  adapters.py convert --model MODEL adapters/sql adapters/sql-small --error 0.05 --dtype bfloat16
  adapters.py merge --model MODEL --out adapters/both adapters/sql=0.7 adapters/french
  adapters.py merge --model MODEL --out sql-model --into-base adapters/sql
  adapters.py compare --model MODEL --chat --prompt "Hello!" adapters/sql adapters/sql-small
  adapters.py compare --model MODEL --prompts prompts.jsonl adapters/sql adapters/sql:int8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    args.cache_dir = args.cache_dir.expanduser()
    try:
        args.run(args)
    except JsloraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 3 if isinstance(error, ModelError) else 2
    return 0


def _inspect(args: argparse.Namespace) -> None:
    model, dtype = _model_config(args), DTYPES[args.dtype]
    infos = [inspect(folder, model, Limits(), dtype, args.storage) for folder in args.folders]
    if args.json:
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
    else:
        print("\n\n".join(map(report_text, infos)))


def _convert(args: argparse.Namespace) -> None:
    args.folders = [(args.folder, 1.0)]
    _make(args)


def _merge(args: argparse.Namespace) -> None:
    if not args.into_base:
        _make(args)
        return
    if args.error is not None:
        raise ConfigError("--error lowers ranks of an adapter; --into-base makes none")
    with closing(Bars()) as progress:
        folder = resolve(args.model, args.cache_dir, progress)
        parts = read_parts(args.folders, load_config(folder), Limits())
        if args.base_name is None:
            common_base(parts)
        dtype = DTYPES[args.dtype] if args.dtype else None
        layers = merge_into_base(folder, combine(parts), args.out, dtype, progress)
    _tell(args, layers)


def _make(args: argparse.Namespace) -> None:
    parts = read_parts(args.folders, _model_config(args), Limits())
    with closing(Bars()) as progress:
        layers = make_adapter(
            parts,
            args.out,
            Limits(),
            dtype=DTYPES[args.dtype] if args.dtype else None,
            error=args.error,
            base_name=args.base_name,
            progress=progress,
        )
    _tell(args, layers)


def _tell(args: argparse.Namespace, layers: Sequence[Fitted]) -> None:
    if args.json:
        told = [dataclasses.asdict(layer) for layer in layers]
        print(json.dumps({"error": total_error(layers), "layers": told}, indent=2))
    else:
        print(changes_text(layers))
        print(f"wrote {args.out}")


def _compare(args: argparse.Namespace) -> None:
    from jslora.engine import Engine
    from jslora.evaluation import compare  # needs jax, which takes a second
    from jslora.tokenizer import Tokenizer

    left, right = compare.Side.parse(args.left), compare.Side.parse(args.right)
    prompts = _prompts(args)
    with closing(Bars()) as progress:
        folder = resolve(args.model, args.cache_dir, progress)
        ids = compare.tokenized(Tokenizer(folder), prompts)
        length = compare.room(load_config(folder), ids, args.max_tokens)
        config = compare.comparison_config(folder, args.dtype, left, right, length, args.cache_dir)
        with Engine(config, progress) as engine:
            answers = compare.compare(engine, left, right, ids, args.max_tokens, progress)
    told = compare.summary(answers)
    if args.json:
        print(json.dumps({**told, "answers": [dataclasses.asdict(a) for a in answers]}, indent=2))
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print(_side_by_side(prompt, (args.left, args.right), (answer.left, answer.right)))
    for name, value in told.items():
        print(f"{name:<18}{f'{value:.4g}' if isinstance(value, float) else value}")


def _prompts(args: argparse.Namespace) -> tuple[Prompt, ...]:
    endpoint = "chat" if args.chat else "completions"
    if args.prompts:
        return load_prompts(args.prompts, endpoint)
    return tuple(fit_prompt(text, endpoint, "--prompt") for text in args.prompt)


def _side_by_side(prompt: Prompt, names: tuple[str, str], texts: tuple[str, str]) -> str:
    width = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    shown = prompt[-1]["content"] if isinstance(prompt[-1], dict) else prompt
    head = [printable(Path(name).name, width - 1) for name in names]
    columns = [[line for part in text.splitlines() for line in _wrapped(part, width)]
               for text in texts]  # fmt: skip
    rows = [head, [], *zip_longest(*columns, fillvalue="")]
    lines = [f"{row[0]:<{width}} | {row[1]}".rstrip() if row else "" for row in rows]
    return "\n".join([f">>> {printable(shown, 2 * width)}", *lines, ""])


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(printable(line, 8 * len(line)), width) or [""]


def _model_config(args: argparse.Namespace) -> ModelConfig:
    """The base's dimensions, without its weights where they are not needed."""
    path = Path(args.model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return from_hf(read_json(path))
    if (path / "config.json").is_file():
        return load_config(path)
    with closing(Bars()) as progress:
        return load_config(resolve(args.model, args.cache_dir, progress))


def _weighted(text: str) -> tuple[Path, float]:
    """FOLDER or FOLDER=WEIGHT."""
    folder, _, weight = text.rpartition("=")
    try:
        return (Path(folder), float(weight)) if folder else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("inspect", help="say how adapters bind and what they take")
    report.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    report.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the pool")  # fmt: skip
    report.add_argument("--storage", choices=STORAGES, default="full", help="as adapters.storage")
    report.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="change dtype, rank or the base's name")
    convert.add_argument("folder", type=Path)
    convert.add_argument("out", type=Path)
    convert.set_defaults(run=_convert)

    merge = commands.add_parser("merge", help="make one adapter of several, or a model")
    merge.add_argument("folders", type=_weighted, nargs="+", metavar="FOLDER[=WEIGHT]")
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--into-base", action="store_true", help="write a model without adapters")
    merge.set_defaults(run=_merge)

    for made in (convert, merge):
        made.add_argument("--dtype", choices=list(DTYPES), help="of the stored numbers")
        made.add_argument("--error", type=float, help="lower ranks as far as each layer's delta "
                          "is off by at most this share of its norm")  # fmt: skip
        made.add_argument("--base-name", help="what the new adapter calls its base")

    _add_compare(commands.add_parser("compare", help="answers of two adapters, or of the base"))
    for command in commands.choices.values():
        command.add_argument("--model", required=True, help="the base model")
        command.add_argument("--cache-dir", type=Path, default=Path("~/.cache/jslora"))
        command.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    side = 'a FOLDER, FOLDER:STORAGE (full, int8, int4), or "base"'
    compare.add_argument("left", help=side)
    compare.add_argument("right", help=side)
    prompts = compare.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", type=Path, help="JSONL of prompts or messages")
    prompts.add_argument("--prompt", action="append", help="a text; may be given several times")
    compare.add_argument("--chat", action="store_true", help="texts are messages of a user")
    compare.add_argument("--max-tokens", type=int, default=64)
    compare.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                         help="of the base and the pool")  # fmt: skip
    compare.set_defaults(run=_compare)


if __name__ == "__main__":
    sys.exit(main())
