"""What a child process of `serve.py` begins with, its order, and what it must not outlive: its
parent, and its group.

Host only: no jax.
"""

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

from jslora.config import EngineConfig
from jslora.distributed.section import EXIT_CODE

log = logging.getLogger("jslora.distributed")


def read_order() -> tuple[EngineConfig, Path | None]:
    """The configuration and the model's folder, from one JSON line on standard input."""
    order = json.loads(sys.stdin.buffer.readline())
    folder = order["folder"]
    return EngineConfig.model_validate(order["config"]), Path(folder) if folder else None


def end_with_parent() -> None:
    """Let this process exit at once when standard input closes: nobody is left to serve."""
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()


def end_with_group(reason: str) -> NoReturn:
    """Exit at once when the group has ended: threads may wait in a step for ever."""
    log.critical("this process ends with its group: %s", reason)
    os._exit(EXIT_CODE)


def _exit_with_parent() -> None:
    # Read below Python's buffer, whose lock a daemon thread must not hold when the process ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)
