"""The engine's core: one thread that owns the device and turns requests into token events.

    inflight = None
    while running:
        drain inbox                              # requests, aborts
        scheduler.fetch()                        # bring the adapters of those who wait
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
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.errors import EngineFailed, JsloraError, Unavailable
from jslora.lifecycle import Lifecycle
from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency, write_limit
from jslora.memory.room import Room
from jslora.memory.worth import Clock
from jslora.request import MAX_NAMED, ErrorInfo, Request, Stats, TokenEvent
from jslora.runner import DispatchedPlan, Runner
from jslora.schedule import watch
from jslora.schedule.plan import Limits, Plan
from jslora.schedule.scheduler import PREFETCH, Scheduler
from jslora.schedule.settings import SchedulerSection

PATIENCE = 0.002
"""Seconds a step may wait for a transfer: what comes later waits for a whole step."""

NAP = 0.0005
"""Seconds between two looks at a transfer or a read while there is nothing else to do."""

Emit = Callable[[list[TokenEvent]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A request and the adapters it was bound to when it was sent."""

    request: Request
    registrations: tuple[Registration, ...]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A dispatched step, since when (of `time.monotonic`)."""

    plan: Plan
    step: DispatchedPlan
    since: float


class EngineCore:
    """Scheduler, adapters and runner behind an inbox.

    Args:
        emit: called on the engine thread with the news of each step.
        section: the policies of the scheduler; by default first come, first served.
        check_ledger: assert the page ledger after every step.
    """

    def __init__(
        self,
        runner: Runner,
        store: AdapterStore,
        limits: Limits,
        emit: Emit,
        *,
        section: SchedulerSection | None = None,
        lookahead: bool = True,
        prefix_cache: bool = True,
        pinned: set[str] | None = None,
        drain_seconds: float = 30.0,
        check_ledger: bool = False,
    ) -> None:
        self.runner, self.store = runner, store
        self._emit, self._lookahead, self._check_ledger = emit, lookahead, check_ledger
        geometry, clock = runner.geometry, Clock()
        self._pages = PageAllocator(geometry.pages)
        self.prefix = PrefixCache(self._pages, clock, enabled=prefix_cache)
        self.residency = Residency(
            self._pages, clock, runner.upload, geometry.layers, geometry.pages,
            geometry.drop_page, runner.upload_rows,
        )  # fmt: skip
        room = Room(self._pages, self.prefix, self.residency)
        self.scheduler = Scheduler(limits, room, store, section)
        self._inbox: queue.SimpleQueue[_Arrival | list[str] | Future | None] = queue.SimpleQueue()
        self.adapters = Lifecycle(
            store, room, self.scheduler, lambda: self._inbox.put(None),
            pinned=pinned or set(), drain_seconds=drain_seconds,
        )  # fmt: skip
        self._closing, self._ended = threading.Event(), threading.Event()
        self._last_word: JsloraError = Unavailable("the engine was closed")
        self._steps = self._recoveries = self._ledger_errors = 0
        self._step_seconds = self._read_at = self._last_step = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread ----------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; everything said of it comes through `emit`.

        It is bound to what its adapters' names mean now, whatever happens to the names later.
        """
        bound: list[Registration] = []
        try:
            for adapter in request.adapters:
                bound.append(self.store.bind(adapter.name))
        except JsloraError as error:
            self._refuse(request, error, bound)
            return
        if len(self.scheduler.waiting) < PREFETCH:  # or it would push out what is needed sooner
            for registration in bound:
                self.store.prefetch(registration)
        self._put(_Arrival(request, tuple(bound)))

    def abort(self, ids: list[str]) -> None:
        """Stop requests; events already on their way may still arrive."""
        self._put(ids)

    def stats(self) -> Stats:
        """Counters and gauges, read without stopping the engine."""
        s, r, p, store = self.scheduler, self.residency, self.prefix, self.store.stats
        running, waiting = list(s.running), list(s.waiting)
        now = time.monotonic()
        oldest = watch.oldest(waiting, now)
        adapters = sum(len(resident.placement.pages) for resident in list(r.residents.values()))
        used, cached = self._pages.total - 1 - self._pages.free, p.idle
        return Stats(
            running=len(running), waiting=len(waiting), pages_total=self._pages.total - 1,
            pages_free=self._pages.free, pages_kv=max(0, used - adapters - cached),
            pages_cached=cached, pages_adapters=adapters, pages_idle=r.pages_idle,
            ledger_errors=self._ledger_errors, steps=self._steps, step_seconds=self._step_seconds,
            prompt_tokens=s.prompt_tokens, generated_tokens=s.generated_tokens,
            prefix_asked_tokens=s.asked_tokens, prefix_hit_tokens=s.hit_tokens,
            prefix_evictions=p.evictions,
            preemptions=s.preemptions, corrupt_requests=s.corrupt, recoveries=self._recoveries,
            compilations=self.runner.compilations, compile_seconds=self.runner.compile_seconds,
            adapters_registered=len(self.adapters.registered()), adapters_host=store.host_count,
            adapters_device=len(r.residents), host_bytes=store.host_bytes,
            adapter_loads=r.loads, adapter_evictions=r.evictions,
            adapter_failures=store.failures, adapter_seconds=store.seconds,
            running_adapters=watch.adapters(running), waiting_adapters=watch.adapters(waiting),
            idle_adapters=self.adapters.idle(MAX_NAMED),
            too_late=s.too_late, rate_limited=s.rate_limited,
            oldest_wait=oldest[0][1] if oldest else 0.0, oldest_adapters=oldest,
            tenants=watch.tenants(running, waiting, s.policies.service(), now),
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
            self.adapters.close(self._last_word)
            self._refuse_inbox()

    def _serve(self) -> None:
        inflight: _InFlight | None = None
        while not self._closing.is_set():
            self._drain_inbox(wait=inflight is None and self._resting)
            started = time.monotonic()
            inflight = self._attempt(inflight)
            self._step_seconds += time.monotonic() - started

    @property
    def _resting(self) -> bool:
        """Whether nothing will happen before the next command."""
        return self.scheduler.idle and self.adapters.resting and not self.residency.loading

    def _attempt(self, inflight: _InFlight | None) -> _InFlight | None:
        """A turn; if it fails, the way back."""
        try:
            return self._turn(inflight)
        except Exception:  # whatever the device raised: the pool is gone
            log.exception("a step failed; the pool is made anew")
        self._recover()
        return None

    def _turn(self, inflight: _InFlight | None) -> _InFlight | None:
        """One step ahead, one step read."""
        if inflight and not self._lookahead:
            self._commit(inflight)
            inflight = None
        self.scheduler.fetch()
        self.adapters.bring_pinned()
        for chunk in self.residency.writes(write_limit(self._last_step), PATIENCE):
            self.runner.write(chunk)
        plan, now = self.scheduler.plan(), time.monotonic()
        ahead = _InFlight(plan, self.runner.execute(plan), now) if plan else None
        if inflight:
            self._commit(inflight)
        if plan is None:
            self._emit_all(self.scheduler.failures())
            if inflight is None and not self._resting:
                time.sleep(NAP)  # an adapter is being read or transferred
        self._emit_all(self.adapters.bury())
        return ahead

    def _commit(self, done: _InFlight) -> None:
        events = self.scheduler.commit(done.plan, done.step.wait())
        self._time(done)
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
        ended = self.scheduler.fail(self.scheduler.running, error)
        try:
            self.residency.forget_all()
            self.prefix.clear()
            self.runner.reset()
        finally:
            self._emit_all(ended)  # when what they hear of is so

    def _time(self, done: _InFlight) -> None:
        """Tell what a step took, from when the one before it was read."""
        began, self._read_at = max(self._read_at, done.since), time.monotonic()
        self._last_step = self._read_at - began
        self.scheduler.took(done.plan, self._last_step)

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
            case _Arrival(request, registrations):
                try:
                    self.scheduler.add(request, registrations)
                except Exception as error:  # of any kind: it is this request's alone
                    self._refuse(request, error, registrations)
            case list():
                self.scheduler.abort(command)
            case Future():
                try:
                    command.set_result(command.call())  # type: ignore[attr-defined]
                except Exception as error:
                    command.set_exception(error)

    def _refuse(
        self, request: Request, error: Exception, registrations: Iterable[Registration]
    ) -> None:
        for registration in registrations:
            self.store.release(registration)
        if isinstance(error, JsloraError):
            info = ErrorInfo.of(error)
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
                case _Arrival(request, registrations):
                    self._refuse(request, self._last_word, registrations)
                case Future():
                    command.set_exception(self._last_word)
