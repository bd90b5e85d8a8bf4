"""The engine's adapters as the front end knows them: their names, and the commands about them.

Kept here is which names there are; where an adapter's bytes lie and who uses it, the engine is
asked each time. Invariants:
- a name is refused from the moment its unload is asked for, however long the engine drains it;
- what was loaded and unloaded at run time is put back after a restart of the engine (`replay`), so
  an unload that the engine's death cuts short has succeeded: nothing of the adapter is left;
- who asks for reports of all adapters while they are made shares them, unless a change was answered
  since; and they are made so seldom that they cost the engine a small share of its time.
"""

import asyncio
import copy
import logging
from collections.abc import Callable, Iterable

import msgspec

from jslora import wire
from jslora.errors import EngineFailed, InvalidRequest, JsloraError, UnknownModel
from jslora.request import AdapterInfo

log = logging.getLogger("jslora.server")

PAUSE_PER_ADAPTER = 1e-4  # seconds between two reports of all; making one takes a tenth of this

Change = wire.LoadAdapter | wire.UnloadAdapter
Answer = wire.Reply | wire.Described


class Adapters:
    """The adapters of a client's engine, whichever process that is at the moment.

    Args:
        ready: raises what a caller should be told while no engine serves.
        send: hands a command to the engine; raises Unavailable if it is not connected.

    Attributes:
        known: name -> what was said of it when it was registered.
    """

    def __init__(self, ready: Callable[[], object], send: Callable[[wire.Command], None]) -> None:
        self.known: dict[str, AdapterInfo] = {}
        self._ready, self._send = ready, send
        self._loading: set[str] = set()
        self._journal: dict[str, Change] = {}
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._seq = 0
        self._reports: asyncio.Task[list[AdapterInfo]] | None = None
        self._rested = 0.0  # the event loop's time from which all may be described again

    def taken(self, name: str) -> bool:
        """Whether an adapter of this name is registered or about to be."""
        return name in self.known or name in self._loading

    # Commands -------------------------------------------------------------------------------------

    async def load(self, name: str, path: str | None, replace: bool) -> None:
        """Register an adapter; `path` None means the folder of that name below a root.

        Raises:
            InvalidRequest: the name is taken.
            JsloraError: what the engine answered, or that it died meanwhile.
        """
        self._ready()
        if name in self._loading or (name in self.known and not replace):
            raise InvalidRequest(f"the name {name!r} is taken", param="lora_name")
        self._loading.add(name)
        try:
            await self._change(wire.LoadAdapter(0, name, path, replace))
        finally:
            self._loading.discard(name)
        # After a restart the name may be there again from the configuration.
        self._journal[name] = wire.LoadAdapter(0, name, path, True)

    async def unload(self, name: str, drain_seconds: float) -> None:
        """Refuse an adapter from now on, and return once nothing of it is left in the engine.

        Args:
            drain_seconds: how long requests that hold it may still run.

        Raises:
            UnknownModel: no adapter has that name.
            InvalidRequest: it is being replaced.
            JsloraError: as `load`; the adapter is served as before.
        """
        self._ready()
        if name not in self.known:
            raise UnknownModel(f"the adapter {name!r} is not loaded", param="lora_name")
        if name in self._loading:
            raise InvalidRequest(f"the adapter {name!r} is being loaded", param="lora_name")
        info, before = self.known.pop(name), self._journal.get(name)
        command = self._journal[name] = wire.UnloadAdapter(0, name, drain_seconds)
        try:
            await self._ask(command)
        except EngineFailed:
            return  # all that was left of it went with the engine
        except UnknownModel:
            raise
        except JsloraError:
            self.known.setdefault(name, info)
            self._write_back(name, command, before)
            raise

    def _write_back(self, name: str, command: Change, before: Change | None) -> None:
        """Undo the journal's last entry of a name, unless there is a later one."""
        if self._journal.get(name) is command:
            del self._journal[name]
            if before is not None:
                self._journal[name] = before

    async def replay(self) -> None:
        """Put a restarted engine's adapters back to what they were."""
        for name, command in list(self._journal.items()):
            if isinstance(command, wire.UnloadAdapter) and name not in self.known:
                continue  # it was not there from the configuration either
            try:
                await self._change(command)
            except JsloraError as error:
                log.error("adapter %s is not as it was before the restart: %s", name, error)

    async def _change(self, command: Change) -> None:
        """Have a command obeyed, and what is known follow."""
        answer = await self._ask(command)
        if isinstance(command, wire.UnloadAdapter):
            self.known.pop(command.name, None)
        else:
            assert isinstance(answer, wire.Reply) and answer.adapter, f"{answer} to {command}"
            self.known[command.name] = answer.adapter

    # Reports --------------------------------------------------------------------------------------

    async def describe(self, name: str) -> AdapterInfo:
        """One adapter's present state.

        Raises:
            UnknownModel: the engine knows of none.
            JsloraError: the engine died meanwhile.
        """
        self._ready()
        answer = await self._ask(wire.Describe(0, name))
        assert isinstance(answer, wire.Described), f"{answer} to a Describe"
        if not answer.adapters:
            raise UnknownModel("there is no adapter of this name", param="name")
        return answer.adapters[0]

    async def describe_all(self) -> list[AdapterInfo]:
        """The present state of every adapter, with all that the caller can have seen of it.

        Raises:
            JsloraError: the engine died meanwhile.
        """
        self._ready()
        if self._reports is None or self._reports.done():
            self._reports = asyncio.create_task(self._describe_all())
        return await asyncio.shield(self._reports)

    async def _describe_all(self) -> list[AdapterInfo]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._rested - loop.time())
        answer = await self._ask(wire.Describe(0))
        assert isinstance(answer, wire.Described), f"{answer} to a Describe"
        self._rested = loop.time() + PAUSE_PER_ADAPTER * len(answer.adapters)
        return answer.adapters

    # What the engine says -------------------------------------------------------------------------

    def begin(self, adapters: Iterable[AdapterInfo]) -> None:
        """Take what a new engine has registered."""
        self.known = {info.name: info for info in adapters}

    def update(self, changed: Iterable[AdapterInfo], removed: Iterable[str]) -> None:
        """Take what an engine tells of names by itself."""
        self.known |= {info.name: info for info in changed}
        for name in removed:
            self.known.pop(name, None)

    def answer(self, answer: Answer) -> None:
        """Hand an answer to who waits for it."""
        if isinstance(answer, wire.Reply):
            self._reports = None  # what is being reported may be from before
        waiting = self._answers.get(answer.seq)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def fail(self, error: JsloraError) -> None:
        """Let every command that waits for its answer end with `error`."""
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(copy.copy(error))

    async def _ask(self, command: Change | wire.Describe) -> Answer:
        self._seq += 1
        seq = self._seq
        waiting = self._answers[seq] = asyncio.get_running_loop().create_future()
        try:
            self._send(msgspec.structs.replace(command, seq=seq))
            answer = await waiting
        finally:
            self._answers.pop(seq, None)
        if isinstance(answer, wire.Reply) and answer.error is not None:
            raise answer.error.error()
        return answer
