"""The front end's view of the adapters, with the engine's answers given by hand."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from jslora import wire
from jslora.errors import AdapterRejected, EngineFailed, InvalidRequest, UnknownModel
from jslora.request import AdapterInfo, ErrorInfo
from jslora.server.registry import Adapters


def info_of(name: str) -> AdapterInfo:
    return AdapterInfo(name=name, digest="", state="registered", rank=8)


class Engine:
    """Keeps what it is sent."""

    def __init__(self, *names: str) -> None:
        self.sent: list[Any] = []
        self.adapters = Adapters(lambda: None, self.sent.append)
        self.adapters.begin(map(info_of, names))

    async def begin(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let a call go on until it waits for an answer."""
        task = asyncio.create_task(call)
        for _ in range(5):
            await asyncio.sleep(0)
        return task

    def reply(self, command: Any, error: str | None = None) -> None:
        """Answer a command with the adapter it names, or an error of this type."""
        if error is None:
            self.adapters.answer(wire.Reply(command.seq, info_of(command.name)))
        else:
            words = ErrorInfo(type=error, message="no")
            self.adapters.answer(wire.Reply(command.seq, None, words))

    def describe(self, command: Any, *names: str) -> None:
        self.adapters.answer(wire.Described(command.seq, [info_of(name) for name in names]))


def test_reports_are_shared_until_something_changes() -> None:
    async def run() -> None:
        engine = Engine("a")
        askers = [await engine.begin(engine.adapters.describe_all()) for _ in range(3)]
        assert engine.sent == [wire.Describe(1)]
        load = await engine.begin(engine.adapters.load("b", None, False))
        engine.reply(engine.sent[1])
        await load
        later = await engine.begin(engine.adapters.describe_all())
        assert engine.sent[2:] == [wire.Describe(3)]
        engine.describe(engine.sent[2], "a", "b")
        engine.describe(engine.sent[0], "a")
        assert [len(await asker) for asker in askers] == [1, 1, 1]
        assert len(await later) == 2

    asyncio.run(run())


def test_a_name_is_gone_while_it_drains_and_back_if_the_engine_refuses() -> None:
    async def run() -> None:
        engine = Engine("a")
        unload = await engine.begin(engine.adapters.unload("a", 1.0))
        assert engine.sent == [wire.UnloadAdapter(1, "a", 1.0)]
        assert not engine.adapters.taken("a")
        with pytest.raises(UnknownModel):
            await engine.adapters.unload("a", 1.0)
        engine.reply(engine.sent[0], "adapter_rejected")
        with pytest.raises(AdapterRejected):
            await unload
        assert engine.adapters.taken("a")
        await engine.adapters.replay()
        assert len(engine.sent) == 1  # there is nothing to put back

    asyncio.run(run())


def test_an_unloads_end_takes_nothing_from_a_later_load() -> None:
    """Neither now nor when a new engine is told."""

    async def run() -> None:
        engine = Engine("a")
        unload = await engine.begin(engine.adapters.unload("a", 9.0))
        load = await engine.begin(engine.adapters.load("a", "elsewhere", False))
        engine.reply(engine.sent[1])
        await load
        engine.adapters.fail(EngineFailed("died"))
        await unload  # nothing of the old one is left
        assert engine.adapters.taken("a")
        engine.adapters.begin([info_of("a")])
        replay = await engine.begin(engine.adapters.replay())
        assert engine.sent[2:] == [wire.LoadAdapter(3, "a", "elsewhere", True)]
        engine.reply(engine.sent[2])
        await replay

    asyncio.run(run())


def test_what_was_unloaded_stays_so_in_the_next_engine() -> None:
    async def run() -> None:
        engine = Engine("a", "b")
        unloads = [await engine.begin(engine.adapters.unload(name, 9.0)) for name in "ab"]
        engine.reply(engine.sent[0])
        engine.adapters.fail(EngineFailed("died"))
        for unload in unloads:
            await unload
        engine.adapters.begin([info_of("b")])  # a is not in the configuration
        replay = await engine.begin(engine.adapters.replay())
        assert engine.sent[2:] == [wire.UnloadAdapter(3, "b", 9.0)]
        engine.reply(engine.sent[2])
        await replay
        assert engine.adapters.known == {}

    asyncio.run(run())


def test_a_name_that_is_being_loaded_is_taken() -> None:
    async def run() -> None:
        engine = Engine("a")
        load = await engine.begin(engine.adapters.load("b", None, False))
        again = await engine.begin(engine.adapters.load("a", None, True))
        assert engine.adapters.taken("b")
        for call in (
            engine.adapters.load("b", None, True),
            engine.adapters.load("a", None, True),
            engine.adapters.load("a", None, False),
            engine.adapters.unload("a", 1.0),
        ):
            with pytest.raises(InvalidRequest):
                await call
        engine.reply(engine.sent[0], "adapter_rejected")
        engine.reply(engine.sent[1])
        with pytest.raises(AdapterRejected):
            await load
        await again
        assert not engine.adapters.taken("b") and engine.adapters.taken("a")

    asyncio.run(run())


def test_news_of_names_is_followed() -> None:
    engine = Engine("a", "b")
    engine.adapters.update([info_of("c"), info_of("a")], ["b", "never seen"])
    assert engine.adapters.known.keys() == {"a", "c"}
