"""Servers for tests: one to share, and a way to start others."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from server_harness import Server


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(config: dict[str, Any] | None = None, *fake: str, wait: bool = True) -> Server:
            server = Server(config or {}, *fake, wait=wait)
            stack.callback(server.process.stderr.close)
            stack.callback(server.process.stdout.close)
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            return server

        yield make


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """An open server that tests share."""
    server = Server({"server": {"keep_alive_seconds": 0.5}})
    yield server
    code, errors = server.stop()
    assert code == 0, errors
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client
