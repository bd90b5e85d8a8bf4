"""What runs in the next step: the scheduler's only output is a `Plan`, its only feedback `commit`.

Rows that decode come first, then prefills in progress, then waiting sequences in the order of the
policies, until the step's tokens, rows or pages run out. The adapters of those that wait are
brought ahead of their turn (`fetch`). A sequence starts only if the pages that it and those that
run will come to hold, as far as that can be foreseen, are there (`reserve`). When a running
sequence cannot get a page all the same, what lies idle leaves first, then the youngest running
sequence is preempted: its pages are released and it is computed again later, from wherever the
prefix cache still has it. A plan may count on tokens that the host has not read yet (they are fed
back on the device), so a sequence is preempted only once its own are read. Host only: no jax.

Invariants: after every commit, the pages listed by sequences, the prefix cache and adapters are
exactly those in use; a sequence has a slot and holds its adapter if and only if it runs; `running`
is sorted by adapter, so that the rows of a plan are.
"""

import secrets
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.errors import InvalidRequest, JsloraError, TooLate
from jslora.memory.room import Room
from jslora.request import Request, TokenEvent
from jslora.schedule.admission import check, check_queue
from jslora.schedule.ahead import Ahead
from jslora.schedule.events import failure, news
from jslora.schedule.foresight import Foresight, Outlook
from jslora.schedule.pace import Pace
from jslora.schedule.plan import Limits, Plan, Results, make_plan
from jslora.schedule.policies import Policies
from jslora.schedule.queue import Waiting
from jslora.schedule.rates import Rates
from jslora.schedule.reserve import Future
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import SchedulerSection

PREFETCH = 8
"""Waiting sequences, from the front, whose adapters are brought ahead of their turn."""


