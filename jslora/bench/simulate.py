"""The engine on a virtual clock: its own scheduler, memory and adapter store over invented steps.

One turn here is one turn of `jslora.core`: fetch adapters, write what was transferred, plan a step
ahead, read the one before. Of the device there is only how long things take: a step by a model (see
`steptime`), a transfer by its bytes. Tokens are arbitrary; a request ends after its job's
`output_tokens`, with an end token if it may have had more. What the host does takes no time of its
own, as on a real engine that plans ahead; it belongs in the model's overhead. Wishes of a job that
the policy does not look at, priority and time to the first token, are not sent.

Invariant: equal arguments give equal results, to the bit. Host only: no jax.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jslora.adapters.registration import Registration
from jslora.bench.outcomes import Outcome
from jslora.bench.split import SplitRoom
from jslora.bench.steptime import StepTime
from jslora.bench.synthetic_store import BASE, DTYPE, HostTier, Ranks, SyntheticStore
from jslora.bench.virtual import Link, Timeline, Uploads
from jslora.bench.virtual_device import END, Step, VirtualDevice
from jslora.bench.workload import Job
from jslora.errors import ConfigError, JsloraError
from jslora.lifecycle import Lifecycle
from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency, write_limit
from jslora.memory.room import Room
from jslora.memory.worth import Clock
from jslora.model.config import ModelConfig
from jslora.progress import Progress, silent
from jslora.request import Request, SamplingParams, Scaled, TokenEvent
from jslora.schedule.plan import Limits
from jslora.schedule.scheduler import PREFETCH, Scheduler
from jslora.schedule.settings import SchedulerSection

# As in `jslora.core` and `jslora.programs`, which need a device.
PATIENCE = 0.002
UPLOAD_BYTES = 2 * 2**20

NAP = 0.005
"""Seconds after which a turn in which nothing ran is followed by the next, at the latest."""

_STUCK = 10**6  # turns in which nothing runs and nothing is to happen


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is simulated beside the scheduler.

    Attributes:
        pages: of the pool, the null page included.
        adapters: name -> rank in each of `MODULES`.
        transfer: bytes/s from host to device.
        host: None keeps all adapters in host memory from the start.
        adapter_pages: pages of the pool that only adapters may use, all others being for KV alone;
            None is one pool for both.
        writes: uploaded chunks written into the pool between two steps, at most; None is the
            engine's own limit.
        declared: `max_tokens` of every request; None is as many as it will generate.
    """

    model: ModelConfig
    step_time: StepTime
    pages: int
    adapters: Mapping[str, Ranks] = field(default_factory=dict)
    page_size: int = 16
    transfer: float = 12e9
    host: HostTier | None = None
    adapter_pages: int | None = None
    writes: int | None = None
    declared: int | None = None
    prefix_cache: bool = True

    @property
    def page_numbers(self) -> int:
        """Numbers in a page of one layer."""
        return 2 * self.page_size * self.model.kv_heads * self.model.head_dim


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Of each step: when it ended, what it took, what was in it, what held pages and who waited."""

    ended: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    adapters: np.ndarray
    pages_free: np.ndarray
    waiting: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of a workload.

    Attributes:
        seconds: of virtual time until the last request ended.
        loads, evictions: of adapters, to and from the device.
        hit_tokens: prompt tokens that the prefix cache had.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    steps: int
    loads: int
    evictions: int
    preemptions: int
    prefix_evictions: int
    prompt_tokens: int
    generated_tokens: int
    hit_tokens: int
    samples: Samples


def simulate(
    jobs: Iterable[Job], machine: Machine, section: SchedulerSection, *,
    progress: Progress = silent, check: bool = False,
) -> Simulated:  # fmt: skip
    """Run jobs to their ends.

    Args:
        check: assert the page ledger after every step; of one pool only.

    Raises:
        ConfigError: a job's prompt is no token ids.
        AdapterRejected: an adapter can never be loaded.
    """
    return _Engine(machine, section, check=check).run(list(jobs), progress)


@dataclass(slots=True)
class _Record:
    job: Job
    times: list[float] = field(default_factory=list)
    error: str | None = None
    ended: float | None = None


class _Engine:
    """`EngineCore` without threads or a device."""

    def __init__(self, machine: Machine, section: SchedulerSection, *, check: bool) -> None:
        self._machine, self._check = machine, check
        self._policy, self._lookahead = section.policy, section.lookahead
        self._time = Timeline()
        self._device = VirtualDevice(
            machine.model, machine.step_time, self._time, section.max_running
        )
        self._uploads = Uploads(self._time, Link(self._time, machine.transfer))
        self._room = _make_room(machine, self._uploads, self._time)
        self._store = SyntheticStore(
            machine.adapters, machine.model, machine.page_numbers,
            _most_pages(machine), self._time, machine.host,
        )  # fmt: skip
        self._scheduler = Scheduler(
            _limits(machine, section), self._room, self._store, section, self._time
        )
        self._lifecycle = Lifecycle(
            self._store, self._room, self._scheduler, lambda: None, pinned=set(), drain_seconds=0.0
        )
        self._inbox: list[tuple[Request, tuple[Registration, ...]]] = []
        self._records: dict[str, _Record] = {}
        self._lengths: dict[str, int] = {}  # of requests that may end before their `max_tokens`
        self._read_at = self._last_step = 0.0
        self._written = self._finished = 0
        self._samples: list[tuple[float, ...]] = []

    # The world outside ---------------------------------------------------------------------------

    def run(self, jobs: list[Job], progress: Progress) -> Simulated:
        for number, job in enumerate(jobs):
            self._expect(str(number), job)
        inflight: Step | None = None
        stuck = told = 0
        while inflight or not self._resting or self._time.next < np.inf:
            before = len(self._samples), self._finished
            inflight = self._turn(inflight)
            moved = inflight or before != (len(self._samples), self._finished)
            stuck = 0 if moved or self._time.next < np.inf else stuck + 1
            assert stuck < _STUCK, f"{self._finished} of {len(jobs)} requests ended; none moves"
            if self._finished > told:
                told = self._finished
                progress("requests", told, len(jobs), f"{self._time.now:.0f} s")
        return self._result()

    def _expect(self, name: str, job: Job) -> None:
        if not job.input_tokens:
            raise ConfigError(f"job {job.index}: a simulated prompt is a list of token ids")
        most = self._machine.declared or job.output_tokens
        self._records[name] = _Record(job)
        if job.output_tokens < most:
            self._lengths[name] = job.output_tokens
        request = Request(
            id=name,
            prompt=list(job.prompt),  # type: ignore[arg-type]
            params=SamplingParams(max_tokens=most, seed=job.index, temperature=0.0),
            adapters=() if job.model == BASE else (Scaled(job.model),),
            tenant=job.tenant,
            priority=job.priority if "priority" in self._policy else 0,
            ttft_slo=job.ttft_slo if "slo" in self._policy else None,
        )
        self._time.at(job.arrival, lambda: self._submit(request))

    def _submit(self, request: Request) -> None:
        """As `EngineCore.submit`, on whatever thread."""
        try:
            bound = tuple(self._store.bind(adapter.name) for adapter in request.adapters)
        except JsloraError as error:
            self._end(request.id, error.type)
            return
        if len(self._scheduler.waiting) < PREFETCH:
            for registration in bound:
                self._store.prefetch(registration)
        self._inbox.append((request, bound))

    # A turn --------------------------------------------------------------------------------------

    @property
    def _resting(self) -> bool:
        waits = self._inbox or not self._scheduler.idle or self._room.residency.loading
        return not waits and self._lifecycle.resting

    def _turn(self, inflight: Step | None) -> Step | None:
        if inflight and not self._lookahead:
            self._commit(inflight)
            inflight = None
        self._drain_inbox()
        self._scheduler.fetch()
        self._lifecycle.bring_pinned()
        self._write()
        plan = self._scheduler.plan()
        ahead = None
        if plan is not None:
            ahead = self._device.dispatch(plan, self._written)
            self._written = 0
        if inflight:
            self._commit(inflight)
        if plan is None:
            self._tell(self._scheduler.failures())
            if inflight is None:
                self._pass_time()
        self._tell(self._lifecycle.bury())
        return ahead

    def _pass_time(self) -> None:
        """Nothing runs: let the next thing happen, and if none will, look again a little later."""
        soon = min(self._time.next, np.inf if self._resting else self._time.now + NAP)
        if soon < np.inf:
            self._time.advance(soon)

    def _drain_inbox(self) -> None:
        arrived, self._inbox = self._inbox, []
        for request, bound in arrived:
            try:
                self._scheduler.add(request, bound)
            except JsloraError as error:
                for registration in bound:
                    self._store.release(registration)
                self._end(request.id, error.type)

    def _write(self) -> None:
        """Take what was transferred; wait a little for the first, as `Residency` would."""
        uploads = self._uploads
        if uploads.open and not uploads.done and uploads.open[0] <= self._time.now + PATIENCE:
            self._time.advance(uploads.open[0])
        most = self._machine.writes or write_limit(self._last_step)
        chunks = self._room.residency.writes(most, 0.0)
        uploads.done -= len(chunks)
        self._written += sum(chunks)

    def _commit(self, done: Step) -> None:
        self._time.advance(done.ends)
        events = self._scheduler.commit(done.plan, self._device.results(done.plan, self._lengths))
        self._learn(done)
        self._tell(events)
        w, s = done.work, self._scheduler
        self._samples.append(
            (done.ends, done.ends - done.began, w.tokens, w.rows, w.adapters,
             self._room.pages.free, len(s.waiting))
        )  # fmt: skip
        if self._check:
            s.check()

    def _learn(self, done: Step) -> None:
        """As `EngineCore` does of its steps."""
        began, self._read_at = max(self._read_at, done.began), self._time.now
        self._last_step = self._read_at - began
        self._scheduler.took(done.plan, self._last_step)

    # The end -------------------------------------------------------------------------------------

    def _tell(self, events: list[TokenEvent]) -> None:
        for event in events:
            record = self._records[event.id]
            record.times.extend([self._time.now] * len(event.tokens))
            if event.last:
                self._end(event.id, event.error.type if event.error else None)

    def _end(self, name: str, error: str | None) -> None:
        record = self._records[name]
        record.error, record.ended = error, self._time.now
        self._finished += 1

    def _result(self) -> Simulated:
        r, s = self._room.residency, self._scheduler
        columns = np.array(self._samples, np.float64).reshape(-1, 7).T
        counts = (column.astype(np.int64) for column in columns[2:])
        return Simulated(
            outcomes=tuple(
                Outcome(job=found.job, times=tuple(found.times), error=found.error,
                        ended=found.ended if found.error else None)
                for found in self._records.values()
            ),
            seconds=max((found.ended or 0.0 for found in self._records.values()), default=0.0),
            steps=len(self._samples),
            loads=r.loads,
            evictions=r.evictions,
            preemptions=s.preemptions,
            prefix_evictions=self._room.prefix.evictions,
            prompt_tokens=s.prompt_tokens,
            generated_tokens=s.generated_tokens,
            hit_tokens=s.hit_tokens,
            samples=Samples(*columns[:2], *counts),
        )  # fmt: skip


def _make_room(machine: Machine, uploads: Uploads, timeline: Timeline) -> Room:
    layers, clock, pages = machine.model.layers, Clock(), PageAllocator(machine.pages)
    own = pages
    if machine.adapter_pages is not None:
        own = PageAllocator(machine.adapter_pages + 1)
        pages = PageAllocator(machine.pages - machine.adapter_pages)
    prefix = PrefixCache(pages, clock, enabled=machine.prefix_cache)
    residency = Residency(
        own, clock, uploads, layers, own.total, layers * own.total, _chunk(machine), now=timeline
    )
    return (Room if own is pages else SplitRoom)(pages, prefix, residency)


def _most_pages(machine: Machine) -> int:
    """Pages that an adapter may take: of one pool, all but one for KV."""
    return machine.pages - 2 if machine.adapter_pages is None else machine.adapter_pages


def _chunk(machine: Machine) -> int:
    """Rows of the pool in an upload: the engine's, or what is next below and needs no padding."""
    layers, most = machine.model.layers, UPLOAD_BYTES // (machine.page_numbers * DTYPE.itemsize)
    return max(n for n in range(1, layers + 1) if layers % n == 0 and n <= max(1, most))


def _limits(machine: Machine, section: SchedulerSection) -> Limits:
    return Limits(
        section.max_running, section.max_step_tokens, section.max_queued,
        section.max_queued_tokens, machine.model.max_positions, machine.page_size,
        machine.model.vocab_size, (END,),
    )  # fmt: skip
