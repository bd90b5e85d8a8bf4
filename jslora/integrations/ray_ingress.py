"""The one door of the Ray Serve application: it places a request, and passes the answer on.

It reads of a request what it must to place it: the key, and the adapter that it names in `model` or
first in `adapters`. Invariants:
- who has no key is refused before a body is read;
- whatever befalls a replica before its answer began, the client is told 503; an answer that began
  ends with an error frame, or breaks off if it is no stream; nobody waits longer than
  `SILENT_SECONDS` for a replica that says nothing, and no answer is mixed from two replicas;
- an answer follows every change by an administrator that was confirmed before its request came: a
  replica that has not obeyed one yet refuses, and is told of it within `WATCH_SECONDS`.
"""

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jslora import logs
from jslora.config import EngineConfig
from jslora.errors import EngineFailed, JsloraError, Unavailable
from jslora.integrations.changes import ChangeLog, HttpRequest
from jslora.integrations.exchange import Part
from jslora.integrations.merged_metrics import merge
from jslora.integrations.ray_replica import Report
from jslora.server import openai
from jslora.server.app import error_response
from jslora.server.auth import KeyRing
from jslora.server.body import read_body
from jslora.server.service import openai_error
from jslora.server.writer import DONE

log = logging.getLogger("jslora.server")

SILENT_SECONDS = 10.0
WATCH_SECONDS = 1.0
ASK_SECONDS = 5.0
FOLLOW_SECONDS = 60.0
_OPEN = {"/health", "/health/ready", "/ping", "/version"}
_GENERATE = {"/v1/completions", "/v1/chat/completions"}


class Answer:
    """A replica's answer as it comes.

    Args:
        parts: Ray's generator of `Part`s.
        on_end: called once, when the answer is over.
    """

    def __init__(self, parts: Any, on_end: Callable[[], None]) -> None:
        self._parts = parts
        self._on_end = on_end
        self._heard = self._over = False

    async def next(self) -> Part:
        """The next part that is not empty.

        Raises:
            Unavailable: no replica took the request.
            EngineFailed: the replica died, or is silent.
        """
        part = Part()
        while part == Part():
            try:
                async with asyncio.timeout(SILENT_SECONDS):
                    part = await anext(self._parts)
            except TimeoutError:
                if not self._heard:
                    raise Unavailable("no replica took the request") from None
                raise EngineFailed("the replica that served this request is silent") from None
            except StopAsyncIteration:
                raise EngineFailed("the replica broke its answer off") from None
            except (RayError, RayServeException) as error:
                log.warning("a replica failed a request: %s", str(error).partition("\n")[0])
                raise EngineFailed("the replica that served this request died") from None
            self._heard = True
        if part.last:
            self._end()
        return part

    async def rest(self, part: Part, stream: bool) -> AsyncIterator[bytes]:
        """The body from a part on; a stream that fails ends with an error frame.

        Raises:
            EngineFailed: it is no stream and failed.
        """
        try:
            yield part.body
            while not part.last:
                part = await self.next()
                yield part.body
        except JsloraError as error:
            if not stream:
                raise
            yield openai.frame(openai_error(error)) + DONE
        finally:
            self.close()

    def close(self) -> None:
        """Tell the replica that nobody waits for more, if there is more."""
        if not self._over:
            self._parts.cancel()
            self._end()

    def _end(self) -> None:
        self._over = True
        self._on_end()


