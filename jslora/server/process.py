"""One life of the engine process: a child, the socket to it, and the pipe that ties it to us.

The engine reads one JSON line from its standard input, `{"config": …, "folder": …}`, and exits when
that pipe closes: it cannot outlive the front end, however that ends. Messages of `jslora.wire` go
both ways over a ZeroMQ PAIR socket in a private directory that goes with the first message; the
front end binds, the engine connects. Nothing here knows what the messages mean.
"""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from jslora import wire
from jslora.config import EngineConfig
from jslora.errors import Unavailable

_FLUSH_SECONDS = 0.1


class EngineProcess:
    """A running child; `on_news` gets every message it sends, on the event loop."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.Socket[bytes],
        directory: tempfile.TemporaryDirectory[str],
        on_news: Callable[[wire.News], None],
    ) -> None:
        self._process = process
        self._socket = socket
        self._directory = directory
        self._on_news = on_news
        self._connected = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._receive)

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        config: EngineConfig,
        folder: Path | None,
        on_news: Callable[[wire.News], None],
    ) -> "EngineProcess":
        """Start `command --socket ADDRESS` in a session of its own and hand it `config`.

        A session of its own keeps a Ctrl-C on the terminal for the front end, which drains; a
        process group would do, but not every event loop can start one.
        """
        directory = tempfile.TemporaryDirectory(prefix="jslora-")  # created with mode 0700
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        try:
            socket.linger = 0
            # What is outstanding is bounded by admission, so sends never have to wait.
            socket.sndhwm = socket.rcvhwm = 0
            address = f"ipc://{directory.name}/engine"
            socket.bind(address)
            process = await asyncio.create_subprocess_exec(
                *command, "--socket", address,
                stdin=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            socket.close()
            directory.cleanup()
            raise
        self = cls(process, socket, directory, on_news)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it is dead already; `wait` will say so
            process.stdin.write(start_line(config, folder))
            await process.stdin.drain()
        return self

    def send(self, command: wire.Command) -> None:
        """Send a message without waiting.

        Raises:
            Unavailable: the engine is not connected (any more).
        """
        try:
            self._socket.send(wire.encode(command), zmq.NOBLOCK)
        except zmq.ZMQError:
            raise Unavailable("the engine is not connected") from None
        # Sending may consume the edge that says a message has come.
        self._loop.call_soon(self._receive)

    async def wait(self) -> int:
        """Wait for the child to exit; its last messages are delivered before this returns."""
        code = await self._process.wait()
        await asyncio.sleep(_FLUSH_SECONDS)
        self._receive()
        return code

    def kill(self) -> None:
        """End the child at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def hang_up(self) -> None:
        """Close its standard input, which tells the child to exit."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Free the socket and its directory; the child must have exited."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._directory.cleanup()
        self.hang_up()

    def _receive(self) -> None:
        """Deliver all messages there are: the socket's descriptor signals edges, not levels."""
        while not self._socket.closed:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not self._connected:  # nobody else needs to find the socket any more
                self._connected = True
                self._directory.cleanup()
            self._on_news(wire.decode_news(data))


def redacted(config: EngineConfig) -> dict[str, Any]:
    """The configuration as plain data, with API keys replaced by numbers and a token by stars."""
    data = config.model_dump(mode="json")
    if data["auth"]["keys"] is not None:
        rights = data["auth"]["keys"].values()
        data["auth"]["keys"] = {f"key-{number}": right for number, right in enumerate(rights)}
    return data


def start_line(config: EngineConfig, folder: Path | None) -> bytes:
    """The line an engine process reads first: API keys stay here, a group's token does not."""
    data = redacted(config)
    if config.distributed.token is not None:
        data["distributed"]["token"] = config.distributed.token.get_secret_value()
    start = {"config": data, "folder": None if folder is None else str(folder)}
    return json.dumps(start).encode() + b"\n"
