"""`serve.py` on every host but the leader's: keeps one follower process running until told to stop.

A follower ends with its group, whatever ended that, and is started again to find the next one; so
is one that the leader refused, because what was wrong may be mended on either side, and one that
hangs: it writes a byte a second to a pipe. Exit codes: 0 stopped as asked, 2 the configuration, 3
the model is wrong before anything was started.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from jslora import logs
from jslora.config import EngineConfig
from jslora.distributed.section import PULSE_SECONDS
from jslora.errors import JsloraError
from jslora.server.bars import Bars
from jslora.server.frontend import exit_code, prepare
from jslora.server.process import start_line

FOLLOWER = (sys.executable, "-m", "jslora.distributed.follower")
STOP_SECONDS = 5.0
QUICK_SECONDS = 60.0  # one that ends sooner is started again later
LONGEST_PAUSE = 10.0

log = logging.getLogger("jslora.server")


def main(config: EngineConfig, follower: Sequence[str] = FOLLOWER) -> int:
    """Follow until SIGTERM or SIGINT; returns the exit code.

    Args:
        follower: the command that starts a follower process.
    """
    logs.configure(config.logging)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    bars = Bars()
    try:
        folder = prepare(config, bars)
        config.distributed.secret()  # said at once if it cannot be read
    except JsloraError as error:
        log.error("%s", error.message)
        return exit_code(error)
    finally:
        bars.close()
    _keep_running(config, folder, follower, stop)
    return 0


def _keep_running(
    config: EngineConfig, folder: Path | None, command: Sequence[str], stop: threading.Event
) -> None:
    quick = 0
    while not stop.is_set():
        began = time.monotonic()
        code = _live(config, folder, command, stop)
        if stop.is_set():
            return
        quick = 0 if time.monotonic() - began > QUICK_SECONDS else quick + 1
        pause = min(0.1 * 2 ** min(quick, 10), LONGEST_PAUSE)
        log.warning("the follower ended with code %d; the next starts in %.1f s", code, pause)
        stop.wait(pause)


def _live(
    config: EngineConfig, folder: Path | None, command: Sequence[str], stop: threading.Event
) -> int:
    """One life of a follower; its exit code. It ends at once if its standard input does."""
    pulse, beating = os.pipe()
    with os.fdopen(pulse, "rb", buffering=0) as heard:
        process = subprocess.Popen(
            [*command, "--pulse", str(beating)], stdin=subprocess.PIPE, process_group=0,
            pass_fds=[beating],
        )  # fmt: skip
        os.close(beating)
        with process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its exit code says why
                process.stdin.write(start_line(config, folder))
                process.stdin.flush()
            _watch(process, heard, config.distributed.heartbeat_seconds + PULSE_SECONDS, stop)
            _end(process)
            return process.wait()


def _watch(
    process: subprocess.Popen[bytes], heard: IO[bytes], patience: float, stop: threading.Event
) -> None:
    """Return when a follower has ended, is silent for too long, or is to stop."""
    last = time.monotonic()
    while process.poll() is None and not stop.is_set():
        ready, _, _ = select.select([heard], [], [], 0.1)
        if ready and heard.read(4096):
            last = time.monotonic()
        elif time.monotonic() - last > patience:
            log.error("the follower has been silent for %.0f s and is killed", patience)
            process.kill()
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a follower that still runs, by force if it must be."""
    if process.poll() is None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
