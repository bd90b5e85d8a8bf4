"""A replica of the Ray Serve application: one engine process behind the server's own application.

What `scripts/serve.py` serves over HTTP is served here to calls from Ray, by the same code, so that
answers, errors and metrics are the same. Invariants: Ray counts a replica as running once its
engine is ready, and replaces it once its engine is not started again; a call that must follow
changes which this replica has not obeyed yet is refused with 503 and not answered by what was.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ray import serve

from jslora import logs
from jslora.config import EngineConfig, Key
from jslora.errors import Unavailable
from jslora.integrations.changes import Change, ChangeLog, HttpRequest
from jslora.integrations.exchange import Exchange, Part, refusal
from jslora.progress import silent
from jslora.server import frontend
from jslora.server.app import create_app
from jslora.server.client import EngineClient, EngineStopped

log = logging.getLogger("jslora.server")


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica knows.

    Attributes:
        names: what `model` may be, but for the base.
        last: the number of the last change it obeyed.
        changes: those above the number it was asked for.
    """

    names: frozenset[str]
    last: int
    changes: list[Change]


class Replica:
    """Owns an engine; the methods are called by `Ingress`.

    Raises (when constructed):
        JsloraError: the model or the adapters cannot be prepared.
        RuntimeError: the engine does not start.
    """

    # Ray awaits it.
    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]
        logs.configure(config.logging)
        self._name = serve.get_replica_context().replica_id.unique_id
        folder = await asyncio.to_thread(frontend.prepare, config, silent)
        self._client = EngineClient(config, folder, frontend.WORKER, silent)
        tokenizer = frontend.read_tokenizer(config, folder)
        self._service = frontend.make_service(config, self._client, tokenizer)
        self._app = create_app(self._service)
        self._log = ChangeLog()
        self._changing = asyncio.Lock()
        self._engine = asyncio.create_task(self._client.run())
        ready = asyncio.create_task(self._client.was_ready.wait())
        await asyncio.wait({self._engine, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        self.check_health()

    def check_health(self) -> None:
        """Raise RuntimeError, upon which Ray replaces this replica, if the engine has stopped."""
        if self._engine.done():
            error = self._engine.exception()
            raise RuntimeError(str(error) if isinstance(error, EngineStopped) else repr(error))

    async def answer(self, call: HttpRequest) -> AsyncIterator[Part]:
        """Answer a request in parts."""
        lacks = call.changes > self._log.last
        if lacks or (call.is_change and call.changes < self._log.last):
            error = Unavailable("this replica has not heard of the latest changes", retry_after=1.0)
            yield refusal(error)
            return
        async with self._changing if call.is_change else contextlib.nullcontext():
            status = 0
            async for part in Exchange(self._app, call).parts():
                status = part.head.status if part.head else status
                if part.last and call.is_change and status < 300:
                    self._log.add(call)
                yield part

    async def follow(self, changes: Sequence[Change]) -> None:
        """Obey the changes that were not obeyed here yet."""
        # It may take longer than anybody waits, and a part of it is worth nothing.
        await asyncio.shield(asyncio.ensure_future(self._follow(changes)))

    async def _follow(self, changes: Sequence[Change]) -> None:
        async with self._changing:
            new = [change for change in changes if change.number > self._log.last]
            for change in new:
                await self._obey(change.call)
            self._log.put(new)

    async def _obey(self, call: HttpRequest) -> None:
        async for part in Exchange(self._app, call).parts():
            if part.head and part.head.status >= 300:
                log.error("%s %s did not succeed here: %r", call.method, call.path, part.body[:500])

    def report(self, after: int) -> Report:
        """What this replica knows, with the changes after a number."""
        names = frozenset(self._service.names.visible(Key())) - {self._service.names.base}
        return Report(names, self._log.last, self._log.after(after))

    def metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics as Prometheus' text."""
        return self._name, self._service.metrics.render().decode()

    async def __del__(self) -> None:
        """Stop the engine; Ray calls this when no request is left, or none may take longer."""
        self._engine.cancel()
        await asyncio.wait({self._engine})
