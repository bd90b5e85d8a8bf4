"""Serve with replicas: python scripts/serve_ray.py --config configs/demo.yaml --replicas 2

Starts a Ray of its own that is reached from this machine only or, with --address, deploys to a
cluster that runs. SIGTERM or SIGINT lets running requests finish; a second one does not.
"""

import argparse
import contextlib
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from jslora import config, logs
from jslora.config import EngineConfig
from jslora.errors import ConfigError, JsloraError
from jslora.integrations.local_ray import local_ray
from jslora.integrations.scale import Scale, check_gpus
from jslora.server import frontend
from jslora.server.bars import Bars
from jslora.server.http import bind

NAME = "jslora"


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        loaded = config.load(options.config, options.set)
        logs.configure(loaded.logging)
        run(loaded, _scale(options), options.address)
    except JsloraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return frontend.exit_code(error)
    except RuntimeError as error:  # what Ray says of replicas that do not start
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        return 0
    return 0


def run(config: EngineConfig, scale: Scale, address: str | None) -> None:
    """Serve until interrupted.

    Args:
        address: of a Ray cluster; None for one of our own.

    Raises:
        JsloraError: the configuration, the model or an adapter is wrong.
        RuntimeError: no replica starts.
        KeyboardInterrupt: it is over.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; install jslora with the extra ray")
    check_gpus(scale, config.mesh.model)
    began = time.monotonic()
    with contextlib.closing(Bars()) as bars:
        frontend.prepare(config, bars)  # once, and not in all replicas at the same time
    host, port = config.server.host, _free_port(config)
    with _ray(config, scale, address, port):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
        from ray import serve

        from jslora.integrations.ray_serve import build

        serve.run(build(config, scale), name=NAME)
        print(
            f"Ready in {time.monotonic() - began:.1f} s: http://{host}:{port} "
            f"({config.model.served_name}, {scale.min_replicas} replicas)",
            flush=True,
        )
        try:
            while True:
                signal.pause()
        finally:
            serve.delete(NAME)


@contextlib.contextmanager
def _ray(config: EngineConfig, scale: Scale, address: str | None, port: int) -> Iterator[None]:
    if address is None:
        # One more than there are replicas, so that one that hangs is replaced before it is gone.
        cpus = math.ceil(scale.cpus * (scale.max_replicas + 1))
        with local_ray(cpus, config.server.host, port):
            yield
        return
    import ray
    from ray import serve

    ray.init(address)
    serve.start(http_options={"host": config.server.host, "port": port})
    try:
        yield
    finally:
        ray.shutdown()


def _free_port(config: EngineConfig) -> int:
    """The port to serve on; Ray binds it by itself, so what is free now is the best we know."""
    with contextlib.closing(bind(config.server.host, config.server.port)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _scale(options: argparse.Namespace) -> Scale:
    """What the options say.

    Raises:
        ConfigError: they contradict each other, or one is out of range.
    """
    fixed, least, most = options.replicas, options.min_replicas, options.max_replicas
    for name, bound in (("min", least), ("max", most)):
        if fixed is not None and bound is not None:
            raise ConfigError(
                f"--replicas {fixed} and --{name}-replicas {bound}: give a fixed number or bounds"
            )
    least = next(number for number in (fixed, least, 1) if number is not None)
    try:
        return Scale(
            min_replicas=least,
            max_replicas=least if most is None else most,
            target_requests=options.target_requests,
            cpus=options.cpus,
            gpus=options.gpus,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = " ".join(str(part) for part in problem["loc"])
        value = f"{name} is {problem['input']!r}: " if name else ""
        raise ConfigError(f"{value}{problem['msg']}") from None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key (repeatable)"
    )
    parser.add_argument("--replicas", type=int, help="a fixed number of replicas")
    parser.add_argument("--min-replicas", type=int, help="scale down to so many (1)")
    parser.add_argument("--max-replicas", type=int, help="scale up to so many")
    parser.add_argument(
        "--target-requests", type=float, help="of a replica, when scaling (scheduler.max_running)"
    )
    parser.add_argument("--cpus", type=float, default=1, help="set aside for a replica")
    parser.add_argument(
        "--gpus", type=int, default=0, help="set aside for a replica: mesh.model, or 0 on CPUs"
    )
    parser.add_argument("--address", help="of a Ray cluster that runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
