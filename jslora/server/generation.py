"""Answering one generation request: submit, watch for the client to leave, stream or collect.

Invariants: the status line waits for the first event (or the first keep-alive), so that whatever
goes wrong before it is a real HTTP status; after it, an error is a frame followed by `[DONE]`,
because clients take a stream that merely ends for a success; however this ends, no sequence of
this request keeps running in the engine.
"""

import asyncio
import logging

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jslora.errors import JsloraError, Overloaded, RateLimited, TooLate
from jslora.request import TokenEvent
from jslora.server import openai
from jslora.server.channel import Channel
from jslora.server.choice import Choice
from jslora.server.metrics import SequenceTimer
from jslora.server.prepare import Job
from jslora.server.service import Service, openai_error
from jslora.server.writer import DONE, KEEP_ALIVE, writer

log = logging.getLogger("jslora.server")

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


_REFUSALS = (Overloaded, RateLimited, TooLate)
"""What the engine answers to a sequence that it never starts."""


class ClientGone(JsloraError):
    """The client closed the connection; nobody reads this error."""

    status = 499
    type = "client_gone"


class Generation(Response):
    """An ASGI response that runs a job while it is sent.

    Args:
        began: `time.perf_counter()` when the request was there.

    Raises (when called, before the status line was sent):
        JsloraError: what the client should be told instead.
    """

    def __init__(self, service: Service, job: Job, began: float) -> None:
        super().__init__()
        assert service.client.info is not None
        self._service = service
        self._job = job
        self._writer = writer(job, service.tokenizer, service.client.info.fingerprint)
        echo = job.echo or ("",) * len(job.requests)
        self._choices = {
            request.id: Choice(index, request, echo[index], service.tokenizer)
            for index, request in enumerate(job.requests)
        }
        self._unfinished = len(self._choices)
        self._timers = {
            request.id: SequenceTimer(service.metrics, len(request.prompt), began)
            for request in job.requests
        }
        self._status_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the job; whatever happens, the engine forgets it."""
        channel = self._service.client.submit(self._job.requests)
        watch = asyncio.create_task(_watch(receive, channel))
        failure: JsloraError | None = None
        try:
            if self._job.stream:
                failure = await self._stream(channel, send)
            else:
                await self._collect(channel, send)
        except JsloraError as error:
            failure = error
            if not isinstance(error, ClientGone):
                raise
        finally:
            watch.cancel()
            channel.close()
            for timer in self._timers.values():
                timer.stop(_reason(failure))
            if self._service.config.logging.requests:
                self._log()

    async def _collect(self, channel: Channel, send: Send) -> None:
        while self._unfinished:
            for event in await channel.next(self._service.config.server.keep_alive_seconds):
                self._feed(channel, event)
        body = self._writer.whole(list(self._choices.values()), self._usage())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, channel: Channel, send: Send) -> JsloraError | None:
        """Stream the answer; returns the error that took the place of its rest."""
        try:
            await self._stream_parts(channel, send)
        except Exception as error:
            if not self._status_sent or isinstance(error, ClientGone):
                raise
            shown = error
            if not isinstance(shown, JsloraError):
                log.exception("a stream failed")
                shown = JsloraError("internal error")
            if isinstance(shown, _REFUSALS):
                self._service.metrics.rejected(shown)
            rest = b"".join(map(self._frames, self._choices.values()))
            await self._write(send, rest + openai.frame(openai_error(shown)) + DONE, more=False)
            return shown
        return None

    async def _stream_parts(self, channel: Channel, send: Send) -> None:
        patience = self._service.config.server.keep_alive_seconds
        while self._unfinished:
            events = await channel.next(patience)
            # What waited together leaves together: one frame for each choice.
            fed = dict.fromkeys(self._feed(channel, event) for event in events)
            frames = b"".join([self._frames(choice) for choice in fed])
            if frames or not events:
                await self._write(send, frames or KEEP_ALIVE)
        end = self._writer.usage(self._usage()) if self._job.include_usage else b""
        await self._write(send, end + DONE, more=False)

    def _frames(self, choice: Choice) -> bytes:
        """What a choice has to show since the last time."""
        part = choice.take()
        if part is None:
            return b""
        usage = self._usage() if self._job.continuous_usage else None
        return self._writer.part(choice, part, usage)

    def _feed(self, channel: Channel, event: TokenEvent) -> Choice:
        """Give an event to its choice."""
        choice = self._choices[event.id]
        if choice.finish_reason is not None:
            return choice  # a stop string ended it before the engine knew
        choice.feed(event)
        timer = self._timers[event.id]
        timer.tokens(choice.completion_tokens)
        if choice.finish_reason is not None:
            self._unfinished -= 1
            timer.stop(choice.finish_reason)
            channel.cancel(event.id)  # it is open still if a stop string ended it
        return choice

    def _usage(self) -> openai.Usage:
        """Tokens so far; of a prompt's n choices, the first tells what was cached."""
        choices = list(self._choices.values())
        cached = sum(choice.cached_tokens for choice in choices[:: self._job.n])
        return openai.usage(self._job.prompt_tokens, self._generated(), cached)

    def _generated(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices.values())

    async def _write(self, send: Send, body: bytes, more: bool = True) -> None:
        if not self._status_sent:
            self._status_sent = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    def _log(self) -> None:
        job = self._job
        fields = {
            "id": job.id,
            "model": job.model,
            "adapters": dict(job.requests[0].adapters),
            "tenant": job.requests[0].tenant,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": self._generated(),
            "finished": [timer.reason for timer in self._timers.values()],
            "seconds": round(max(timer.seconds for timer in self._timers.values()), 4),
        }
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        log.info("request %s", line, extra={"fields": fields})


def _reason(failure: JsloraError | None) -> str:
    """Why a sequence that did not finish ended."""
    if isinstance(failure, ClientGone):
        return "abort"
    return "rejected" if isinstance(failure, _REFUSALS) else "error"


async def _watch(receive: Receive, channel: Channel) -> None:
    """Fail the channel when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    channel.fail(ClientGone("the client closed the connection"))
