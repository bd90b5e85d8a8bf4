"""The engine's core: one thread that owns the device and turns requests into token events.

    inflight = None
    while running:
        drain inbox                              # requests, aborts, adapter commands
        plan = scheduler.plan()                  # may use tokens not yet read
        handle = runner.execute(plan)            # asynchronous; the copy to the host has begun
        if inflight: emit(scheduler.commit(*inflight))
        inflight = handle

Other threads only put commands in the inbox and are called back with events. With look-ahead off
the results of a step are read before the next is planned; the tokens are the same.

Invariants: a step that raises has lost the donated pool. Then every running request ends with a
retryable error, the pool is made anew, and adapters come back from the host tier when asked for.
Every request is told of its end, even by an engine that was closed or could not recover.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version, describe
from jslora.errors import EngineFailed, JsloraError, Unavailable, UnknownModel
from jslora.memory.pages import PageAllocator
from jslora.memory.residency import Residency
from jslora.request import AdapterInfo, ErrorInfo, Request, Stats, TokenEvent
from jslora.runner import Runner, Step
from jslora.schedule.scheduler import Limits, Plan, Scheduler

WRITES_PER_STEP = 4
"""Uploaded chunks written into the pool between two steps."""

Emit = Callable[[list[TokenEvent]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _NamesChanged:
    """An adapter's name is gone, has a new version, or is to be pinned."""


