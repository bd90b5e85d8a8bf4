"""Serve a model and its adapters: python scripts/serve.py --config configs/demo.yaml

On several hosts every one is started alike (see configs/two-hosts.yaml); process 0 serves.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

from jslora import config
from jslora.distributed import environment
from jslora.errors import ConfigError
from jslora.server import follow, frontend, process


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
        loaded = load(options.config, options.set)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return frontend.exit_code(error)
    if options.print_config:
        print(yaml.safe_dump(process.redacted(loaded), sort_keys=False), end="")
        return 0
    if options.check:
        return frontend.check(loaded)
    return follow.main(loaded) if loaded.distributed.process_id > 0 else frontend.main(loaded)


def load(path: Path, overrides: list[str]) -> config.EngineConfig:
    """The configuration, with this process's place in its group if the environment tells it."""
    loaded = config.load(path, overrides)
    if not loaded.distributed.auto:
        return loaded
    found = environment.overrides(os.environ, loaded.distributed.model_fields_set)
    return config.load(path, [*found, *overrides])


if __name__ == "__main__":
    sys.exit(main())
