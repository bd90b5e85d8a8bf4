"""Serve a model and its adapters: python scripts/serve.py --config configs/demo.yaml"""

import argparse
import sys
from pathlib import Path

import yaml

from jslora import config
from jslora.errors import ConfigError
from jslora.server import frontend, process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key (repeatable)"
    )
    parser.add_argument(
        "--check", action="store_true", help="validate, print the memory plan, and exit"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective configuration, and exit"
    )
    options = parser.parse_args()
    try:
        loaded = config.load(options.config, options.set)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return frontend.exit_code(error)
    if options.print_config:
        print(yaml.safe_dump(process.redacted(loaded), sort_keys=False), end="")
        return 0
    return frontend.check(loaded) if options.check else frontend.main(loaded)


if __name__ == "__main__":
    sys.exit(main())
