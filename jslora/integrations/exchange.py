"""One HTTP request run through an ASGI application in this process, and its answer in parts.

What the application sends while nobody looks leaves in one part; a part without anything tells a
caller in another process, every `BEAT_SECONDS`, that there is somebody at work. However the reading
ends, the application learns that its client is gone, as from a server, and ends by itself.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Scope

from jslora.errors import JsloraError
from jslora.integrations.changes import HttpRequest
from jslora.server.app import error_response

log = logging.getLogger("jslora.server")

BEAT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and the headers of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer; only the first that is not empty has a head, only the last is `last`.

    An answer without a last part was cut off.
    """

    head: Head | None = None
    body: bytes = b""
    last: bool = False


def refusal(error: JsloraError) -> Part:
    """An error as a whole answer, worded as the server words it."""
    response = error_response(error)
    return Part(Head(response.status_code, tuple(response.raw_headers)), bytes(response.body), True)


class Exchange:
    """A call and what `app` answers."""

    def __init__(self, app: ASGIApp, call: HttpRequest) -> None:
        self._body: bytes | None = call.body
        self._sent: list[Message] = []
        self._news = asyncio.Event()
        self._gone = asyncio.Event()
        self._task = asyncio.ensure_future(app(_scope(call), self._receive, self._send))
        self._task.add_done_callback(self._end)

    async def parts(self) -> AsyncIterator[Part]:
        """The answer."""
        part = Part()
        try:
            while not part.last and (self._sent or not self._task.done()):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_SECONDS):
                        await self._news.wait()
                part = self._take()
                yield part
        finally:
            self._gone.set()

    def _take(self) -> Part:
        """All that was sent since the last time."""
        self._news.clear()
        sent, self._sent = self._sent, []
        head, pieces, last = None, [], False
        for message in sent:
            if message["type"] == "http.response.start":
                head = Head(message["status"], tuple(message["headers"]))
            else:
                pieces.append(message.get("body", b""))
                last = not message.get("more_body", False)
        return Part(head, b"".join(pieces), last)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self._sent.append(message)
        self._news.set()

    def _end(self, task: asyncio.Future[None]) -> None:
        self._news.set()
        if not task.cancelled() and task.exception() is not None:
            log.debug("%r after an answer that tells of it", task.exception())


def _scope(call: HttpRequest) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": quote(call.path).encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }
