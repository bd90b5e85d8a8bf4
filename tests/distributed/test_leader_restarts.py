"""The front end starts an engine again whose group has ended; one that cannot start, never."""

import asyncio
import contextlib
import sys
from typing import Any

import pytest

from jslora import config
from jslora.server import client
from jslora.server.client import EngineClient, EngineStopped

ENDS = "import os, sys; sys.stdin.readline(); {}"


HANGS = """
import os, signal, sys, time, zmq
from jslora import wire
from jslora.request import Stats
sys.stdin.readline()
socket = zmq.Context().socket(zmq.PAIR)
socket.connect(sys.argv[-1])
socket.send(wire.encode(wire.Pulse(Stats())))
time.sleep(0.3)  # it is sent by another thread
os.kill(os.getpid(), signal.SIGSTOP)
"""


def engine(ends: str, processes: int) -> EngineClient:
    group: dict[str, Any] = {}
    if processes > 1:
        group = {
            "coordinator": "127.0.0.1:9", "num_processes": processes,
            "token": "a token that nobody else knows",
        }  # fmt: skip
    loaded = config.parse(
        {"model": {"source": "m"}, "mesh": {"model": processes}, "distributed": group}
    )
    command = [sys.executable, "-S", "-c", ENDS.format(ends)]
    return EngineClient(loaded, None, command, lambda *progress: None)


async def restarts(found: EngineClient, enough: int) -> int:
    """How often it was started again when it had been `enough` times, or before it gave up."""
    running = asyncio.create_task(found.run())
    while found.restarts < enough and not running.done():
        await asyncio.sleep(0.01)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return found.restarts


@pytest.mark.parametrize("ends", ["os._exit(5)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_an_engine_that_ended_with_its_group_is_started_again(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.01)
    assert asyncio.run(restarts(engine(ends, 2), 5)) >= 5


@pytest.mark.parametrize(
    ("ends", "processes"), [("os._exit(2)", 2), ("os._exit(4)", 2), ("os._exit(5)", 1)]
)
def test_an_engine_that_cannot_start_is_not(ends: str, processes: int) -> None:
    with pytest.raises(EngineStopped) as caught:
        asyncio.run(restarts(engine(ends, processes), 2))
    assert caught.value.code == int(ends.strip("os._exit()"))


def test_a_leader_is_given_no_longer_than_a_heartbeat() -> None:
    assert engine("pass", 2)._patience < 12 < engine("pass", 1)._patience


def test_a_leader_that_hangs_while_it_builds_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(EngineClient, "_patience", 0.5)
    found = engine("pass", 2)
    found._command = [sys.executable, "-c", HANGS]
    assert asyncio.run(asyncio.wait_for(restarts(found, 1), 50)) == 1
    assert "has been silent for" in caplog.text and "code -9" in caplog.text


def test_a_leader_that_has_not_spoken_yet_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may import for longer than it is given later."""
    monkeypatch.setattr(EngineClient, "_patience", 0.2)
    found = engine("import time; time.sleep(1); os._exit(2)", 2)
    with pytest.raises(EngineStopped) as caught:
        asyncio.run(restarts(found, 1))
    assert caught.value.code == 2
