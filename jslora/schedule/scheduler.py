"""What runs in the next step: the scheduler's only output is a `Plan`, its only feedback `commit`.

Rows that decode come first, then prefills in progress, then waiting sequences in order of arrival,
until the step's tokens, rows or pages run out. When a running sequence cannot get a page, idle
adapters leave first, then the youngest running sequence is preempted: its pages are freed and it is
computed again later. A plan may count on tokens that the host has not read yet (they are fed back
on the device), so a sequence is preempted only once its own are read. Host only: no jax.

Invariants: after every commit, pages listed by sequences and adapters are exactly those in use; a
sequence has a slot and holds its adapter if and only if it runs.
"""

import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np

from jslora.adapters.version import Version
from jslora.batch import SAMPLERS, RowPlan
from jslora.errors import AdapterRejected, CorruptOutput, InvalidRequest, JsloraError, Overloaded
from jslora.memory.pages import PageAllocator
from jslora.memory.residency import Residency
from jslora.request import Request, TokenEvent, TokenLogprob
from jslora.schedule.admission import check_settings
from jslora.schedule.events import all_finite, failure, prompt_scores, shortened
from jslora.schedule.sequence import Sequence

PREFETCH = 8
"""Waiting sequences, from the front, whose adapters are loaded ahead of their turn."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and the queue (the configuration's `scheduler` section, and the model)."""

    max_running: int
    max_step_tokens: int
    max_queued: int
    max_queued_tokens: int
    max_model_len: int
    page_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: rows sorted by adapter, their sequences, and which of them are new to their slot.

    Attributes:
        admitted: sequences whose slot must be given its counts, bias and stop ids first.
        sampler: the least of `SAMPLERS` that serves every sampled row.
        scores: (row, first position, last position) whose prompt logprobs are wanted; the logprob
            of position p comes from the activations of p - 1.
    """

    rows: list[RowPlan]
    sequences: list[Sequence]
    admitted: list[Sequence]
    sampler: str
    scores: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Results:
    """What the host read back of a step, row by row; `logprob` not after the greedy program."""

    tokens: np.ndarray
    finite: np.ndarray
    logprob: Callable[[int], TokenLogprob]
    scores: dict[tuple[int, int], TokenLogprob]


class Scheduler:
    """Waiting and running sequences over one pool of pages."""

    def __init__(self, limits: Limits, pages: PageAllocator, residency: Residency) -> None:
        self.limits, self.pages, self.residency = limits, pages, residency
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.corrupt = self.prompt_tokens = self.generated_tokens = 0
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._by_id: dict[str, Sequence] = {}
        self._orders = count()
        self._failed: list[TokenEvent] = []

    # Requests ------------------------------------------------------------------------------------

    def add(self, request: Request, version: Version | None) -> None:
        """Queue a request, bound to an adapter version for its whole life.

        Raises:
            InvalidRequest: it can never fit, or its id is in use.
            Overloaded: the queue is full.
        """
        self._check(request, version)
        seed = request.params.seed
        sequence = Sequence(
            request, version, secrets.randbits(64) if seed is None else seed % 2**64,
            next(self._orders), list(request.prompt),
        )  # fmt: skip
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

    def _check(self, request: Request, version: Version | None) -> None:
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
        own = version.n_pages if version else 0
        if self._pages_for(total) + own > self.pages.total - 1:
            raise InvalidRequest(
                f"{total} tokens need {self._pages_for(total)} pages beside the adapter's {own}; "
                f"the pool has {self.pages.total - 1}",
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

    def fail_all(self, error: JsloraError) -> list[TokenEvent]:
        """End every request with an error, running or waiting."""
        found = list(self._by_id.values())
        for sequence in found:
            self._finish(sequence)
        return [failure(sequence, error) for sequence in found]

    def fail_running(self, error: JsloraError) -> list[TokenEvent]:
        """End what runs with an error; what waits stays."""
        found = list(self.running)
        for sequence in found:
            self._finish(sequence)
        return [failure(sequence, error) for sequence in found]

    @property
    def idle(self) -> bool:
        return not self._by_id and not self._failed

    @property
    def digests(self) -> set[str]:
        """Adapters that its requests hold or wait for."""
        return {sequence.digest for sequence in self._by_id.values() if sequence.version}

    def check(self) -> None:
        """Assert the page ledger (see `PageAllocator.check`) and the slots."""
        residents = [r.placement.pages for r in self.residency.residents.values()]
        self.pages.check([*(s.pages for s in self.running), *residents])
        slots = sorted([*self._slots, *(s.slot for s in self.running if s.slot is not None)])
        assert slots == list(range(self.limits.max_running)), f"slots in use or free: {slots}"

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
        return self._make(planned, admitted) if planned else None

    def _remaining(self, sequence: Sequence) -> int:
        return len(sequence.tokens) + sequence.pending - sequence.computed

    def _admit(self, budget: int) -> list[Sequence]:
        """Waiting sequences that start now; the first that lacks pages holds back all others."""
        started: list[Sequence] = []
        keep: set[str] = set()  # adapters that those further ahead in the queue wait for
        for ahead, sequence in enumerate(list(self.waiting)):
            if budget <= 0 or not self._slots or (ahead - len(started)) >= PREFETCH:
                break
            if sequence.version:
                ready = self._adapter_ready(sequence, keep)
                if ready is None:
                    break
                if not ready:
                    continue
            # Room for all it has, or it would start only to be preempted halfway.
            need = self._pages_for(len(sequence.tokens))
            if not self.residency.make_room(
                need, {*keep, sequence.digest}, last_resort=self._nothing_moves
            ):
                break
            self._start(sequence, need)
            started.append(sequence)
            budget -= self._remaining(sequence)
        return started

    @property
    def _nothing_moves(self) -> bool:
        """Whether no sequence and no transfer will ever free a page."""
        return not self.running and not self.residency.loading

    def _adapter_ready(self, sequence: Sequence, keep: set[str]) -> bool | None:
        """Whether its adapter is on the device; None if there is no room for it yet."""
        version = sequence.version
        assert version is not None
        try:
            if not self.residency.ensure(version, keep, last_resort=self._nothing_moves):
                return None
        except AdapterRejected as error:
            self._finish(sequence)
            self._failed.append(failure(sequence, error))
            return False
        keep.add(version.digest)
        return self.residency.placement(version) is not None

    def _start(self, sequence: Sequence, need: int) -> None:
        pages = self.pages.take(need)
        assert pages is not None, f"{self.pages.free} pages free, {need} promised"
        sequence.pages = pages
        sequence.slot = self._slots.pop()
        if sequence.version:
            self.residency.acquire(sequence.digest)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for so many tokens; False if it must wait for them."""
        need = self._pages_for(tokens) - len(sequence.pages)
        if need <= 0:
            return True
        alone = len(self.running) == 1
        keep = () if alone else {s.digest for s in self.waiting}
        room = self.residency.make_room
        if not (room(need, keep) or room(need, (), last_resort=alone)):
            if not alone:  # else an adapter is loading, and can leave when it is here
                self._make_way()
            return False
        more = self.pages.take(need)
        assert more is not None, f"{self.pages.free} pages free, {need} promised"
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

    def _make(self, planned: list[tuple[Sequence, int]], admitted: list[Sequence]) -> Plan:
        planned.sort(key=lambda item: (item[0].digest, item[0].order))
        rows = [self._row(sequence, n) for sequence, n in planned]
        sequences = [sequence for sequence, _ in planned]
        scores = []
        for b, (sequence, n) in enumerate(planned):
            first = sequence.computed + 1
            last = min(sequence.computed + n, sequence.prompt_length - 1)
            if sequence.request.params.prompt_logprobs is not None and last >= first:
                scores.append((b, first, last))
            sequence.computed += n
            sequence.pending += rows[b].samples
        needs = [s.sampler for r, s in zip(rows, sequences, strict=True) if r.samples]
        sampler = SAMPLERS[max(needs, default=0)]
        return Plan(rows, sequences, [s for s in admitted if s.stateful], sampler, scores)

    def _row(self, sequence: Sequence, n: int) -> RowPlan:
        p, first = sequence.request.params, sequence.computed
        end, known = first + n, len(sequence.tokens)
        assert sequence.slot is not None, f"request {sequence.request.id} runs without a slot"
        placement = self.residency.placement(sequence.version) if sequence.version else None
        assert (placement is None) == (sequence.version is None), "a running adapter is not there"
        return RowPlan(
            tokens=sequence.tokens[first : min(end, known)],
            fed=end > known,
            position=first,
            pages=sequence.pages[: self._pages_for(end)],
            slot=sequence.slot,
            samples=end == known + sequence.pending and p.max_tokens > 0,
            placement=placement,
            seed=sequence.seed,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition=p.repetition_penalty,
            presence=p.presence_penalty,
            frequency=p.frequency_penalty,
            hold_stop=end - sequence.prompt_length < p.min_tokens,
            stateful=sequence.stateful,
        )

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_size)

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
            event = self._news(sequence, row, b, results)
            if event is not None:
                events.append(event)
                if event.last:
                    self._finish(sequence)
        return events

    def failures(self) -> list[TokenEvent]:
        """Requests that ended without a step since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _news(
        self, sequence: Sequence, row: RowPlan, b: int, results: Results
    ) -> TokenEvent | None:
        request, params = sequence.request, sequence.request.params
        scored = params.max_tokens == 0 and row.position + row.length == sequence.prompt_length
        if not (row.samples or scored):
            return None
        prompt_logprobs = None
        if sequence.generated == 0:
            self.prompt_tokens += sequence.prompt_length
            prompt_logprobs = prompt_scores(sequence)
        if not (all_finite(prompt_logprobs) and (scored or results.finite[b])):
            self.corrupt += 1
            return failure(sequence, CorruptOutput("the model's output is not finite"))
        if scored:
            return TokenEvent(
                id=request.id, finish_reason="length", prompt_logprobs=prompt_logprobs
            )
        token = int(results.tokens[b])
        if self._ends(token, sequence):
            return TokenEvent(
                id=request.id,
                finish_reason="stop",
                stop_token=token,
                prompt_logprobs=prompt_logprobs,
            )
        sequence.tokens.append(token)
        self.generated_tokens += 1
        asked = params.logprobs is not None
        return TokenEvent(
            id=request.id,
            tokens=(token,),
            logprobs=(shortened(results.logprob(b), params.logprobs),) if asked else (),
            finish_reason="length" if sequence.generated >= params.max_tokens else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _ends(self, token: int, sequence: Sequence) -> bool:
        params = sequence.request.params
        if sequence.generated < params.min_tokens:
            return False
        eos = not params.ignore_eos and token in self.limits.eos_token_ids
        return eos or token in params.stop_token_ids

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._by_id[sequence.request.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence off the device. Steps in flight may still touch its pages and slot, but
        whatever gets those next is written by a later step."""
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        assert sequence.slot is not None, f"request {sequence.request.id} does not run"
        self._slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], None
        if sequence.version:
            self.residency.release(sequence.digest)

    def adapters_of(self, sequences: Collection[Sequence]) -> tuple[str, ...]:
        return tuple(sorted({s.request.adapter for s in sequences if s.request.adapter}))
