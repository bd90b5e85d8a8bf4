"""The scheduler over the real memory on a virtual clock, before a device that only counts tokens.

Beside `fake_device` it checks nothing of what a step computes, and so runs thousands of traces.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from fake_adapters import LAYERS, FakeStore, FakeUploads, make_registration, make_version

from jslora.adapters.registration import Registration
from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency
from jslora.memory.room import Room
from jslora.memory.worth import Clock
from jslora.request import Request, SamplingParams, Scaled, TokenEvent, TokenLogprob
from jslora.schedule.plan import Limits, Plan, Results
from jslora.schedule.scheduler import Scheduler
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import SchedulerSection
from jslora.schedule.stack import NAMES, Name, problem

LIMITS = Limits(
    max_running=3, max_step_tokens=12, max_queued=1000, max_queued_tokens=100_000,
    max_model_len=256, page_size=4, vocab_size=1000, eos_token_ids=(7,),
)  # fmt: skip


def _stacks(start: tuple[Name, ...] = ()) -> Iterator[tuple[Name, ...]]:
    yield start
    for name in NAMES:
        if problem((*start, name)) is None:
            yield from _stacks((*start, name))


STACKS = list(_stacks())
"""Every legal stack of policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request, and how many tokens its answer has before its end, of at most `most`."""

    prompt: int = 3
    answer: int = 4
    most: int = 16
    adapter: int | None = None
    tenant: str = "a"
    priority: int = 0
    slo: float | None = None


class LightEngine:
    """The engine's loop (see `jslora.core`); every turn takes `seconds` of the virtual clock.

    Attributes:
        ends: how each request that was heard of ended.
        service: (tenant, kind) of tokens: "prompt" computed when a request first started, and
            "generated".
        starting: told of every start just before the policies are.
    """

    def __init__(
        self, section: SchedulerSection, *, limits: Limits = LIMITS, pages: int = 24,
        seconds: float = 1.0, transfers: int = 9, sizes: tuple[int, ...] = (1, 2, 4, 6),
        prefix_cache: bool = False,
    ) -> None:  # fmt: skip
        self.now, self._seconds, self._transfers = 0.0, seconds, transfers
        self.pages, clock = PageAllocator(pages), Clock()
        self.prefix = PrefixCache(self.pages, clock, enabled=prefix_cache)
        self.store, self.uploads = FakeStore(), FakeUploads()
        self.residency = Residency(
            self.pages, clock, self.uploads, LAYERS, pages, LAYERS * pages, 8, lambda: self.now
        )
        room = Room(self.pages, self.prefix, self.residency)
        self.scheduler = Scheduler(limits, room, self.store, section, lambda: self.now)
        self.adapters = [make_registration(make_version(n, size)) for n, size in enumerate(sizes)]
        self.ends: dict[str, str] = {}
        self.events: list[TokenEvent] = []
        self.service = Counter[tuple[str, str]]()
        self.starting: Callable[[Sequence], None] = lambda sequence: None
        self._policy = section.policy
        self._jobs: dict[str, Job] = {}
        self._inflight: Plan | None = None
        self._watch_starts()

    def _watch_starts(self) -> None:
        policies = self.scheduler.policies
        start = policies.start

        def started(sequence: Sequence, computed: int, now: float) -> None:
            self.starting(sequence)
            if sequence.life == 0:
                prompt = sequence.prompt_length - computed
                self.service[sequence.request.tenant, "prompt"] += prompt
            start(sequence, computed, now)

        policies.start = started  # type: ignore[method-assign]

    def add(self, name: str, job: Job) -> Registration | None:
        """Submit a job; its wishes are left out where no policy would heed them."""
        registration = None if job.adapter is None else self.adapters[job.adapter]
        request = Request(
            id=name, prompt=(1,) * job.prompt, tenant=job.tenant,
            priority=job.priority if "priority" in self._policy else 0,
            ttft_slo=job.slo if "slo" in self._policy else None,
            adapters=(Scaled(registration.name),) if registration else (),
            params=SamplingParams(max_tokens=job.most, temperature=0, seed=0),
        )  # fmt: skip
        self.scheduler.add(request, (registration,) if registration else ())
        if registration:
            registration.uses += 1
        self._jobs[name] = job
        return registration

    def turn(self) -> Plan | None:
        """One step ahead, one step read."""
        self.store.turn()
        self.scheduler.fetch()
        self.uploads.finish(self._transfers)
        self.residency.writes(4, 0)
        plan = self.scheduler.plan()
        self.now += self._seconds
        if self._inflight:
            self._take(self.scheduler.commit(self._inflight, self._results(self._inflight)))
        if plan is None:
            self._take(self.scheduler.failures())
        self._inflight = plan
        return plan

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and self._inflight is None

    def run(self, at_most: int = 1000) -> None:
        """Turn until nothing is left."""
        for _ in range(at_most):
            if self.idle:
                return
            self.turn()
        raise AssertionError(f"{len(self.scheduler.waiting)} wait after {at_most} turns")

    def check_nothing_left(self) -> None:
        """Nobody holds anything any more."""
        scheduler, policies = self.scheduler, self.scheduler.policies
        assert scheduler.idle and not scheduler.running and not len(scheduler.waiting)
        assert scheduler.waiting.tokens == 0 and not policies.waiting.column("order").size
        scheduler.check()
        assert not any(registration.uses for registration in self.adapters)
        assert not any(resident.users for resident in self.residency.residents.values())
        ahead = scheduler._ahead
        assert not (ahead._waiting or ahead._unread or ahead._read or ahead.digests())
        assert self.residency.used == 0

    def running(self) -> set[str]:
        """Ids of those that run."""
        return {sequence.request.id for sequence in self.scheduler.running}

    def _results(self, plan: Plan) -> Results:
        tokens = np.ones(len(plan.rows), np.int32)
        ends = zip(plan.rows.end.tolist(), plan.rows.samples.tolist(), strict=True)
        for b, (sequence, (end, samples)) in enumerate(zip(plan.sequences, ends, strict=True)):
            done = end - sequence.prompt_length
            if samples and done >= self._jobs[sequence.request.id].answer:
                tokens[b] = LIMITS.eos_token_ids[0]
        return Results(tokens, np.ones(len(tokens), bool), _no_logprob, {})

    def _take(self, events: list[TokenEvent]) -> None:
        for news in events:
            assert news.id not in self.ends, f"news of {news.id} after its end"
            self.service[self._jobs[news.id].tenant, "generated"] += len(news.tokens)
            if news.last:
                self.ends[news.id] = news.error.type if news.error else str(news.finish_reason)
        self.events += events


def _no_logprob(row: int) -> TokenLogprob:
    raise AssertionError(f"the logprob of row {row} was not asked for")
