"""What runs in the next step: the scheduler's only output is a `Plan`, its only feedback `commit`.

Rows that decode come first, then prefills in progress, then waiting sequences in order of arrival,
until the step's tokens, rows or pages run out. The adapters of those that wait are brought ahead of
their turn (`fetch`). When a running sequence cannot get a page, what lies idle leaves first, then
the youngest running sequence is preempted: its pages are released and it is computed again later,
from wherever the prefix cache still has it. A plan may count on tokens that the host has not read
yet (they are fed back on the device), so a sequence is preempted only once its own are read.
Host only: no jax.

Invariants: after every commit, the pages listed by sequences, the prefix cache and adapters are
exactly those in use; a sequence has a slot and holds its adapter if and only if it runs; an adapter
that came for a waiting sequence stays until it was used, unless nothing else could move.
"""

import secrets
from collections import deque
from collections.abc import Collection, Iterable
from itertools import count, islice

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.errors import AdapterRejected, InvalidRequest, JsloraError, Overloaded
from jslora.memory.room import Room
from jslora.request import Request, TokenEvent
from jslora.schedule.admission import check_settings
from jslora.schedule.events import failure, news
from jslora.schedule.plan import Limits, Plan, Results, make_plan
from jslora.schedule.sequence import Sequence

PREFETCH = 8
"""Waiting sequences, from the front, whose adapters are brought ahead of their turn."""


