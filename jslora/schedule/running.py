"""All that run, in columns by slot: what every step asks of hundreds at once is asked of arrays.

What changes from step to step while a sequence runs is here and nowhere else: how far it is, its
block table, what the prefix cache has of it. What it is asked to do was put here when it started.
Host only: no jax.

Invariants: `sequences` is sorted by adapters, so that the rows of a plan are, and has exactly those
with a slot; `known` is the length of a sequence's `tokens`; `life` of a slot grows whenever a
sequence leaves it, so a step in flight can tell whether its row still means the same.
"""

from bisect import insort
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jslora.batch import DRAW, SAMPLERS, StepRows
from jslora.schedule.plan import Limits, Plan
from jslora.schedule.sequence import Sequence

Slots = Int[np.ndarray, " n"]


class Running:
    """The sequences that have a slot.

    Attributes:
        known: tokens, prompt and generated, that the host has read.
        pending: tokens sampled on the device and not yet read, 0 or 1 between steps.
        computed: leading tokens whose keys and values are written, or dispatched to be.
        held: pages in its block table; they hold at least `computed` tokens.
        given: leading pages that the prefix cache gave when it started.
        published: leading pages that the prefix cache was offered, or gave.
        written: leading tokens whose keys and values a completed step wrote, or the cache gave.
        expected: tokens that its answer is expected to have.
        hold: planned no more until its pending token is read, because it will be preempted.
        prompt, whole: its prompt's length, and its own at the end if nothing ends it sooner.
        least: tokens that its answer has at least.
        rare: whether its news are more than a token (`events.news`).
        life: see above.
        order: of arrival.
        sampler, tenant, adapter: see `Sequence`.
        scored: whether logprobs of its prompt are wanted.
        ends: whether the model's own end tokens end it.
    """

    def __init__(self, limits: Limits) -> None:
        n = limits.max_running
        self.sequences: list[Sequence] = []
        (
            self.known, self.pending, self.computed, self.held, self.given, self.published,
            self.written, self.expected, self.prompt, self.whole, self.least, self.life, self.order,
            self.sampler, self.tenant, self.adapter,
        ) = np.zeros((16, n), np.int64)  # fmt: skip
        self.hold, self.rare, self.scored, self.ends = np.zeros((4, n), bool)
        self._table = np.zeros((n, limits.pages(limits.max_model_len)), np.int32)
        self._draw = np.zeros(n, DRAW)
        self._page_size = limits.page_size
        self._free = list(range(n - 1, -1, -1))
        self._at: list[Any] = [None] * n
        self._slots: Slots | None = None  # as `sequences` are sorted; None: to be made anew

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return not self._free

    @property
    def free(self) -> int:
        """How many slots nobody has."""
        return len(self._free)

    def remaining(self, slot: int | None) -> int:
        """Tokens to compute before its next one can be drawn."""
        return int(self.known[slot] + self.pending[slot] - self.computed[slot])

    @property
    def slots(self) -> Slots:
        """Slots of all that run, sorted by adapter."""
        if self._slots is None:
            self._slots = np.array([sequence.slot for sequence in self.sequences], np.int64)
        return self._slots

    def at(self, slots: Slots) -> list[Sequence]:
        """Whose slots these are."""
        return [self._at[slot] for slot in slots.tolist()]

    # Coming and going ----------------------------------------------------------------------------

    def add(self, sequence: Sequence, pages: list[int], given: int) -> None:
        """A sequence starts, with pages for its tokens; the prefix cache gave the first `given`."""
        params, slot = sequence.request.params, self._free.pop()
        sequence.slot, self._at[slot], self._slots = slot, sequence, None
        insort(self.sequences, sequence, key=by_adapter)
        self.known[slot], self.prompt[slot] = len(sequence.tokens), sequence.prompt_length
        self.pending[slot], self.hold[slot] = 0, False
        self.computed[slot] = self.written[slot] = given * self._page_size
        self.given[slot] = self.published[slot] = given
        self._table[slot, : len(pages)], self.held[slot] = pages, len(pages)
        self.whole[slot] = sequence.prompt_length + params.max_tokens
        self.expected[slot], self.order[slot] = sequence.expected, sequence.order
        self.tenant[slot], self.adapter[slot] = sequence.tenant, sequence.adapter
        self.least[slot], self.ends[slot] = params.min_tokens, not params.ignore_eos
        self.scored[slot] = params.prompt_logprobs is not None
        self.rare[slot] = params.logprobs is not None or bool(params.stop_token_ids)
        self.sampler[slot], self._draw[slot] = sequence.sampler, tuple(sequence.draw)

    def remove(self, sequence: Sequence) -> list[int]:
        """It runs no more; the pages it held, which are the caller's now."""
        slot = sequence.slot
        assert slot is not None, f"request {sequence.request.id} does not run"
        self.sequences.remove(sequence)
        self._free.append(slot)
        self.life[slot] += 1
        sequence.slot, self._at[slot], self._slots = None, None, None
        return self.pages(slot)

    def pages(self, slot: int) -> list[int]:
        """A sequence's block table."""
        return self._table[slot, : self.held[slot]].tolist()

    def extend(self, slot: int, pages: list[int]) -> None:
        """Pages more for one slot."""
        held = self.held[slot]
        self._table[slot, held : held + len(pages)] = pages
        self.held[slot] += len(pages)

    def give(self, slots: Slots, pages: list[int]) -> None:
        """One page more for each of some slots."""
        self._table[slots, self.held[slots]] = pages
        self.held[slots] += 1

    # Steps ---------------------------------------------------------------------------------------

    def wanted(self) -> Int[np.ndarray, " rows"]:
        """Of all `slots`, tokens to compute next; 0 where there is nothing to compute them for."""
        slots = self.slots
        known, computed = self.known[slots] + self.pending[slots], self.computed[slots]
        over = known >= self.whole[slots]
        scored = self.whole[slots] == self.prompt[slots]  # no answer, but its prompt is computed
        over &= ~scored | (computed >= known)
        return np.where(over | self.hold[slots], 0, known - computed)

    def full_pages(self, slots: Slots) -> np.ndarray:
        """Whether all their pages are full."""
        return self.computed[slots] >= self._page_size * self.held[slots]

    def sort(self, decoding: Slots, others: Mapping[int, int]) -> tuple[Slots, Slots]:
        """Slots sorted by adapter, and tokens of each: one for those that decode, or as told."""
        count = np.zeros(len(self.life), np.int64)
        count[decoding] = 1
        count[[*others]] = [*others.values()]
        n = count[self.slots]
        return self.slots[n > 0], n[n > 0]

    def plan(self, slots: Slots, n: Int[np.ndarray, " n"], admitted: list[Sequence]) -> Plan:
        """The step that computes the next `n` tokens of each, which count as dispatched.

        Args:
            slots: sorted by adapter.
            admitted: those of them that are new to their slot.
        """
        scores = self._scores(slots, n) if self.scored[slots].any() else []
        sequences, lives = self.at(slots), self.life[slots]
        rows = self._advance(slots, n, sequences)
        sampler = SAMPLERS[self.sampler[slots[rows.samples]].max(initial=0)]
        stateful = [sequence for sequence in admitted if sequence.draw.stateful]
        return Plan(rows, sequences, lives, stateful, sampler, scores)

    def _scores(self, slots: Slots, n: Int[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
        """Of which rows and positions prompt logprobs are wanted (`Plan.scores`)."""
        first = self.computed[slots] + 1
        last = np.minimum(first + n - 1, self.prompt[slots] - 1)
        rows = np.flatnonzero(self.scored[slots] & (last >= first))
        return [(int(b), int(first[b]), int(last[b])) for b in rows]

    def _advance(
        self, slots: Slots, n: Int[np.ndarray, " n"], sequences: list[Sequence]
    ) -> StepRows:
        position, known, prompt = self.computed[slots], self.known[slots], self.prompt[slots]
        end = position + n
        samples = (end == known + self.pending[slots]) & (self.whole[slots] > prompt)
        fed = end > known
        self.computed[slots] = end
        self.pending[slots] += samples
        tokens: list[int] = []
        for b in np.flatnonzero(n > fed).tolist():
            tokens += sequences[b].tokens[position[b] : end[b]]
        width = -(-int(end.max(initial=0)) // self._page_size)
        return StepRows(
            tokens=np.array(tokens, np.int32), known=n - fed, fed=fed, position=position,
            table=self._table[slots, :width], slot=slots, samples=samples,
            hold_stop=end - prompt < self.least[slots], draw=self._draw[slots],
            applied=[sequence.applied for sequence in sequences],
        )  # fmt: skip

    def done(self, rows: StepRows, good: np.ndarray) -> list[int]:
        """Note what the `good` rows of a step wrote; which of them filled a page of a prompt."""
        slots = rows.slot
        self.written[slots[good]] = rows.end[good]
        pages = np.minimum(rows.end, self.prompt[slots]) // self._page_size
        return np.flatnonzero(good & (pages > self.published[slots])).tolist()

    def usual(self, rows: StepRows, tokens: np.ndarray, eos: tuple[int, ...]) -> np.ndarray:
        """Of rows that run still, whose token is neither the first, nor the last, nor special."""
        slots = rows.slot
        known = self.known[slots]
        found = rows.samples & ~self.rare[slots]
        found &= (known > self.prompt[slots]) & (known + 1 < self.whole[slots])
        for end in eos:
            found &= ~self.ends[slots] | (tokens != end)
        return found

    def check(self) -> None:
        """Assert that columns, slots and sequences agree."""
        assert self.sequences == sorted(self.sequences, key=by_adapter), "rows are not sorted"
        slots = sorted([*self._free, *self.slots.tolist()])
        assert slots == list(range(len(self._at))), f"slots in use or free: {slots}"
        assert self.at(self.slots) == self.sequences, "slots and sequences disagree"
        lengths = [len(sequence.tokens) for sequence in self.sequences]
        assert self.known[self.slots].tolist() == lengths, f"lengths {lengths}"
        pages = self.held[self.slots] * self._page_size
        assert (self.computed[self.slots] <= pages).all(), "tokens beyond their pages"


def by_adapter(sequence: Sequence) -> tuple[str, int]:
    """How rows are sorted."""
    return sequence.weights, sequence.order
