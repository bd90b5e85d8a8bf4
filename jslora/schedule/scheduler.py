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
exactly those in use; a sequence has a slot and holds its adapters if and only if it runs.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import compress, count

import numpy as np

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.batch import Applied
from jslora.errors import InvalidRequest, JsloraError, TooLate
from jslora.memory.room import Room
from jslora.request import Request, TokenEvent
from jslora.schedule.admission import check, check_queue
from jslora.schedule.ahead import Ahead
from jslora.schedule.events import failure, news, token_events
from jslora.schedule.foresight import Foresight, Outlook
from jslora.schedule.growth import Growth
from jslora.schedule.pace import Pace
from jslora.schedule.plan import Limits, Plan, Results
from jslora.schedule.policies import Policies
from jslora.schedule.queue import Waiting
from jslora.schedule.rates import Rates
from jslora.schedule.reserve import Future
from jslora.schedule.running import Running, Slots
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
        self.rows = Running(limits)
        self.preemptions = self.corrupt = self.prompt_tokens = self.generated_tokens = 0
        self.too_late = self.rate_limited = 0
        self.asked_tokens = self.hit_tokens = 0  # of the prefix cache
        self._clock = clock
        self._ahead = Ahead(limits, room, store, self._loading)
        self._foresight = Foresight(self._ahead, room, limits.page_size, section.reserve)
        self._rates, self._pace = Rates(section.tenants, section.adapters), Pace(section.itl_target)
        self._growth = Growth(room, self._ahead, self.rows, limits.page_size)
        self._by_id: dict[str, Sequence] = {}
        self._orders = count()
        self._failed: list[TokenEvent] = []
        self._future: Future | None = None  # of those that run, in this turn

    @property
    def running(self) -> list[Sequence]:
        """Those that run, sorted by adapter."""
        return self.rows.sequences

    @property
    def waiting(self) -> Waiting:
        return self.policies.waiting

    # Requests ------------------------------------------------------------------------------------

    def add(self, request: Request, registrations: tuple[Registration, ...]) -> None:
        """Queue a request, bound to its adapters for its whole life; its end releases them.

        Raises:
            InvalidRequest: it can never fit, or its id is in use.
            Overloaded: the queue is full.
            RateLimited: its tenant or its adapter used up what it may.
        """
        if request.id in self._by_id:
            raise InvalidRequest(f"request id {request.id!r} is in use", param="request_id")
        check(request, registrations, self.limits, self.room.pages.total, self._section)
        own = self.policies.waits(request.tenant)
        check_queue(request, self.limits, self._section, self.waiting, own)
        now, seed = self._clock(), request.params.seed
        sequence = Sequence(
            request, registrations, secrets.randbits(64) if seed is None else seed % 2**64,
            next(self._orders), list(request.prompt),
        )  # fmt: skip
        expected = self._foresight.expected(request, 0)
        try:
            self._rates.admit(request.tenant, _names(request), len(request.prompt), now)
        except JsloraError:
            self.rate_limited += 1
            raise
        self.policies.queue(sequence, expected, now)
        self._ahead.add(registrations)
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
        bound = [s for s in self._by_id.values() if registration in s.registrations]
        return self.fail(bound, error)

    @property
    def idle(self) -> bool:
        return not self._by_id and not self._failed

    def check(self) -> None:
        """Assert the page ledger (`PageAllocator.check`), and what is noted of rows and pages."""
        residents = [r.placement.pages for r in self.room.residency.residents.values()]
        tables = [self.rows.pages(slot) for slot in self.rows.slots]
        self.room.pages.check([*tables, *residents, *self.room.prefix.held()])
        self.room.prefix.check()
        self.room.residency.check()
        self.rows.check()
        self._ahead.check(self.waiting)

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
            for sequence, error in self._ahead.fetch(self._startable(), self._growth.moves):
                self._failed += self.fail([sequence], error)

    def _startable(self) -> Iterator[Sequence]:
        """Those in front that could all start now, if their adapters were here."""
        self._future = self._foresight.future(self.rows)
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

    # Planning ------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now."""
        self._preempt_held()
        rows, budget = self.rows, self.limits.max_step_tokens
        slots, wanted = rows.slots, rows.wanted()
        # Decoding rows come first, so that a prefill never delays a stream for long.
        decoding = self._decoding(slots[wanted == 1], budget)
        budget -= len(decoding)
        least = min(budget, self.limits.page_size)
        budget = self._pace.prefill_tokens(len(decoding), budget, least)
        others = self._prefills(slots[wanted > 1], budget)
        admitted = self._admit(budget - sum(others.values()))
        for sequence in admitted:
            assert sequence.slot is not None, f"request {sequence.request.id} did not start"
            left = budget - sum(others.values())
            others[sequence.slot] = min(rows.remaining(sequence.slot), left)
        self._future = None
        if not len(decoding) and not others:
            return None
        chosen, n = decoding, np.ones(len(decoding), np.int64)
        if others:
            chosen, n = rows.sort(decoding, others)
        return rows.plan(chosen, n, admitted)

    def _prefills(self, slots: Slots, budget: int) -> dict[int, int]:
        """Tokens of prefills in progress, by slot, the oldest first."""
        rows, found = self.rows, {}
        for slot in slots[np.argsort(rows.order[slots])].tolist():
            n = min(rows.remaining(slot), budget)
            if n > 0 and self._growth.grow(slot, int(rows.computed[slot]) + n):
                found[slot] = n
                budget -= n
        return found

    def _decoding(self, slots: Slots, budget: int) -> Slots:
        """Of those that have one token to compute, the oldest that have room for it."""
        rows = self.rows
        if len(slots) > budget:
            slots = slots[np.sort(np.argsort(rows.order[slots])[:budget])]
        full = rows.full_pages(slots)
        if not full.any() or self._growth.all(slots[full]):
            return slots
        able = ~full
        for i in np.flatnonzero(full).tolist():
            able[i] = self._growth.grow(int(slots[i]), int(rows.computed[slots[i]]) + 1)
        return slots[able]

    def _admit(self, budget: int) -> list[Sequence]:
        """Waiting sequences that start now; the first that lacks pages holds back all others."""
        started: list[Sequence] = []
        passed: set[Sequence] = set()  # whose adapters are on their way
        outlook: Outlook | None = None
        front = self._ahead.front
        while budget > 0 and not self.rows.full:
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
                budget -= self.rows.remaining(sequence.slot)
                if self._ahead.short in passed:
                    return started  # nothing ran, so one that could was let past it
                if not self.policies.settles or budget <= 0 or self.rows.full:
                    break
            done = budget <= 0 or self.rows.full or len(passed) >= PREFETCH + self.rows.free
            if done:
                break
            front = self.policies.front(PREFETCH + 2 * len(passed), self._clock())
        return started

    def _yields(self, short: Sequence) -> bool:
        """Whether one that can run may pass one without room: if nothing runs, and for a while."""
        waited = self._clock() - short.since
        return not self.running and waited < self._section.starvation_seconds

    def _outlook(self) -> Outlook:
        future = self._future or self._foresight.future(self.rows)
        return self._foresight.outlook(future, self.rows)

    def _here(self, sequence: Sequence) -> bool:
        """Whether its adapters are on the device."""
        placement = self.room.residency.placement
        return sequence.read and all(placement(digest) for digest in sequence.digests)

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all it has, or it would be preempted halfway."""
        known: list[int] = []
        if self.room.prefix.enabled and sequence.reuses:
            # Its last token must be computed, for what comes after it.
            most = (len(sequence.tokens) - 1) // self.limits.page_size
            known = self.room.prefix.take(sequence.keys(most, self.limits.page_size))
        pages = self._growth.first(sequence, self.limits.pages(len(sequence.tokens)) - len(known))
        if pages is None:
            self.room.prefix.release(known)
            return False
        computed = len(known) * self.limits.page_size
        sequence.cached = min(computed, sequence.prompt_length)
        self.asked_tokens += sequence.prompt_length
        self.hit_tokens += sequence.cached
        acquired = [self.room.residency.acquire(digest) for digest in sequence.digests]
        sequence.applied = tuple(
            Applied(placement, adapter.scale)
            for placement, adapter in zip(acquired, sequence.request.adapters, strict=True)
        )
        self.policies.start(sequence, computed, self._clock())
        self._ahead.remove(sequence.registrations)
        self.rows.add(sequence, known + pages, len(known))
        return True

    def _preempt_held(self) -> None:
        if not self.rows.hold.any():
            return
        rows, slots = self.rows, self.rows.slots
        held = rows.at(slots[rows.hold[slots] & (rows.pending[slots] == 0)])
        for sequence in held:
            self._stop(sequence)
            sequence.scores.clear()
            self.preemptions += 1
            self.policies.requeue(sequence)
            self._ahead.add(sequence.registrations)
        if held:
            self._future = None
            self._ahead.front = self.policies.front(PREFETCH, self._clock())

    # Feedback ------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: Results) -> list[TokenEvent]:
        """Take in what a step produced; the news for its requests."""
        events, now, running = self.failures(), self._clock(), self.rows
        rows, slots, eos = plan.rows, plan.rows.slot, self.limits.eos_token_ids
        live = running.life[slots] == plan.lives
        running.pending[slots[live & rows.samples]] -= 1
        for (b, position), score in results.scores.items():
            plan.sequences[b].scores[position] = score
        good = live & results.finite
        for b in running.done(rows, good):
            self._publish(plan.sequences[b], min(rows.end[b], running.prompt[slots[b]]))
        usual = good & running.usual(rows, results.tokens, eos)
        chosen = [*compress(plan.sequences, usual.tolist())]
        tokens = results.tokens[usual].tolist()
        for sequence, token in zip(chosen, tokens, strict=True):
            sequence.tokens.append(token)
        events += token_events(chosen, tokens)
        running.known[slots[usual]] += 1
        self._drawn(chosen, now)
        rare = live & ~usual & (rows.samples | (rows.end == running.whole[slots]))
        for b in np.flatnonzero(rare).tolist():
            event = self._commit_rare(plan, b, results, now)
            events.append(event)
            usual[b] = bool(event.tokens)
        served = slots[usual]  # columns of those that ended are there still
        self.generated_tokens += len(served)
        self.policies.generated(running.tenant[served], running.adapter[served])
        return events

    def _commit_rare(self, plan: Plan, b: int, results: Results, now: float) -> TokenEvent:
        """A row's first token, its last, one with logprobs, or a failure."""
        sequence, slots, running = plan.sequences[b], plan.rows.slot[b : b + 1], self.rows
        first = not sequence.generated
        event = news(
            sequence, b, int(results.tokens[b]), bool(results.finite[b]),
            bool(plan.rows.samples[b]), results, self.limits.eos_token_ids,
        )  # fmt: skip
        if event.tokens:
            running.known[slots] += 1
            self._drawn([sequence], now)
            if first:
                self.policies.answered(sequence, now)
        if event.error is not None:
            self.corrupt += 1
            running.written[slots] = 0  # what led to it is given to nobody
        elif first:
            self.prompt_tokens += sequence.prompt_length
        if event.last:
            self._finish(sequence, cut=event.finish_reason != "stop")
        return event

    def _drawn(self, sequences: Iterable[Sequence], now: float) -> None:
        """A token of each was read, which counts where there are limits."""
        if self._rates.limits:
            for request in (sequence.request for sequence in sequences):
                self._rates.generated(request.tenant, _names(request), 1, now)

    def took(self, plan: Plan, seconds: float) -> None:
        """Learn what a step takes, and computing a page, from steps that mostly do that."""
        rows = len(plan.rows)
        tokens = int(plan.rows.length.sum())
        self._pace.took(tokens, rows, seconds)
        if tokens >= 2 * rows:
            self.room.prefix.kind.took(seconds * self.limits.page_size / tokens)

    def _publish(self, sequence: Sequence, tokens: int) -> None:
        """Offer the prefix cache the full pages of a sequence's first tokens."""
        pages, slot = tokens // self.limits.page_size, sequence.slot
        assert slot is not None, f"request {sequence.request.id} has no pages"
        first = int(self.rows.published[slot])
        if self.room.prefix.enabled and pages > first:
            keys = sequence.keys(pages, self.limits.page_size)
            held = self.rows.pages(slot)
            self.room.prefix.publish(keys[first:], held[first:pages], sequence.digests)
            self.rows.published[slot] = pages

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
            self._ahead.remove(sequence.registrations)
        else:
            self._stop(sequence)
        self._rates.ended(request.tenant, _names(request))
        for registration in sequence.registrations:
            self.store.release(registration)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence off the device, and offer the prefix cache what it computed.

        Steps in flight may still touch its pages and slot, but whatever gets those next is written
        by a later step.
        """
        assert sequence.slot is not None, f"request {sequence.request.id} does not run"
        self._publish(sequence, int(self.rows.written[sequence.slot]))
        self.room.prefix.release(self.rows.remove(sequence))
        sequence.applied = ()
        sequence.life += 1
        self.policies.stop(sequence)
        for digest in sequence.digests:
            self.room.residency.release(digest)


def _names(request: Request) -> Iterator[str]:
    """Of a request's adapters."""
    return (adapter.name for adapter in request.adapters)
