"""A device that computes nothing and notices everything: a wrong page, slot, token or order.

Its "model" draws the next token as a hash of what it finds: the row's tokens, read back from the
pool through its block table; the counts of its slot; its seed. `continue_request` says what must
come out, from the request alone.
"""

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from fake_adapters import LAYERS, page_mark

from jslora.batch import SAMPLERS, RowPlan
from jslora.request import Request, TokenLogprob
from jslora.schedule.plan import Limits, Plan, Results
from jslora.schedule.sequence import Sequence, weights_key


@dataclass
class Answer:
    """Everything a client is told of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    end: str | None = None
    """finish reason, or type of the error"""
    stop_token: int | None = None


def _hash(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _draw(
    tokens: list[int], weights: str, seed: int | None, counts: Counter[int] | None,
    held: Iterable[int], vocab: int,
) -> tuple[int, bool]:  # fmt: skip
    """(token, whether the logits were finite); they always are unless the prompt begins with 0."""
    number = _hash(tokens, weights, seed, sorted(counts.items()) if counts is not None else None)
    token = number % vocab
    while token in held:
        token = (token + 1) % vocab
    return token, tokens[0] != 0 or (number >> 12) % 8 != 0


def score(tokens: list[int], position: int, top: int) -> TokenLogprob:
    """Logprob of the token at a position after those before it."""
    alternatives = tuple((i, -float(i)) for i in range(top))
    rank = _hash("rank", tokens[: position + 1])
    return TokenLogprob(token=tokens[position], logprob=-rank / 2**32, rank=rank, top=alternatives)


def stateful(request: Request) -> bool:
    p = request.params
    penalties = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return penalties or p.logit_bias != () or p.min_tokens > 0


def least_sampler(row: RowPlan) -> int:
    """Which of `SAMPLERS` a row needs at least, logprobs aside."""
    if row.draw.temperature > 0 and (
        row.draw.top_k > 0 or row.draw.top_p < 1 or row.draw.min_p > 0
    ):
        return SAMPLERS.index("filter")
    drawn = row.draw.temperature > 0 or row.draw.stateful or row.hold_stop
    return SAMPLERS.index("draw" if drawn else "greedy")


def stops(request: Request, limits: Limits) -> set[int]:
    p = request.params
    return {*p.stop_token_ids, *(() if p.ignore_eos else limits.eos_token_ids)}


def continue_request(request: Request, weights: str, limits: Limits) -> Answer:
    """What a request must be answered, whatever else is going on."""
    p, answer, prompt = request.params, Answer(), list(request.prompt)
    if p.prompt_logprobs is not None:
        at = range(1, len(prompt))
        answer.prompt_logprobs = [None, *(score(prompt, i, p.prompt_logprobs) for i in at)]
    ends, counts = stops(request, limits), Counter() if stateful(request) else None
    while len(answer.tokens) < p.max_tokens:
        done = len(answer.tokens)
        held = ends if done < p.min_tokens else ()
        seed = None if p.temperature == 0 else p.seed
        token, finite = _draw(
            prompt + answer.tokens, weights, seed, counts, held, limits.vocab_size
        )
        if not finite:
            answer.end = "corrupt_output_error"
            if not done:
                answer.prompt_logprobs = None
            return answer
        if token in ends:
            answer.end, answer.stop_token = "stop", token
            return answer
        answer.tokens.append(token)
        if counts is not None:
            counts[token] += 1
        if p.logprobs is not None:
            answer.logprobs.append(score(prompt + answer.tokens, len(prompt) + done, p.logprobs))
    answer.end = "length"
    return answer


class FakeDevice:
    """Pool, slots, and one step after the other."""

    def __init__(self, limits: Limits, pages: int) -> None:
        self.limits, self.pages = limits, pages
        self.pool: list[dict[int, tuple[str, int]] | np.ndarray]
        self.pool = [{} for _ in range(LAYERS * pages)]
        self.last_token = [-1] * limits.max_running
        self.counts = [Counter[int]() for _ in range(limits.max_running)]
        self.held: list[set[int]] = [set() for _ in range(limits.max_running)]

    def write(self, chunk: tuple[np.ndarray, np.ndarray]) -> None:
        for row, data in zip(*chunk, strict=True):
            if row < len(self.pool):
                assert row % self.pages, "the null page is written"
                self.pool[row] = data

    def execute(self, plan: Plan) -> Results:
        """Run a step; the results are what the host reads later."""
        self._check(plan)
        for sequence in plan.admitted:
            self._admit(sequence)
        for row in plan.rows:
            self._write(row)
        contexts = [self._read(row) for row in plan.rows]
        for row in plan.rows:
            assert not row.samples or SAMPLERS.index(plan.sampler) >= least_sampler(row)
        greedy = plan.sampler == "greedy"
        drawn = [self._sample(*pair, greedy) for pair in zip(plan.rows, contexts, strict=True)]
        tokens, finite = zip(*drawn, strict=True)
        scores = {}
        for b, first, last in plan.scores:
            row = plan.rows[b]
            for position in range(first, last + 1):
                assert row.position <= position - 1 < row.position + row.length
                found = [*contexts[b][:position], plan.sequences[b].tokens[position]]
                scores[b, position] = score(found, position, 20)

        def logprob(b: int) -> TokenLogprob:
            assert not greedy and plan.rows[b].samples
            return score([*contexts[b], tokens[b]], len(contexts[b]), 20)

        return Results(np.array(tokens, np.int32), np.array(finite), logprob, scores)

    def _check(self, plan: Plan) -> None:
        weights = [self._weights(row) for row in plan.rows]
        assert weights == sorted(weights), "rows of the same adapters must lie side by side"
        assert weights == [sequence.weights for sequence in plan.sequences]
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), f"slots {slots}"
        assert min(row.length for row in plan.rows) > 0
        assert sum(row.length for row in plan.rows) <= self.limits.max_step_tokens
        fresh = [s for s in plan.sequences if s in plan.admitted]
        assert len(fresh) == len(plan.admitted), "a slot is set up for a row that is not there"

    def _admit(self, sequence: Sequence) -> None:
        slot = sequence.slot
        self.counts[slot] = Counter(sequence.tokens[sequence.prompt_length :])
        self.held[slot] = stops(sequence.request, self.limits)

    def _write(self, row: RowPlan) -> None:
        tokens = [*row.tokens, *([self.last_token[row.slot]] if row.fed else [])]
        for position, token in enumerate(tokens, start=row.position):
            page, offset = divmod(position, self.limits.page_size)
            assert 0 < row.pages[page] < self.pages, f"page {row.pages[page]}"
            for layer in range(LAYERS):
                at = layer * self.pages + row.pages[page]
                if not isinstance(self.pool[at], dict):
                    self.pool[at] = {}
                self.pool[at][offset] = (self._weights(row), token)

    def _read(self, row: RowPlan) -> list[int]:
        """The row's context, and a look at its adapters' pages."""
        found = []
        for position in range(row.position + row.length):
            page, offset = divmod(position, self.limits.page_size)
            weights, token = self.pool[row.pages[page]][offset]
            assert weights == self._weights(row), f"KV of {weights!r} in a row of another adapter"
            found.append(token)
        for placement, _ in row.applied:
            number = int(placement.digest)
            for layer in range(LAYERS):
                for n, page in enumerate(placement.pages):
                    data = self.pool[layer * self.pages + page]
                    assert isinstance(data, np.ndarray), f"page {page} holds no adapter"
                    assert data.tolist() == page_mark(number, layer, n)
        return found

    def _weights(self, row: RowPlan) -> str:
        digests = [placement.digest for placement, _ in row.applied]
        return weights_key(digests, [scale for _, scale in row.applied])

    def _sample(self, row: RowPlan, context: list[int], greedy: bool) -> tuple[int, bool]:
        if not row.samples:
            return -1, True
        token, finite = _draw(
            context,
            self._weights(row),
            row.draw.seed if row.draw.temperature else None,
            self.counts[row.slot] if row.draw.stateful else None,
            self.held[row.slot] if row.hold_stop else (),
            self.limits.vocab_size,
        )
        self.last_token[row.slot] = token
        if not greedy:
            self.counts[row.slot][token] += 1
        return token, finite
