"""A leader that builds gives signs of life, by which one that hangs is told from a slow one."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from jslora import build, config, wire, worker
from jslora.errors import ModelError
from jslora.worker import Worker


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], Worker]]:
    """Our end of a socket, and a worker at the other."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/engine"
        ours: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        ours.bind(address)
        found = Worker(address)
        yield ours, found
        found._context.destroy(linger=0)
        ours.close(linger=0)


def test_a_worker_pulses_while_it_builds(
    pair: tuple[zmq.Socket[bytes], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, found = pair

    def build_slowly(*_: Any, **__: Any) -> None:
        time.sleep(0.8)
        raise ModelError("no such model")

    monkeypatch.setattr(worker, "PULSE_SECONDS", 0.1)
    monkeypatch.setattr(build, "build_core", build_slowly)
    group = {"coordinator": "127.0.0.1:9", "num_processes": 2, "token": "x" * 20}
    data = {"model": {"source": "m"}, "mesh": {"model": 2}, "distributed": group}
    assert found.start(config.parse(data), Path()) == 3
    said: list[Any] = []
    while ours.poll(200):
        said.append(wire.decode_news(ours.recv()))
    assert isinstance(said.pop(), wire.Failed)
    assert len(said) >= 3 and all(isinstance(news, wire.Pulse) for news in said)