class _Body(StreamingResponse):
    """The rest of an answer, which ends with the connection even if nothing of it was read."""

    def __init__(self, answer: Answer, body: AsyncIterator[bytes], status: int) -> None:
        super().__init__(body, status)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class Ingress:
    """Answers HTTP requests from `replicas`, a Ray handle to `Replica`s."""

    # Ray awaits it.
    async def __init__(self, config: EngineConfig, replicas: Any) -> None:  # type: ignore[misc]
        logs.configure(config.logging)
        self._max_body = config.server.max_body_bytes
        self._keys = KeyRing(config.auth)
        self._replicas = replicas
        self._names: frozenset[str] = frozenset()
        self._asked: Counter[str] = Counter()
        self._log = ChangeLog()
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[Response]] = set()
        self._informed = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    def check_health(self) -> None:
        """Raise, upon which Ray starts another, if changes are not passed on any more."""
        if self._watching.done():
            self._watching.result()

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            return await self._respond(request)
        except JsloraError as error:
            return error_response(error)

    async def _respond(self, request: Request) -> Response:
        path = request.scope["path"]
        if path == "/health/live":
            return JSONResponse({"status": "ready" if self._informed.is_set() else "starting"})
        if path == "/metrics":
            texts = dict(await self._ask_all("metrics", ASK_SECONDS))
            return Response(merge(texts), media_type=CONTENT_TYPE_LATEST)
        if path not in _OPEN:
            self._keys.identify(request.headers.get("authorization", ""))
        call = await self._read(request)
        await self._be_informed()
        if not call.is_change:
            return await self._forward(replace(call, changes=self._log.last))
        # A change must not be left halfway: neither we nor Ray may cancel it with its request.
        loop = asyncio.get_running_loop()
        change = loop.create_task(self._change(call), context=contextvars.Context())
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        return await asyncio.shield(change)

    async def _read(self, request: Request) -> HttpRequest:
        """A request as it is passed on; a body that is no JSON is left to be refused."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = b""
        if kind == "application/json":
            body = await read_body(request, self._max_body)
        scope = request.scope
        return HttpRequest(
            method=request.method,
            path=scope["path"],
            query=scope["query_string"],
            headers=tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            body=body,
        )

    # Passing requests on --------------------------------------------------------------------------

    async def _forward(self, call: HttpRequest) -> Response:
        """Have a replica answer.

        Raises:
            Unavailable, EngineFailed: none did.
        """
        adapter = next((name for name in _named(call) if name in self._names), "")
        self._asked[adapter] += 1
        call = replace(call, alike=self._asked[adapter])
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        answer = Answer(handle.answer.remote(call), lambda: self._asked.subtract([adapter]))
        try:
            first = await answer.next()
        except BaseException:
            answer.close()
            raise
        assert first.head is not None, "an answer begins with its head"
        headers = dict(first.head.headers)
        if first.last:
            response = Response(first.body, first.head.status)
        else:
            stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            response = _Body(answer, answer.rest(first, stream), first.head.status)
        # Ray numbers requests itself, and gives each answer the number.
        response.raw_headers = [
            (name, value) for name, value in first.head.headers if name != b"x-request-id"
        ]
        return response

    # Changes --------------------------------------------------------------------------------------

    async def _change(self, call: HttpRequest) -> Response:
        """Have one replica obey a change and, if it could, all the others."""
        async with self._changing:
            response = await self._forward(replace(call, changes=self._log.last))
            if response.status_code < 300:
                self._log.add(call)
                await self._inform()
            return response

    async def _watch(self) -> None:
        while True:
            async with self._changing:
                await self._inform()
            await asyncio.sleep(WATCH_SECONDS)

    async def _inform(self) -> None:
        """Learn what the replicas know, and tell those that lag what they have not obeyed."""
        reports: list[Report] = await self._ask_all("report", ASK_SECONDS, self._log.last)
        if not reports:
            return
        self._names = frozenset().union(*(report.names for report in reports))
        self._log.put(max(reports, key=lambda report: report.last).changes)
        last = min(report.last for report in reports)
        if last < self._log.last:
            await self._ask_all("follow", FOLLOW_SECONDS, self._log.after(last))
        self._informed.set()

    async def _be_informed(self) -> None:
        """Wait until it is known what was changed before this ingress was started.

        Raises:
            Unavailable: no replica has said so yet.
        """
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                await self._informed.wait()
        except TimeoutError:
            raise Unavailable("no replica is ready") from None

    async def _ask_all(self, method: str, seconds: float, *arguments: Any) -> list[Any]:
        """The answers of the replicas that run; none at all if one of them hangs."""
        try:
            asked = self._replicas.broadcast(method, *arguments)
            answers = await asked.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the replicas do not all answer: %r", error)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class _Adapter(msgspec.Struct):
    name: str = ""


class _Named(msgspec.Struct):
    model: str = ""
    adapters: list[_Adapter] | None = None


def _named(call: HttpRequest) -> list[str]:
    """The models that a request names; what is wrong with its body, a replica will say."""
    if call.path not in _GENERATE:
        return []
    try:
        named = msgspec.json.decode(call.body, type=_Named)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    return [named.model, *(adapter.name for adapter in named.adapters or ())]