class Scheduler:
    """Waiting and running sequences over one pool of pages."""

    def __init__(self, limits: Limits, room: Room, store: AdapterStore) -> None:
        self.limits, self.room, self.store = limits, room, store
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.corrupt = self.prompt_tokens = self.generated_tokens = 0
        self.asked_tokens = self.hit_tokens = 0  # of the prefix cache
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._by_id: dict[str, Sequence] = {}
        self._orders = count()
        self._failed: list[TokenEvent] = []
        self._short: Sequence | None = None  # the first whose adapter finds no room

    # Requests ------------------------------------------------------------------------------------

    def add(self, request: Request, registration: Registration | None) -> None:
        """Queue a request, bound to an adapter for its whole life; its end releases it.

        Raises:
            InvalidRequest: it can never fit, or its id is in use.
            Overloaded: the queue is full.
        """
        self._check(request, registration)
        seed = request.params.seed
        sequence = Sequence(
            request, registration, secrets.randbits(64) if seed is None else seed % 2**64,
            next(self._orders), list(request.prompt),
        )  # fmt: skip
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

    def _check(self, request: Request, registration: Registration | None) -> None:
        limits, prompt = self.limits, len(request.prompt)
        if request.id in self._by_id:
            raise InvalidRequest(f"request id {request.id!r} is in use", param="request_id")
        if prompt == 0:
            raise InvalidRequest("the prompt is empty", param="prompt")
        check_settings(request, limits.vocab_size)
        total = prompt + request.params.max_tokens
        if total > limits.max_model_len:
            raise InvalidRequest(
                f"{prompt} prompt tokens and max_tokens {request.params.max_tokens} make {total}; "
                f"the model's context is {limits.max_model_len}",
                param="max_tokens",
            )
        own = registration.n_pages if registration else 0
        if limits.pages(total) + own > self.room.pages.total - 1:
            raise InvalidRequest(
                f"{total} tokens need {limits.pages(total)} pages beside the adapter's {own}; "
                f"the pool has {self.room.pages.total - 1}",
                param="max_tokens",
            )
        queued = sum(sequence.prompt_length for sequence in self.waiting)
        tokens_full = bool(self.waiting) and queued + prompt > limits.max_queued_tokens
        if len(self.waiting) >= limits.max_queued or tokens_full:
            raise Overloaded(f"{len(self.waiting)} requests are waiting; the queue is full")

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; nothing more is said of them."""
        for name in ids:
            sequence = self._by_id.get(name)
            if sequence is not None:
                self._finish(sequence)

    def fail(self, sequences: Iterable[Sequence], error: JsloraError) -> list[TokenEvent]:
        """End sequences with an error."""
        found = list(sequences)
        for sequence in found:
            self._finish(sequence)
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
        """Assert the page ledger (see `PageAllocator.check`) and the slots."""
        residents = [r.placement.pages for r in self.room.residency.residents.values()]
        held = self.room.prefix.held()
        self.room.pages.check([*(s.pages for s in self.running), *residents, *held])
        self.room.prefix.check()
        slots = sorted([*self._slots, *(s.slot for s in self.running if s.slot is not None)])
        assert slots == list(range(self.limits.max_running)), f"slots in use or free: {slots}"

    # Adapters ahead of their turn ----------------------------------------------------------------

    def fetch(self) -> None:
        """Start to bring the adapters of those who wait, in order, as far as there is room.

        Whoever is further ahead keeps what it needs: its adapter, and pages for its tokens.
        """
        keep, spare = self._wanted_fresh(), 0
        ahead: set[Registration] = set()
        self._short = None
        for sequence in list(islice(self.waiting, PREFETCH)):
            if sequence.registration:
                first = sequence.registration not in ahead
                ahead.add(sequence.registration)
                if len(ahead) > 1 and not self.store.fits_host(sum(r.n_pages for r in ahead)):
                    return  # one would push the other out of host memory
                try:
                    version = self.store.resolve(sequence.registration)
                    if version and not self._bring(version, sequence, keep, spare):
                        self._short = sequence
                        return
                except AdapterRejected as error:
                    self._failed += self.fail([sequence], error)
                    continue
                if version:
                    keep.add(version.digest)
                if first and sequence.digest not in self.room.residency.residents:
                    spare += sequence.registration.n_pages  # it is being read
            spare += self.limits.pages(len(sequence.tokens))

    def _bring(
        self, version: Version, sequence: Sequence, keep: Collection[str], spare: int
    ) -> bool:
        """Start to bring an adapter unless it is here; False if there is no room for it.

        Raises:
            AdapterRejected: its files could not be read again.
        """
        residency = self.room.residency
        residency.revive(version.digest)
        if version.digest in residency.residents:
            return True
        blob = self.store.blob(version)
        if blob is None:
            return True  # being read; asked for again in the next step
        pages = self.room.take_run(version.n_pages, keep, spare)
        if pages is None and self._last_resort(sequence):
            pages = self.room.take_run(version.n_pages)
        if pages is None:
            return False
        residency.bring(version, blob, pages)
        return True

    def _last_resort(self, sequence: Sequence) -> bool:
        """Whether it is next, and no sequence and no transfer will ever free a page for it."""
        moves = self.running or self.room.residency.loading
        return not moves and sequence is self.waiting[0]

    def _wanted_fresh(self) -> set[str]:
        """Adapters that came for a waiting sequence and were not used yet, and pinned ones."""
        residency, found = self.room.residency, set(self.room.residency.pinned)
        for sequence in self.waiting:
            resident = residency.residents.get(sequence.digest)
            if resident and resident.fresh:
                found.add(sequence.digest)
        return found

    # Planning ------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now."""
        self._preempt_held()
        planned: list[tuple[Sequence, int]] = []
        budget = self.limits.max_step_tokens
        # Decoding rows first (one token each), so that a prefill never delays a stream.
        for sequence in sorted(self.running, key=lambda s: (self._remaining(s) > 1, s.order)):
            n = min(self._remaining(sequence), budget)
            if sequence.ready and n > 0 and self._grow(sequence, sequence.computed + n):
                planned.append((sequence, n))
                budget -= n
        admitted = []
        for sequence in self._admit(budget):
            n = min(self._remaining(sequence), budget)
            planned.append((sequence, n))
            admitted.append(sequence)
            budget -= n
        if not planned:
            return None
        return make_plan(planned, admitted, self.limits, self.room.residency.placement)

    def _remaining(self, sequence: Sequence) -> int:
        return len(sequence.tokens) + sequence.pending - sequence.computed

    def _admit(self, budget: int) -> list[Sequence]:
        """Waiting sequences that start now; the first that lacks pages holds back all others."""
        started: list[Sequence] = []
        keep = self._wanted_fresh()
        residency = self.room.residency
        for sequence in list(islice(self.waiting, PREFETCH + len(self._slots))):
            if budget <= 0 or not self._slots or sequence is self._short:
                break
            if sequence.registration:
                if residency.placement(sequence.digest) is None:
                    continue  # on its way
                keep.add(sequence.digest)
            if not self._start(sequence, keep):
                break
            started.append(sequence)
            budget -= self._remaining(sequence)
        return started

    def _start(self, sequence: Sequence, keep: Collection[str]) -> bool:
        """Give a waiting sequence pages for all it has, or it would be preempted halfway."""
        known: list[int] = []
        if self.room.prefix.enabled and sequence.request.params.prompt_logprobs is None:
            # Its last token must be computed, for what comes after it.
            most = (len(sequence.tokens) - 1) // self.limits.page_size
            known = self.room.prefix.take(sequence.keys(most, self.limits.page_size))
        need = self.limits.pages(len(sequence.tokens)) - len(known)
        pages = self.room.take(need, keep)
        if pages is None and self._last_resort(sequence):
            pages = self.room.take(need, {sequence.digest})
        if pages is None:
            self.room.prefix.release(known)
            return False
        sequence.pages, sequence.published = known + pages, len(known)
        sequence.computed = len(known) * self.limits.page_size
        sequence.cached = min(sequence.computed, sequence.prompt_length)
        self.asked_tokens += sequence.prompt_length
        self.hit_tokens += sequence.cached
        sequence.slot = self._slots.pop()
        if sequence.registration:
            self.room.residency.acquire(sequence.digest)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for so many tokens; False if it must wait for them."""
        need = self.limits.pages(tokens) - len(sequence.pages)
        if need <= 0:
            return True
        alone = len(self.running) == 1
        more = self.room.take(need, {s.digest for s in self.waiting} | self.room.residency.pinned)
        if more is None:
            more = self.room.take(need, () if alone else self._wanted_fresh())
        if more is None:
            if not alone:  # else an adapter is on its way, and can leave when it is here
                self._make_way()
            return False
        sequence.pages += more
        return True

    def _make_way(self) -> None:
        """Choose who will be preempted: the youngest, once its sampled token was read."""
        if not any(sequence.hold for sequence in self.running):
            max(self.running, key=lambda s: s.order).hold = True

    def _preempt_held(self) -> None:
        for sequence in [s for s in self.running if s.hold and not s.pending]:
            self._stop(sequence)
            sequence.computed, sequence.hold = 0, False
            sequence.scores.clear()
            self.preemptions += 1
            older = sum(s.order < sequence.order for s in self.waiting)
            self.waiting.insert(older, sequence)

    # Feedback ------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: Results) -> list[TokenEvent]:
        """Take in what a step produced; the news for its requests."""
        events = self.failures()
        for (b, position), score in results.scores.items():
            plan.sequences[b].scores[position] = score
        for b, (row, sequence) in enumerate(zip(plan.rows, plan.sequences, strict=True)):
            sequence.pending -= row.samples
            if sequence.finished:
                continue
            if results.finite[b] and sequence.life == plan.lives[b]:
                self._publish(sequence, row.position + row.length)
            before = sequence.generated
            event = news(sequence, row, b, results, self.limits.eos_token_ids)
            if event is not None:
                self._count(sequence, before, event)
                events.append(event)
                if event.last:
                    self._finish(sequence)
        return events

    def _publish(self, sequence: Sequence, computed: int) -> None:
        """Offer the prefix cache the pages that a completed step filled."""
        size = self.limits.page_size
        if not self.room.prefix.enabled or computed // size <= sequence.published:
            return
        keys = sequence.keys(computed // size, size)
        for i in range(sequence.published, len(keys)):
            self.room.prefix.publish(keys[i], sequence.pages[i], sequence.digest)
        sequence.published = len(keys)

    def _count(self, sequence: Sequence, before: int, event: TokenEvent) -> None:
        if event.error is not None:
            self.corrupt += 1
        elif before == 0:
            self.prompt_tokens += sequence.prompt_length
        self.generated_tokens += len(event.tokens)

    def failures(self) -> list[TokenEvent]:
        """Requests that ended without a step since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._by_id[sequence.request.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence)
        if sequence.registration:
            self.store.release(sequence.registration)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence off the device. Steps in flight may still touch its pages and slot, but
        whatever gets those next is written by a later step."""
        self.running.remove(sequence)
        self.room.prefix.release(sequence.pages)
        assert sequence.slot is not None, f"request {sequence.request.id} does not run"
        self._slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.published = [], None, 0
        sequence.life += 1
        if sequence.registration:
            self.room.residency.release(sequence.digest)

    def adapters_of(self, sequences: Collection[Sequence]) -> tuple[str, ...]:
        return tuple(sorted({s.request.adapter for s in sequences if s.request.adapter}))