class Scheduler:
    """Waiting and running sequences over one pool of pages.

    Args:
        section: the policies and their settings.
        clock: the time in seconds.
    """

    def __init__(
        self, limits: Limits, room: Room, store: AdapterStore,
        section: SchedulerSection | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        section = section or SchedulerSection()
        self.limits, self.room, self.store = limits, room, store
        self._section = section
        self.policies = Policies(section, room.pages.total)
        self.running: list[Sequence] = []
        self.preemptions = self.corrupt = self.prompt_tokens = self.generated_tokens = 0
        self.too_late = self.rate_limited = 0
        self.asked_tokens = self.hit_tokens = 0  # of the prefix cache
        self._clock = clock
        self._ahead = Ahead(limits, room, store, self._loading)
        self._foresight = Foresight(self._ahead, room, limits.page_size, section.reserve)
        self._rates, self._pace = Rates(section.tenants, section.adapters), Pace(section.itl_target)
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._by_id: dict[str, Sequence] = {}
        self._orders = count()
        self._failed: list[TokenEvent] = []
        self._future: Future | None = None  # of those that run, in this turn

    @property
    def waiting(self) -> Waiting:
        return self.policies.waiting

    # Requests ------------------------------------------------------------------------------------

    def add(self, request: Request, registration: Registration | None) -> None:
        """Queue a request, bound to an adapter for its whole life; its end releases it.

        Raises:
            InvalidRequest: it can never fit, or its id is in use.
            Overloaded: the queue is full.
            RateLimited: its tenant or its adapter used up what it may.
        """
        if request.id in self._by_id:
            raise InvalidRequest(f"request id {request.id!r} is in use", param="request_id")
        check(request, registration, self.limits, self.room.pages.total, self._section)
        own = self.policies.waits(request.tenant)
        check_queue(request, self.limits, self._section, self.waiting, own)
        now, seed = self._clock(), request.params.seed
        sequence = Sequence(
            request, registration, secrets.randbits(64) if seed is None else seed % 2**64,
            next(self._orders), list(request.prompt),
        )  # fmt: skip
        expected = self._foresight.expected(sequence)
        try:
            self._rates.admit(request.tenant, request.adapter, len(request.prompt), now)
        except JsloraError:
            self.rate_limited += 1
            raise
        self.policies.queue(sequence, expected, now)
        self._ahead.add(registration)
        self._by_id[request.id] = sequence

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; nothing more is said of them."""
        for name in ids:
            sequence = self._by_id.get(name)
            if sequence is not None:
                # Whoever looks for stop strings leaves when one came: that was its end.
                self._finish(sequence, cut=not sequence.request.params.stop)

    def fail(self, sequences: Iterable[Sequence], error: JsloraError) -> list[TokenEvent]:
        """End sequences with an error."""
        found = list(sequences)
        for sequence in found:
            self._finish(sequence, cut=True)
        return [failure(sequence, error) for sequence in found]

    def fail_all(self, error: JsloraError) -> list[TokenEvent]:
        """End every request with an error, running or waiting."""
        return self.fail(self._by_id.values(), error)

    def fail_bound(self, registration: Registration, error: JsloraError) -> list[TokenEvent]:
        """End what is bound to one adapter."""
        bound = [s for s in self._by_id.values() if s.registration is registration]
        return self.fail(bound, error)

    @property
    def idle(self) -> bool:
        return not self._by_id and not self._failed

    def check(self) -> None:
        """Assert the page ledger (see `PageAllocator.check`), the slots and the order of rows."""
        residents = [r.placement.pages for r in self.room.residency.residents.values()]
        held = self.room.prefix.held()
        self.room.pages.check([*(s.pages for s in self.running), *residents, *held])
        self.room.prefix.check()
        slots = sorted([*self._slots, *(s.slot for s in self.running if s.slot is not None)])
        assert slots == list(range(self.limits.max_running)), f"slots in use or free: {slots}"
        assert self.running == sorted(self.running, key=_by_adapter), "rows are not sorted"

    # Ahead of their turn -------------------------------------------------------------------------

    def fetch(self) -> None:
        """Give up those who cannot be answered in time, and bring the adapters of who goes next."""
        now = self._clock()
        if late := self.policies.late(now):
            self.too_late += len(late)
            wait = self.policies.retry_after(now)
            for sequence in late:
                seconds = sequence.deadline - sequence.since
                late_error = TooLate(
                    f"no first token within {seconds:g} s: more is asked than can be served",
                    retry_after=wait,
                )
                self._failed += self.fail([sequence], late_error)
        self._ahead.front, self._future = self.policies.front(PREFETCH, now), None
        self._ahead.short = None
        if not self._ahead.complete(self._ahead.front):
            for sequence, error in self._ahead.fetch(self._startable(), self._moves):
                self._failed += self.fail([sequence], error)

    def _startable(self) -> Iterator[Sequence]:
        """Those in front that could all start now, if their adapters were here."""
        self._future = self._foresight.future(self.running)
        outlook = self._outlook()
        for sequence in self._ahead.front:
            if not outlook.joins(sequence):
                self._ahead.short = sequence
                return
            yield sequence

    def _loading(self, sequence: Sequence, version: Version) -> None:
        """A load is charged as the tokens whose keys and values its pages could hold.

        Not before its sequence starts: it would fall behind another, whose adapter might then push
        out its own, for ever.
        """
        sequence.owed += version.n_pages * self.limits.page_size

    @property
    def _moves(self) -> bool:
        """Whether a sequence or a transfer may yet free a page."""
        return bool(self.running) or self.room.residency.loading

    # Planning ------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now."""
        self._preempt_held()
        budget = self.limits.max_step_tokens
        decoding, prefilling = self._ready()
        if len(decoding) > budget:
            decoding = sorted(sorted(decoding, key=_by_arrival)[:budget], key=_by_adapter)
        size = self.limits.page_size
        self._grow_all([s for s in decoding if s.computed == size * len(s.pages)])
        planned = [
            (s, 1)
            for s in decoding
            if s.computed < size * len(s.pages) or self._grow(s, s.computed + 1)
        ]
        budget -= len(planned)
        # Decoding rows come first, so that a prefill never delays a stream for long.
        budget = self._pace.prefill_tokens(len(planned), budget, min(budget, self.limits.page_size))
        for sequence in sorted(prefilling, key=_by_arrival):
            n = min(sequence.remaining, budget)
            if n > 0 and self._grow(sequence, sequence.computed + n):
                insort(planned, (sequence, n), key=_row_by_adapter)
                budget -= n
        admitted = self._admit(budget)
        for sequence in admitted:
            n = min(sequence.remaining, budget)
            insort(planned, (sequence, n), key=_row_by_adapter)
            budget -= n
        self._future = None
        if not planned:
            return None
        return make_plan(planned, admitted, self.limits)

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences with one token to compute, and with several."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if n := sequence.wanted():
                (decoding if n == 1 else prefilling).append(sequence)
        return decoding, prefilling

    def _admit(self, budget: int) -> list[Sequence]:
        """Waiting sequences that start now; the first that lacks pages holds back all others."""
        started: list[Sequence] = []
        passed: set[Sequence] = set()  # whose adapters are on their way
        outlook: Outlook | None = None
        front = self._ahead.front
        while budget > 0 and self._slots:
            fresh = [s for s in front if s not in passed and s.slot is None and not s.finished]
            if not fresh:
                break
            for sequence in fresh:
                if sequence is self._ahead.short and not self._yields(sequence):
                    return started
                if not self._here(sequence):
                    new = sequence in front[:PREFETCH] and not self._ahead.comes(sequence)
                    if new and sequence is not self._ahead.short:
                        return started  # it came to the front just now
                    passed.add(sequence)
                    continue
                outlook = outlook or self._outlook()
                if not outlook.joins(sequence) or not self._start(sequence):
                    return started
                started.append(sequence)
                budget -= sequence.remaining
                if self._ahead.short in passed:
                    return started  # nothing ran, so one that could was let past it
                if not self.policies.settles or budget <= 0 or not self._slots:
                    break
            if len(passed) >= PREFETCH + len(self._slots):
                break
            front = self.policies.front(PREFETCH + 2 * len(passed), self._clock())
        return started

    def _yields(self, short: Sequence) -> bool:
        """Whether one that can run may pass one without room: if nothing runs, and for a while."""
        waited = self._clock() - short.since
        return not self.running and waited < self._section.starvation_seconds

    def _outlook(self) -> Outlook:
        future = self._future or self._foresight.future(self.running)
        return self._foresight.outlook(future, self.running)

    def _here(self, sequence: Sequence) -> bool:
        """Whether its adapter is on the device."""
        placement = self.room.residency.placement
        return not sequence.registration or placement(sequence.digest) is not None

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all it has, or it would be preempted halfway."""
        known: list[int] = []
        if self.room.prefix.enabled and sequence.reuses:
            # Its last token must be computed, for what comes after it.
            most = (len(sequence.tokens) - 1) // self.limits.page_size
            known = self.room.prefix.take(sequence.keys(most, self.limits.page_size))
        pages = self._take_first(sequence, self.limits.pages(len(sequence.tokens)) - len(known))
        if pages is None:
            self.room.prefix.release(known)
            return False
        sequence.pages, sequence.given, sequence.published = known + pages, len(known), len(known)
        sequence.computed = len(known) * self.limits.page_size
        sequence.cached = min(sequence.computed, sequence.prompt_length)
        self.asked_tokens += sequence.prompt_length
        self.hit_tokens += sequence.cached
        sequence.slot = self._slots.pop()
        if sequence.registration:
            sequence.placement = self.room.residency.acquire(sequence.digest)
        self.policies.start(sequence, self._clock())
        self._ahead.remove(sequence.registration)
        insort(self.running, sequence, key=_by_adapter)
        return True

    def _take_first(self, sequence: Sequence, need: int) -> list[int] | None:
        """Pages for a sequence that starts."""
        pages = self.room.pages.take(need)
        if pages is None:
            pages = self.room.take(need, self._ahead.kept() | {sequence.digest})
        if pages is None and not self._moves:  # nothing else will ever free a page for it
            pages = self.room.take(need, {sequence.digest})
        return pages

    def _grow_all(self, sequences: list[Sequence]) -> None:
        """Give running sequences a page each, if there are enough without hurting anybody."""
        need = len(sequences)
        pages = self.room.pages.take(need)
        if pages is None:
            pages = self.room.take(need, self._spared())
        for sequence, page in zip(sequences, pages or (), strict=False):
            sequence.pages.append(page)

    def _spared(self) -> set[str]:
        """Adapters that leave only if nothing else can: those waited for, and pinned ones."""
        return self._ahead.digests() | self.room.residency.pinned

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for so many tokens; False if it must wait for them."""
        need = self.limits.pages(tokens) - len(sequence.pages)
        if need <= 0:
            return True
        more = self.room.pages.take(need)
        alone = len(self.running) == 1
        if more is None:
            more = self.room.take(need, self._spared())
        if more is None:
            more = self.room.take(need, () if alone else self._ahead.kept())
        if more is None:
            if not alone:  # else an adapter is on its way, and can leave when it is here
                self._make_way()
            return False
        sequence.pages += more
        return True

    def _make_way(self) -> None:
        """Choose who will be preempted: the youngest, once its sampled token was read."""
        if not any(sequence.hold for sequence in self.running):
            max(self.running, key=_by_arrival).hold = True

    def _preempt_held(self) -> None:
        held = [s for s in self.running if s.hold and not s.pending]
        for sequence in held:
            self._stop(sequence)
            sequence.computed, sequence.hold = 0, False
            sequence.scores.clear()
            self.preemptions += 1
            self.policies.requeue(sequence)
            self._ahead.add(sequence.registration)
        if held:
            self._future = None
            self._ahead.front = self.policies.front(PREFETCH, self._clock())

    # Feedback ------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: Results) -> list[TokenEvent]:
        """Take in what a step produced; the news for its requests."""
        events, now = self.failures(), self._clock()
        for (b, position), score in results.scores.items():
            plan.sequences[b].scores[position] = score
        tokens, finite = results.tokens.tolist(), results.finite.tolist()
        size, eos = self.limits.page_size, self.limits.eos_token_ids
        drawn: list[Sequence] = []
        over: list[tuple[Sequence, bool]] = []
        for b, (row, sequence) in enumerate(zip(plan.rows, plan.sequences, strict=True)):
            sequence.pending -= row.samples
            if sequence.finished:
                continue
            pages = (row.position + row.length) // size
            if pages > sequence.published and finite[b] and sequence.life == plan.lives[b]:
                self._publish(sequence, pages)
            first = len(sequence.tokens) == sequence.prompt_length
            event = news(sequence, row, b, tokens[b], finite[b], results, eos)
            if event is None:
                continue
            events.append(event)
            if event.tokens:
                drawn.append(sequence)
            if event.error is not None:
                self.corrupt += 1
            elif first:
                self.prompt_tokens += sequence.prompt_length
            if event.last:
                over.append((sequence, event.finish_reason != "stop"))
        self.generated_tokens += len(drawn)
        self.policies.generated(drawn, now)
        if self._rates.limits:
            for request in (sequence.request for sequence in drawn):
                self._rates.generated(request.tenant, request.adapter, 1, now)
        for sequence, cut in over:
            self._finish(sequence, cut=cut)
        return events

    def took(self, plan: Plan, seconds: float) -> None:
        """Learn what a step takes, and computing a page, from steps that mostly do that."""
        tokens, rows = sum(row.length for row in plan.rows), len(plan.rows)
        self._pace.took(tokens, rows, seconds)
        if tokens >= 2 * rows:
            self.room.prefix.kind.took(seconds * self.limits.page_size / tokens)

    def _publish(self, sequence: Sequence, pages: int) -> None:
        """Offer the prefix cache the first pages, which a completed step filled."""
        if not self.room.prefix.enabled:
            return
        keys = sequence.keys(pages, self.limits.page_size)
        for i in range(sequence.published, len(keys)):
            self.room.prefix.publish(keys[i], sequence.pages[i], sequence.digest)
        sequence.published = len(keys)

    def failures(self) -> list[TokenEvent]:
        """Requests that ended without a step since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _finish(self, sequence: Sequence, *, cut: bool) -> None:
        """End a sequence; `cut` if its answer would have been longer."""
        request = sequence.request
        sequence.finished = True
        del self._by_id[request.id]
        self._foresight.ended(sequence, cut=cut)
        if sequence.slot is None:
            self.policies.withdraw(sequence)
            self._ahead.remove(sequence.registration)
        else:
            self._stop(sequence)
        self._rates.ended(request.tenant, request.adapter)
        if sequence.registration:
            self.store.release(sequence.registration)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence off the device. Steps in flight may still touch its pages and slot, but
        whatever gets those next is written by a later step."""
        self.running.remove(sequence)
        self.room.prefix.release(sequence.pages)
        assert sequence.slot is not None, f"request {sequence.request.id} does not run"
        self._slots.append(sequence.slot)
        sequence.pages, sequence.given, sequence.slot, sequence.published = [], 0, None, 0
        sequence.placement = None
        sequence.life += 1
        self.policies.stop(sequence)
        if sequence.registration:
            self.room.residency.release(sequence.digest)


def _by_arrival(sequence: Sequence) -> int:
    return sequence.order


def _by_adapter(sequence: Sequence) -> tuple[str, int]:
    return sequence.digest, sequence.order


def _row_by_adapter(row: tuple[Sequence, int]) -> tuple[str, int]:
    return _by_adapter(row[0])
