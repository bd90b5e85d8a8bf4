"""Write the chats that the demo adapters are trained on; see configs/train/demo.yaml."""

import argparse
import sys
from pathlib import Path

from jslora.errors import JsloraError
from jslora.training.demo.generate import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("~/.cache/jslora/demo-data").expanduser())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for path in write(options.out, options.seed):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except JsloraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
