"""The engine as the front end knows it: alive or not, what it serves, and who waits for what.

Invariants:
- a sequence is outstanding from `submit` until its last event, its cancellation or the engine's
  death; at most `max_running + max_queued` are, and the prompts of those that have had no event
  hold at most `max_queued_tokens` tokens;
- when the engine dies, every open channel and every pending command fails at once, and the next
  engine counts as ready once it has the adapters that this one had;
- a start that never succeeded is not repeated: what stopped it will stop it again. But an engine
  that ended with its group of processes is always started again, and the others are by theirs.
"""

import asyncio
import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jslora import wire
from jslora.config import EngineConfig
from jslora.distributed.section import EXIT_CODE
from jslora.errors import EngineFailed, InvalidRequest, JsloraError, Overloaded, Unavailable
from jslora.request import EngineInfo, Request, Stats, TokenEvent
from jslora.server.channel import Channel
from jslora.server.process import EngineProcess
from jslora.server.registry import Adapters

log = logging.getLogger("jslora.server")

HANG_SECONDS = 120.0  # a live engine sends a Pulse every second; the leader of a group has less
LOOK_SECONDS = 0.25  # between two looks at how long the engine has been silent
STOP_SECONDS = 10.0
QUICK_SECONDS = 60.0  # an engine that dies sooner after it was ready counts as a failed start
MAX_QUICK_DEATHS = 3
LONGEST_PAUSE = 10.0

State = Literal["starting", "ready", "restarting", "stopped"]


class EngineStopped(Exception):
    """The engine cannot be kept running.

    Attributes:
        code: its exit code.
        error: what it said before it exited, if anything.
    """

    def __init__(self, message: str, code: int, error: JsloraError | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.error = error


class EngineGone(JsloraError):
    """The engine is stopped for good; asking this server again cannot help."""

    status = 503
    type = "unavailable_error"


class EngineClient:
    """Keeps an engine process alive (`run`) and speaks with it.

    Args:
        command: how to start the engine; `--socket ADDRESS` is appended.
        progress: called as (stage, done, total, note) while it starts.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path | None,
        command: Sequence[str],
        progress: Callable[[str, int, int, str], None],
    ) -> None:
        self.state: State = "starting"
        self.info: EngineInfo | None = None
        self.adapters = Adapters(self.engine, self._send)
        self.stats = Stats()
        self.restarts = 0
        self.was_ready = asyncio.Event()
        self._config = config
        self._folder = folder
        self._command = command
        self._progress = progress
        self._process: EngineProcess | None = None
        self._failed: JsloraError | None = None
        self._heard: float | None = None  # when; None before its first news
        self._channels: dict[str, Channel] = {}
        self._unanswered: dict[str, int] = {}  # prompt tokens of sequences without an event

    # Requests -------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Sequences that run or wait."""
        return len(self._channels)

    def submit(self, requests: Sequence[Request]) -> Channel:
        """Hand sequences to the engine; all of them are admitted, or none.

        Raises:
            Unavailable, EngineGone: there is no ready engine.
            Overloaded: the queue is full; the same requests may be admitted later.
            InvalidRequest: the queue could never hold them.
        """
        self.engine()
        tenant = requests[0].tenant
        self._admit([len(request.prompt) for request in requests], tenant)
        channel = Channel((request.id for request in requests), self._abort, tenant)
        for request in requests:
            self._channels[request.id] = channel
            self._unanswered[request.id] = len(request.prompt)
        try:
            for request in requests:
                self._send(wire.Submit(request))
        except Unavailable:
            channel.close()
            raise
        return channel

    def fail_all(self, error: JsloraError) -> None:
        """Let every outstanding sequence end with `error`; their channels' owners cancel them."""
        self._unanswered.clear()
        channels, self._channels = self._channels, {}
        for channel in set(channels.values()):
            channel.fail(copy.copy(error))

    def _admit(self, lengths: list[int], tenant: str) -> None:
        limits = self._config.scheduler
        capacity = limits.max_running + limits.max_queued
        if len(lengths) > capacity or sum(lengths) > limits.max_queued_tokens:
            raise InvalidRequest(
                f"{len(lengths)} sequences with {sum(lengths)} prompt tokens in one request; this "
                f"server queues at most {capacity} sequences and {limits.max_queued_tokens} tokens"
            )
        if self.outstanding + len(lengths) > capacity:
            raise Overloaded(f"the queue is full: {self.outstanding} sequences run or wait")
        if self.outstanding >= capacity // 2:  # before, nobody can have too many
            own = sum(channel.tenant == tenant for channel in self._channels.values())
            if limits.crowded(own, self.outstanding, capacity):
                raise Overloaded(
                    f"the queue is full: {own} sequences of {tenant} run or wait, and what is free "
                    "is kept for other tenants"
                )
        waiting = sum(self._unanswered.values())
        if waiting + sum(lengths) > limits.max_queued_tokens:
            raise Overloaded(f"the queue is full: {waiting} prompt tokens wait")

    def _abort(self, ids: list[str]) -> None:
        for id in ids:
            self._channels.pop(id, None)
            self._unanswered.pop(id, None)
        with contextlib.suppress(Unavailable, EngineGone):  # a dead engine runs nothing
            self.engine()
            self._send(wire.Abort(ids))

    def engine(self) -> EngineInfo:
        """What the engine said of itself.

        Raises:
            Unavailable, EngineGone: it is not ready (any more).
        """
        if self.state == "stopped":
            raise EngineGone("the engine is stopped")
        if self.state != "ready" or self.info is None:
            raise Unavailable(f"the engine is {self.state}")
        return self.info

    def _send(self, command: wire.Command) -> None:
        if self._process is None:
            raise Unavailable("the engine is not running")
        self._process.send(command)

    # What the engine says -------------------------------------------------------------------------

    def _on_news(self, news: wire.News) -> None:
        self._heard = asyncio.get_running_loop().time()
        match news:
            case wire.Events(events):
                self._on_events(events)
            case wire.Pulse(stats, changed, removed):
                self.stats = stats
                self.adapters.update(changed, removed)
            case wire.Reply() | wire.Described():
                self.adapters.answer(news)
            case wire.Progress(stage, done, total, note):
                self._progress(stage, done, total, note)
            case wire.Ready(info):
                self.info = info
                self.adapters.begin(info.adapters)
                self._started.set()
            case wire.Failed(error):
                self._failed = error.error()

    def _on_events(self, events: list[TokenEvent]) -> None:
        channels, unanswered = self._channels, self._unanswered
        for event in events:
            channel = channels.get(event.id)
            if channel is None:  # cancelled while the event was on its way
                continue
            unanswered.pop(event.id, None)
            if event.last:
                del channels[event.id]
            channel.push(event)

    # Life and death -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the engine, and again whenever it dies; cancel this to end it in good order.

        Raises:
            EngineStopped: it failed to start, died too often, or must not be restarted.
        """
        quick = 0
        try:
            while True:
                lived, code = await self._live()
                quick = 0 if lived > QUICK_SECONDS else quick + 1
                hopeless = quick > MAX_QUICK_DEATHS and not self._led(code)
                if not self._config.server.restart_engine or hopeless:
                    raise EngineStopped("the engine died and is not started again", 0)
                await asyncio.sleep(min(0.1 * 2 ** min(quick, 10), LONGEST_PAUSE))
                self.restarts += 1
        finally:
            self.state = "stopped"
            self._fail_everything(Unavailable("the server is shutting down"))

    async def _live(self) -> tuple[float, int]:
        """One life of the engine: the seconds it was ready, and its exit code."""
        loop = asyncio.get_running_loop()
        self._failed, self._started, self._heard = None, asyncio.Event(), None
        process = await EngineProcess.spawn(
            self._command, self._config, self._folder, self._on_news
        )
        self._process = process
        death = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self._become_ready())
        try:
            await self._watch(process, death, ready)
            lived = loop.time() - ready.result() if ready.done() else 0.0
            ready.cancel()
            self._on_death(death.result())
            return lived, death.result()
        finally:
            if ready.done():
                await _finish(process, death)
            ready.cancel()
            process.hang_up()
            await asyncio.wait({death}, timeout=STOP_SECONDS)
            process.kill()
            await death
            process.close()
            self._process = None

    async def _become_ready(self) -> float:
        """The loop's time at which the engine was."""
        await self._started.wait()
        await self.adapters.replay()
        self.state = "ready"
        self.was_ready.set()
        return asyncio.get_running_loop().time()

    async def _watch(
        self, process: EngineProcess, death: asyncio.Task[int], ready: asyncio.Task[float]
    ) -> None:
        """Wait for the death of the engine; one that is ready and silent is killed.

        The leader of a group is from its first news on, because its followers would wait for it.
        """
        group = self._config.distributed.num_processes > 1
        while not death.done():
            waited: set[asyncio.Task[Any]] = {death} if ready.done() else {death, ready}
            await asyncio.wait(waited, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()  # raises what went wrong in it
            if self._heard is None or not (group or self.state == "ready"):
                continue
            silence = asyncio.get_running_loop().time() - self._heard
            if silence > self._patience:
                log.error("the engine has been silent for %.0f s and is killed", silence)
                process.kill()
                await death

    def _on_death(self, code: int) -> None:
        """Fail whatever waits for the engine.

        Raises:
            EngineStopped: it never was ready.
        """
        self.state = "restarting"
        self._fail_everything(EngineFailed("the engine process died while it served this request"))
        reason = self._failed.message if self._failed else f"it exited with code {code}"
        if not self.was_ready.is_set() and not self._led(code):
            raise EngineStopped(f"the engine did not start: {reason}", code, self._failed)
        log.error("the engine process died: %s", reason)

    @property
    def _patience(self) -> float:
        """Seconds that an engine may be silent; a pulse a second may be late by one."""
        group = self._config.distributed
        return HANG_SECONDS if group.num_processes == 1 else group.heartbeat_seconds + 1.0

    def _led(self, code: int) -> bool:
        """Whether an engine ended because its group did, which a new one may not."""
        return self._config.distributed.num_processes > 1 and (code == EXIT_CODE or code < 0)

    def _fail_everything(self, error: JsloraError) -> None:
        self.adapters.fail(error)
        self.fail_all(error)


async def _finish(process: EngineProcess, death: asyncio.Task[int]) -> None:
    """Ask an engine to finish and exit; one that is still starting would not listen."""
    with contextlib.suppress(Unavailable):
        process.send(wire.Drain())
        await asyncio.wait({death}, timeout=STOP_SECONDS)
