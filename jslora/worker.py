"""The engine process: an `EngineCore` behind one socket, alive as long as its parent.

It reads one JSON line from standard input, {"config": ..., "folder": ...}, connects to the given
ZeroMQ address, reports start-up progress, and then serves the messages of `jslora.wire`. When
standard input closes the parent is gone, and it exits at once. Its exit code tells why: 0 drained,
2 configuration, 3 model, 4 device, 5 the group of processes that it led has ended.
"""

import argparse
import contextlib
import gc
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from jslora import wire
from jslora.child import end_with_parent, read_order
from jslora.config import EngineConfig
from jslora.distributed.section import EXIT_CODE
from jslora.errors import ConfigError, EngineFailed, JsloraError, UnknownModel
from jslora.logs import configure
from jslora.request import AdapterInfo, ErrorInfo, Stats, TokenEvent

PULSE_SECONDS = 1.0
_POLL_MILLISECONDS = 100
_LINGER_MILLISECONDS = 2000
_LAST_WORDS_SECONDS = 3.0
_SWITCH_SECONDS = 0.0005  # after so long, a busy thread lets the engine's have the interpreter

log = logging.getLogger("jslora.worker")  # under -m, __name__ is __main__


class Worker:
    """The socket's one thread, and the core it serves."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.connect(address)
        # The socket belongs to the main thread; others hand it news and ring the bell.
        self._news: queue.SimpleQueue[wire.News] = queue.SimpleQueue()
        self._bell_in = self._context.socket(zmq.PAIR)
        self._bell_out = self._context.socket(zmq.PAIR)
        self._bell_in.bind("inproc://news")
        self._bell_out.connect("inproc://news")
        self._bell_lock = threading.Lock()
        self._open: set[str] = set()  # requests whose last event was not sent yet
        self._draining = False
        self._told: dict[str, AdapterInfo] = {}  # what the client knows to be registered
        self._group_ended: str | None = None

    def tell(self, news: wire.News) -> None:
        """Send a message; from any thread."""
        self._news.put(news)
        with self._bell_lock, contextlib.suppress(zmq.Again):  # full: it rings already
            self._bell_out.send(b"", zmq.NOBLOCK)

    def tell_progress(self, stage: str, done: int, total: int, note: str) -> None:
        """Report start-up progress; from any thread, sent as soon as the main thread looks."""
        self.tell(wire.Progress(stage, done, total, note))

    def tell_events(self, events: list[TokenEvent]) -> None:
        self.tell(wire.Events(events))

    def start(self, config: EngineConfig, folder: Path | None) -> int:
        """Build the core in a thread of its own, passing its progress on, and serve it."""
        from jslora.build import build_core  # jax comes in here, after the socket answers

        outcome: list[Any] = []

        def build() -> None:
            try:
                built = build_core(
                    config, folder, self.tell_events, self.tell_progress, lost=self._lose_group
                )
                outcome.append(built)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=build, name="build")
        thread.start()
        self._pass_on(thread, pulses=config.distributed.num_processes > 1)
        if isinstance(outcome[0], BaseException):
            return self._give_up(outcome[0])
        self._core, info = outcome[0]
        self._told = self._core.adapters.registered()
        self.tell(wire.Ready(replace(info, adapters=tuple(self._told.values()))))
        gc.collect()
        gc.freeze()  # what was built stays: collecting must not go through it again and again
        return self._serve()

    def _pass_on(self, building: threading.Thread, *, pulses: bool) -> None:
        """Send what a thread tells while it builds, and if asked that this process lives."""
        pulse_at = 0.0
        while building.is_alive() or not self._news.empty():
            self._bell_in.poll(_POLL_MILLISECONDS)
            if pulses and time.monotonic() >= pulse_at:
                pulse_at = time.monotonic() + PULSE_SECONDS
                self.tell(wire.Pulse(Stats()))
            self._flush()
            self._end_with_group()
        self._end_with_group()  # what failed since may have failed because of it

    def _lose_group(self, reason: str) -> None:
        """The group of processes that this one leads has ended; from any thread."""
        self._group_ended = reason
        last = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (EXIT_CODE,))
        last.daemon = True
        last.start()  # should the main thread not come to it
        self.tell(wire.Failed(ErrorInfo.of(EngineFailed(f"the group has ended: {reason}"))))

    def _end_with_group(self) -> None:
        """End at once if the group has: other threads may wait in a step for ever."""
        if self._group_ended is not None:
            self._leave(EXIT_CODE)
            os._exit(EXIT_CODE)

    def _give_up(self, error: BaseException) -> int:
        words = f"{type(error).__name__}: {error}"[:500]
        self.tell(wire.Failed(_error_info(error, words)))
        return self._leave(exit_code(error))

    def _leave(self, code: int) -> int:
        """Send all there is to say before the process may end."""
        self._flush()
        self._context.destroy(linger=_LINGER_MILLISECONDS)
        return code

    def _serve(self) -> int:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell_in, zmq.POLLIN)
        pulse_at = 0.0
        while True:
            poller.poll(_POLL_MILLISECONDS)
            self._flush()
            self._end_with_group()
            while self._socket.poll(0):
                self._obey(wire.decode_command(self._socket.recv()))
            if time.monotonic() >= pulse_at:
                pulse_at = time.monotonic() + PULSE_SECONDS
                self._pulse()
            dead, drained = not self._core.alive, self._draining and not self._open
            if dead or drained:
                self._end_with_group()
                self._core.close()
                return self._leave(4 if dead else 0)

    def _pulse(self) -> None:
        """Statistics, and what became of names since last told.

        Infos that did not change are the same objects, so that thousands cost microseconds. News
        from before the statistics leaves before them. The pulse itself goes past the queue: a reply
        put there since the look at the names must not be undone by it.
        """
        stats = self._core.stats()
        self._flush()
        told, self._told = self._told, self._core.adapters.registered()
        changed = [info for name, info in self._told.items() if told.get(name) is not info]
        removed = [name for name in told if name not in self._told]
        self._socket.send(wire.encode(wire.Pulse(stats, changed, removed)))

    def _flush(self) -> None:
        while self._bell_in.poll(0):
            self._bell_in.recv()
        while not self._news.empty():
            news = self._news.get()
            self._socket.send(wire.encode(news))
            if isinstance(news, wire.Events):
                self._open -= {event.id for event in news.events if event.last}

    def _obey(self, command: wire.Command) -> None:
        match command:
            case wire.Submit(request):
                self._open.add(request.id)
                self._core.submit(request)
            case wire.Abort(ids):
                self._open -= {*ids}
                self._core.abort(ids)
            case wire.Drain():
                self._draining = True
            case wire.LoadAdapter(seq, name, path, again):
                self._answer(seq, lambda: self._core.adapters.load(name, path, again))
            case wire.UnloadAdapter(seq, name, drain_seconds):
                self._answer(seq, lambda: self._core.adapters.unload(name, drain_seconds))
            case wire.Describe(seq, None):
                # Thousands take tens of milliseconds, for which events should not wait.
                threading.Thread(target=self._describe_all, args=(seq,), daemon=True).start()
            case wire.Describe(seq, str(name)):
                self.tell(wire.Described(seq, self._report(name)))

    def _answer(self, seq: int, command: "Callable[[], Future[AdapterInfo]]") -> None:
        """Give a command, and reply when it is done, from whichever thread that is."""
        try:
            outcome = command()
        except JsloraError as error:
            outcome = Future()
            outcome.set_exception(error)
        outcome.add_done_callback(lambda done: self.tell(_reply(seq, done)))

    def _describe_all(self, seq: int) -> None:
        self.tell(wire.Described(seq, self._core.adapters.reports()))

    def _report(self, name: str) -> list[AdapterInfo]:
        try:
            return [self._core.adapters.report(name)]
        except UnknownModel:
            return []


def _reply(seq: int, done: "Future[AdapterInfo]") -> wire.Reply:
    error = done.exception()
    if error is None:
        return wire.Reply(seq, done.result())
    if not isinstance(error, JsloraError):
        log.error("an adapter command failed", exc_info=error)
    return wire.Reply(seq, None, _error_info(error, "the command failed; see the log"))


def _error_info(error: BaseException, otherwise: str) -> ErrorInfo:
    """An error as data; one that is not meant for users is told in other words."""
    if isinstance(error, JsloraError):
        return ErrorInfo.of(error)
    return ErrorInfo(type=JsloraError.type, message=otherwise)


def exit_code(error: BaseException) -> int:
    """2 for the configuration, 3 for the model or an adapter, 4 for the device."""
    if isinstance(error, ConfigError):
        return 2
    return 3 if isinstance(error, JsloraError) else 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="jslora's engine process")
    parser.add_argument("--socket", help="ZeroMQ address to connect to")
    parser.add_argument("--check", action="store_true", help="print the memory plan and exit")
    options = parser.parse_args(arguments)
    config, folder = read_order()
    configure(config.logging)
    if options.check:
        return check(config, folder)
    sys.setswitchinterval(_SWITCH_SECONDS)
    end_with_parent()
    return Worker(options.socket).start(config, folder)


def check(config: EngineConfig, folder: Path | None) -> int:
    """Print the memory plan."""
    from jslora.build import memory_plan, read_model_config

    try:
        plan = memory_plan(config, read_model_config(config, folder))
    except JsloraError as error:
        print(error.message, file=sys.stderr)
        return exit_code(error)
    print(plan.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
