"""Write synthetic PEFT adapters for a model, in the shape that `jslora` serves."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from jslora.adapters.synthetic import DTYPES, make_adapters
from jslora.errors import JsloraError
from jslora.fetch import load_config
from jslora.files import read_json
from jslora.model.config import from_hf


def main() -> None:
    args = _parse()
    with tqdm(total=args.count, unit="adapter", disable=None) as bar:

        def progress(stage: str, done: int, total: int, note: str) -> None:
            bar.update(done - bar.n)

        make_adapters(
            args.out,
            load_config(args.model) if args.model else from_hf(read_json(args.config)),
            count=args.count,
            ranks=args.ranks,
            targets=args.targets
            or [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]],
            dtype=args.dtype,
            seed=args.seed,
            base_name=args.base_name or (args.model or args.config.parent).resolve().name,
            alpha=args.alpha,
            progress=progress,
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="folder of the base model")
    model.add_argument("--config", type=Path, help="the base model's config.json alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--ranks", type=_ranks, default=[4, 8, 16], help="such as 4,8,16")
    parser.add_argument(
        "--targets",
        type=lambda text: text.split(","),
        action="append",
        help="such as q_proj,v_proj; may be given several times, taken in turn",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=int, help="lora_alpha; twice the rank by default")
    parser.add_argument("--base-name", help="what the adapters call their base")
    return parser.parse_args()


def _ranks(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    try:
        main()
    except JsloraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
