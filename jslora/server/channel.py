"""The events of one HTTP request on their way from the engine's socket to the task that answers it.

Invariants: a sequence is open from submission until its last event or its cancellation; each event
reaches the reader once and in order; a reader that comes late gets everything that waits in one
batch, so what waits is bounded by `max_tokens` and one write serves it.
"""

import asyncio
from collections.abc import Callable, Iterable

from jslora.errors import JsloraError
from jslora.request import TokenEvent


class Channel:
    """Events of a tenant's sequences `ids`; `cancel` tells the engine which nobody waits for."""

    def __init__(
        self, ids: Iterable[str], cancel: Callable[[list[str]], None], tenant: str = "default"
    ) -> None:
        self.open = set(ids)
        self.tenant = tenant
        self._cancel = cancel
        self._pending: list[TokenEvent] = []
        self._failure: JsloraError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: TokenEvent) -> None:
        """Add an event of an open sequence."""
        if event.last:
            self.open.discard(event.id)
        self._pending.append(event)
        self._wake()

    def fail(self, error: JsloraError) -> None:
        """Let the reader have `error` after the events that wait."""
        self._failure = self._failure or error
        self._wake()

    async def next(self, timeout: float) -> list[TokenEvent]:
        """Wait for events; an empty list says that `timeout` seconds passed without any.

        Raises:
            JsloraError: the sequences were failed.
        """
        if not self._pending and self._failure is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if not self._pending and self._failure is not None:
            raise self._failure
        pending, self._pending = self._pending, []
        return pending

    def cancel(self, *ids: str) -> None:
        """Stop sequences that are still open; their later events are dropped."""
        stopped = self.open.intersection(ids)
        if stopped:
            self.open -= stopped
            self._cancel(sorted(stopped))

    def close(self) -> None:
        """Stop every sequence that is still open."""
        self.cancel(*self.open)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
