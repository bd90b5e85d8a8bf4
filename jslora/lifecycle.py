"""The life of adapters in a running engine: loaded, pinned, reported, drained, buried.

Names and files are the store's, pages the residency's; this is what happens between them over time.
An unload refuses new requests at once, lets those that hold the adapter finish, ends them when its
time is over, and is answered only when nothing of the adapter is left on the device, in the prefix
cache or in host memory. The methods of the first part may be called from any thread, those of the
second by the engine thread, between two steps.
"""

import heapq
import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.errors import AdapterRejected, EngineFailed, JsloraError, Unavailable
from jslora.memory.room import Room
from jslora.request import AdapterInfo, TokenEvent
from jslora.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Drain:
    """An unloaded adapter whose requests may finish until `deadline` (of `time.monotonic`)."""

    registration: Registration
    report: AdapterInfo
    deadline: float
    done: "Future[AdapterInfo]"


class Lifecycle:
    """Adapter commands and reports of one engine.

    Args:
        wake: lets the engine thread take a turn, if it rests.
        pinned: names whose adapters are brought to the device at once and leave it last.
        drain_seconds: how long an unload waits for requests, if it does not say.
    """

    def __init__(
        self, store: AdapterStore, room: Room, scheduler: Scheduler, wake: Callable[[], None], *,
        pinned: set[str], drain_seconds: float,
    ) -> None:  # fmt: skip
        self._store, self._room, self._scheduler, self._wake = store, room, scheduler, wake
        self._pinned_names, self._drain_seconds = pinned, drain_seconds
        self._unloads: queue.SimpleQueue[_Drain] = queue.SimpleQueue()
        self._drains: list[_Drain] = []
        self._names_changed = True
        self._pins: list[Registration] = []  # pinned, and not on the device yet
        self._closed: JsloraError | None = None

    # From any thread -----------------------------------------------------------------------------

    def load(
        self, name: str, path: str | None = None, replace: bool = False
    ) -> "Future[AdapterInfo]":
        """Read an adapter below the roots and register it; see `AdapterStore.load`."""
        done: Future[AdapterInfo] = Future()

        def finish(loading: "Future[Registration]") -> None:
            if (error := loading.exception()) is not None:
                done.set_exception(error)
            else:
                self._names_changed = True  # one of them may be pinned
                self._wake()
                done.set_result(self._with_device_state(self._store.describe(loading.result())))

        self._store.load(name, path, replace).add_done_callback(finish)
        return done

    def unload(self, name: str, drain_seconds: float | None = None) -> "Future[AdapterInfo]":
        """Take a name away at once; done when nothing of its adapter is left.

        Requests that hold it finish, for `drain_seconds` at most; then they end with Unavailable.

        Raises:
            UnknownModel: no adapter has that name.
            AdapterRejected: it is being loaded.
        """
        report = self.report(name)
        patience = self._drain_seconds if drain_seconds is None else drain_seconds
        deadline, done = time.monotonic() + patience, Future[AdapterInfo]()
        self._unloads.put(_Drain(self._store.unload(name), report, deadline, done))
        if self._closed:  # nobody else looks any more
            self._answer_all(self._closed)
        self._wake()
        return done

    def registered(self) -> dict[str, AdapterInfo]:
        """Name → what is known of its adapter for good; the same object while that is so."""
        return self._store.registered()

    def idle(self, most: int) -> tuple[str, ...]:
        """Names of adapters that are on the device and in no use, the last used first."""
        ages = {digest: age for age, digest in enumerate(self._room.residency.resting())}
        held = (r for name in self._store.registered() if (r := self._store.get(name)))
        found = ((ages[v.digest], r.name) for r in held if (v := r.version) and v.digest in ages)
        return tuple(name for _, name in heapq.nsmallest(most, found))

    def reports(self) -> list[AdapterInfo]:
        """Everything registered, loading, draining or failed, with where it is now."""
        return [self._with_device_state(info) for info in self._store.infos()]

    def report(self, name: str) -> AdapterInfo:
        """One adapter's report.

        Raises:
            UnknownModel: no adapter has that name.
        """
        return self._with_device_state(self._store.info(name))

    def _with_device_state(self, info: AdapterInfo) -> AdapterInfo:
        resident = self._room.residency.residents.get(info.digest)
        pinned = info.name in self._pinned_names
        if resident is None or info.state == "failed":
            return replace(info, pinned=pinned)
        size, coming = resident.version.packed_bytes, bool(resident.uploads)
        state = info.state if info.state == "draining" else "loading" if coming else "device"
        return replace(info, state=state, pinned=pinned, bytes_device=size)

    # On the engine thread ------------------------------------------------------------------------

    @property
    def resting(self) -> bool:
        """Whether nothing here goes on before somebody calls."""
        return not (self._pins or self._drains or self._names_changed or self._unloads.qsize())

    def bring_pinned(self) -> None:
        """Start to bring pinned adapters for which there is room without anybody giving way."""
        if self._names_changed:
            self._names_changed = False
            self._list_pins()
        for registration in list(self._pins):
            try:
                version = self._store.resolve(registration)
                blob = self._store.blob(version) if version else None
            except AdapterRejected as error:
                log.warning("pinned adapter %s: %s", registration.name, error.message)
                self._pins.remove(registration)
                continue
            if version is not None and blob is not None:
                self._pins.remove(registration)
                self._room.residency.pinned.add(version.digest)
                if version.digest in self._room.residency.residents:
                    continue  # it came for a request
                pages = self._room.take_free_run(version.n_pages)
                if pages is not None:
                    self._room.residency.bring(version, blob, pages)

    def _list_pins(self) -> None:
        found = [r for name in self._pinned_names if (r := self._store.get(name))]
        here = self._room.residency.residents
        self._room.residency.pinned = {r.version.digest for r in found if r.version}
        self._pins = [r for r in found if not (r.version and r.version.digest in here)]

    def bury(self) -> list[TokenEvent]:
        """Free what nobody can ask for any more; what that means for requests."""
        events = self._hear_of_loads()
        while not self._unloads.empty():  # before the dead are asked for, theirs among them
            self._drains.append(self._unloads.get())
        for digest in self._store.take_dead():
            self._room.residency.retire(digest)
            self._room.residency.pinned.discard(digest)
            self._room.prefix.drop(digest)
        for drain in list(self._drains):
            if drain.registration.uses == 0 and not self._left_of(drain.registration.version):
                self._drains.remove(drain)
                gone = replace(drain.report, state="registered", in_flight=0, bytes_device=0)
                drain.done.set_result(gone)
            elif drain.registration.uses > 0 and time.monotonic() >= drain.deadline:
                error = Unavailable(f"adapter {drain.registration.name!r} was unloaded")
                events += self._scheduler.fail_bound(drain.registration, error)
        return events

    def _left_of(self, version: Version | None) -> bool:
        """Whether an adapter without users and without this name still has pages for nobody."""
        if version is None or self._store.holds(version.digest):
            return False
        return version.digest in self._room.residency.residents

    def _hear_of_loads(self) -> list[TokenEvent]:
        """Pass on how long transfers took; requests whose adapter did not get here end."""
        events: list[TokenEvent] = []
        told, self._room.residency.told = self._room.residency.told, []
        for version, outcome in told:
            if isinstance(outcome, dict):
                for stage, seconds in outcome.items():
                    self._store.note_seconds(version.digest, stage, seconds)
                continue
            log.error("adapter %s did not get to the device", version.digest, exc_info=outcome)
            self._store.note_failure(version.digest, "it could not be brought to the device")
            waiting = [s for s in self._scheduler.waiting if version.digest in s.digests]
            error = EngineFailed("its adapter could not be brought to the device; send it again")
            events += self._scheduler.fail(waiting, error)
        return events

    def close(self, error: JsloraError) -> None:
        """Answer all who wait, now and later, with `error`."""
        self._closed = error
        self._answer_all(error)

    def _answer_all(self, error: JsloraError) -> None:
        while not self._unloads.empty():
            self._drains.append(self._unloads.get())
        while self._drains:
            self._drains.pop().done.set_exception(error)