class EngineCore:
    """Scheduler, adapters and runner behind an inbox.

    Args:
        emit: called on the engine thread with the news of each step.
        check_ledger: assert the page ledger after every step.
    """

    def __init__(
        self,
        runner: Runner,
        store: AdapterStore,
        limits: Limits,
        emit: Emit,
        *,
        lookahead: bool = True,
        pinned: set[str] | None = None,
        check_ledger: bool = False,
    ) -> None:
        self.runner, self.store = runner, store
        self._emit, self._lookahead, self._check_ledger = emit, lookahead, check_ledger
        self._pinned_names = pinned or set()
        geometry = runner.geometry
        self._pages = PageAllocator(geometry.pages)
        self.residency = Residency(
            self._pages, store, runner.upload, geometry.layers, geometry.pages,
            geometry.drop_page, runner.upload_rows,
        )  # fmt: skip
        self.scheduler = Scheduler(limits, self._pages, self.residency)
        self._inbox: queue.SimpleQueue[Request | list[str] | _NamesChanged | Future | None] = (
            queue.SimpleQueue()
        )
        self._nameless: set[str] = set()  # on the device or wanted, and registered no more
        self._closing, self._ended = threading.Event(), threading.Event()
        self._last_word: JsloraError = Unavailable("the engine was closed")
        self._steps = self._recoveries = self._ledger_errors = self._failures = 0
        self._step_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread ----------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; everything said of it comes through `emit`."""
        self._put(request)

    def abort(self, ids: list[str]) -> None:
        """Stop requests; events already on their way may still arrive."""
        self._put(ids)

    def load_adapter(
        self, name: str, path: str | None = None, replace: bool = False
    ) -> "Future[AdapterInfo]":
        """Read an adapter below the roots and register it; see `AdapterStore.load`."""
        done: Future[AdapterInfo] = Future()

        def finish(loading: "Future[Version]") -> None:
            if loading.cancelled():
                done.set_exception(self._last_word)
            elif (error := loading.exception()) is not None:
                self._failures += 1
                done.set_exception(error)
            else:
                if replace or name in self._pinned_names:
                    self._put(_NamesChanged())
                info = describe(name, loading.result(), "host")
                done.set_result(self._with_device_state(info))

        self.store.load(name, path, replace).add_done_callback(finish)
        return done

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Take a name away; requests that hold the adapter finish, then its pages are freed.

        Raises:
            UnknownModel: no adapter has that name.
        """
        info = self.adapter(name)
        self.store.unload(name)
        self._put(_NamesChanged())
        return replace(info, state="draining")

    def adapters(self) -> list[AdapterInfo]:
        """Everything registered, with where it is and how many requests it serves."""
        return [self._with_device_state(info) for info in self.store.info()]

    def adapter(self, name: str) -> AdapterInfo:
        """One adapter's report.

        Raises:
            UnknownModel: no adapter has that name.
        """
        for info in self.store.info():
            if info.name == name:
                return self._with_device_state(info)
        raise UnknownModel(f"no adapter {name!r} is registered", param="model")

    def _with_device_state(self, info: AdapterInfo) -> AdapterInfo:
        resident = self.residency.residents.get(info.digest)
        if resident is None or info.state == "failed":
            return info
        state = "loading" if resident.uploads else "device"
        return replace(info, state=state, in_flight=resident.users)

    def stats(self) -> Stats:
        """Counters and gauges, read without stopping the engine."""
        s, r = self.scheduler, self.residency
        running, waiting = list(s.running), list(s.waiting)
        adapters = sum(len(resident.placement.pages) for resident in list(r.residents.values()))
        used = self._pages.total - 1 - self._pages.free
        return Stats(
            running=len(running), waiting=len(waiting), pages_total=self._pages.total - 1,
            pages_free=self._pages.free, pages_kv=max(0, used - adapters), pages_adapters=adapters,
            ledger_errors=self._ledger_errors, steps=self._steps, step_seconds=self._step_seconds,
            prompt_tokens=s.prompt_tokens, generated_tokens=s.generated_tokens,
            preemptions=s.preemptions, corrupt_requests=s.corrupt, recoveries=self._recoveries,
            compilations=self.runner.compilations, compile_seconds=self.runner.compile_seconds,
            adapter_loads=r.loads, adapter_evictions=r.evictions, adapter_failures=self._failures,
            running_adapters=s.adapters_of(running), waiting_adapters=s.adapters_of(waiting),
        )  # fmt: skip

    def run_on_engine(self, call: Callable[[], Any]) -> Any:
        """Run a function between two steps on the engine thread and return what it returns."""
        done: Future[Any] = Future()
        done.call = call  # type: ignore[attr-defined]
        self._put(done)
        return done.result()

    @property
    def alive(self) -> bool:
        """Whether it serves; False once it was closed or could not recover."""
        return not self._ended.is_set()

    def close(self) -> None:
        """Stop after the step in flight; requests that still run or wait end with Unavailable."""
        self._closing.set()
        self._inbox.put(None)
        self._thread.join()
        self.runner.close()
        self.store.close()

    def _put(self, command: Any) -> None:
        self._inbox.put(command)
        if self._ended.is_set():  # nobody else looks any more
            self._refuse_inbox()

    # The engine thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            log.critical("the engine ends: it could not recover", exc_info=True)
            self._last_word = EngineFailed("the engine failed and could not recover")
        try:
            ended = [*self.scheduler.failures(), *self.scheduler.fail_all(self._last_word)]
            self._emit_all(ended)
        finally:
            self._ended.set()
            self._refuse_inbox()

    def _serve(self) -> None:
        inflight: tuple[Plan, Step] | None = None
        while not self._closing.is_set():
            self._drain_inbox(wait=inflight is None and self._resting)
            started = time.monotonic()
            inflight = self._attempt(inflight)
            self._step_seconds += time.monotonic() - started

    @property
    def _resting(self) -> bool:
        """Whether nothing will happen before the next command."""
        return self.scheduler.idle and not self.residency.loading

    def _attempt(self, inflight: tuple[Plan, Step] | None) -> tuple[Plan, Step] | None:
        """A turn; if it fails, the way back."""
        try:
            return self._turn(inflight)
        except Exception:  # whatever the device raised: the pool is gone
            log.exception("a step failed; the pool is made anew")
        self._recover()
        return None

    def _turn(self, inflight: tuple[Plan, Step] | None) -> tuple[Plan, Step] | None:
        """One step ahead, one step read."""
        if inflight and not self._lookahead:
            self._commit(*inflight)
            inflight = None
        for chunk in self.residency.writes(WRITES_PER_STEP):
            self.runner.write(chunk)
        plan = self.scheduler.plan()
        handle = (plan, self.runner.execute(plan)) if plan else None
        if inflight:
            self._commit(*inflight)
        if plan is None:
            self._emit_all(self.scheduler.failures())
            if inflight is None and not self._resting:
                time.sleep(0.0005)  # an adapter is being read or transferred
        self._free_nameless()
        return handle

    def _commit(self, plan: Plan, step: Step) -> None:
        events = self.scheduler.commit(plan, step.wait())
        self._steps += 1
        self._emit_all(events)
        if self._check_ledger:
            try:
                self.scheduler.check()
            except AssertionError:
                self._ledger_errors += 1
                raise

    def _recover(self) -> None:
        self._recoveries += 1
        error = EngineFailed("the step that served this request failed; send it again")
        self._emit_all(self.scheduler.fail_running(error))
        self.residency.forget_all()
        self.runner.reset()

    def _free_nameless(self) -> None:
        """Adapters without a name leave once no request holds or waits for them."""
        if self._nameless:
            for digest in self._nameless - self.scheduler.digests:
                self.residency.retire(digest)
                self._nameless.discard(digest)

    def _emit_all(self, events: list[TokenEvent]) -> None:
        if events:
            self._emit(events)

    def _drain_inbox(self, *, wait: bool) -> None:
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._obey(command)

    def _obey(self, command: Any) -> None:
        match command:
            case Request():
                try:
                    self.scheduler.add(command, self._version_of(command))
                except Exception as error:  # of any kind: it is this request's alone
                    self._refuse(command, error)
            case list():
                self.scheduler.abort(command)
            case _NamesChanged():
                self._sort_out_names()
            case Future():
                try:
                    command.set_result(command.call())  # type: ignore[attr-defined]
                except Exception as error:
                    command.set_exception(error)

    def _sort_out_names(self) -> None:
        versions = {name: self.store.get(name) for name in self.store.names()}
        named = {name: version.digest for name, version in versions.items() if version}
        self.residency.pinned = {named[name] for name in self._pinned_names & named.keys()}
        known = self.residency.residents.keys() | self.scheduler.digests
        self._nameless = known - {*named.values()}

    def _refuse(self, request: Request, error: Exception) -> None:
        if isinstance(error, JsloraError):
            info = ErrorInfo(type=error.type, message=error.message, param=error.param)
        else:
            log.error("a request could not be queued", exc_info=error)
            info = ErrorInfo(type=JsloraError.type, message="the request could not be queued")
        self._emit([TokenEvent(id=request.id, error=info)])

    def _refuse_inbox(self) -> None:
        """Answer what comes after the end; from the thread that sent it, or the engine's last."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            match command:
                case Request():
                    self._refuse(command, self._last_word)
                case Future():
                    command.set_exception(self._last_word)

    def _version_of(self, request: Request) -> Version | None:
        if request.adapter is None:
            return None
        version = self.store.get(request.adapter)
        if version is None:
            raise UnknownModel(f"no adapter {request.adapter!r} is registered", param="model")
        self.residency.revive(version.digest)
        self._nameless.discard(version.digest)
        return version
