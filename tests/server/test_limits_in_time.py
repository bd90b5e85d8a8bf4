"""Time limits of connections and of the engine, with the limits made short."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable

import pytest
from server_harness import BASE, HERE

from jslora import config
from jslora.errors import EngineFailed
from jslora.request import Request, SamplingParams
from jslora.server import client, http

SETTINGS = config.parse(BASE)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait, with the event loop running, until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


def test_an_engine_that_hangs_is_killed_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HANG_SECONDS", 1.0)
    command = [sys.executable, str(HERE / "fake_engine.py")]
    stages: list[str] = []

    async def run() -> None:
        engine = client.EngineClient(SETTINGS, None, command, lambda *news: stages.append(news[0]))
        life = asyncio.create_task(engine.run())
        await engine.was_ready.wait()
        request = Request(id="r", prompt=tuple(b"slow"), params=SamplingParams(max_tokens=100))
        channel = engine.submit([request])
        assert await channel.next(5)
        os.kill(engine._process._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        with pytest.raises(EngineFailed):
            while await channel.next(5):
                pass
        assert engine.outstanding == 0
        await eventually(lambda: engine.state == "ready")
        assert engine.restarts == 1 and stages.count("compile") == 8
        life.cancel()
        with pytest.raises(asyncio.CancelledError):
            await life
        assert engine.state == "stopped"

    asyncio.run(run())


async def endless(scope: dict, receive: Callable, send: Callable) -> None:
    """An application that writes until its client is gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    gone = asyncio.create_task(receive())
    while not gone.done() or gone.result()["type"] != "http.disconnect":
        if gone.done():
            gone = asyncio.create_task(receive())
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)


async def serve_and(check: Callable, app: Callable = endless) -> None:
    """Run `check(port, server)` against `app`."""
    listener = http.bind("127.0.0.1", 0)
    server = http.HttpServer(app, SETTINGS)
    serving = asyncio.create_task(server.serve([listener]))
    await eventually(lambda: server.started)
    await check(listener.getsockname()[1], server)
    server.should_exit = True
    await serving


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_a_late_head_closes_the_connection(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)

    async def check(port: int, server: http.HttpServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        await eventually(lambda: not server.server_state.connections)

    asyncio.run(serve_and(check))


def test_a_reader_that_stands_still_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STALL_SECONDS", 0.5)

    async def check(port: int, server: http.HttpServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
        await eventually(lambda: not server.server_state.connections)
        await eventually(lambda: not server.server_state.tasks)
        writer.close()

    asyncio.run(serve_and(check))
