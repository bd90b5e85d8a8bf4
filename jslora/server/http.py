"""HTTP/1.1 as uvicorn speaks it through h11, with the limits a server on a network needs.

h11 bounds the size of a request's head; here its time is bounded too, and the time that a client
may leave an answer unread. Connections over the cap are answered 503 by uvicorn itself.
"""

import asyncio
import socket

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from jslora.config import EngineConfig
from jslora.errors import ConfigError

HEAD_BYTES = 32 * 2**10
HEAD_SECONDS = 10.0
STALL_SECONDS = 60.0
SPARE_CONNECTIONS = 128


class LimitedProtocol(H11Protocol):
    """Closes connections whose request head is late or whose reader stands still."""

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of every other error."""
        body = (
            b'{"error":{"message":"' + msg.encode("ascii") + b'",'
            b'"type":"invalid_request_error","param":null,"code":400}}'
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _time_head(self) -> None:
        """Run the clock from a connection's start, or a later head's, until the head is whole."""
        if self.conn.their_state is not h11.IDLE:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def _close_late(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the front end decides when serving ends."""

    def __init__(self, app: ASGIApp, config: EngineConfig) -> None:
        capacity = config.scheduler.max_running + config.scheduler.max_queued
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                limit_concurrency=capacity + SPARE_CONNECTIONS,
                timeout_graceful_shutdown=5,
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit` is set."""
        await self._serve(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Take the address before anything slow is done.

    Raises:
        ConfigError: it is not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()  # until then, somebody else could take it still
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener
