"""A step as the scheduler decides it, and what comes back of it. Host only: no jax."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jslora.batch import SAMPLERS, Placement, RowPlan
from jslora.request import TokenLogprob
from jslora.schedule.sequence import Sequence


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

    def pages(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: rows sorted by adapter, their sequences, and which of them are new to their slot.

    Attributes:
        lives: of each sequence, which of its lives the step belongs to.
        admitted: sequences whose slot must be given its counts, bias and stop ids first.
        sampler: the least of `SAMPLERS` that serves every sampled row.
        scores: (row, first position, last position) whose prompt logprobs are wanted; the logprob
            of position p comes from the activations of p - 1.
    """

    rows: list[RowPlan]
    sequences: list[Sequence]
    lives: list[int]
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


def make_plan(
    planned: list[tuple[Sequence, int]], admitted: list[Sequence], limits: Limits,
    placed: Callable[[str], Placement | None],
) -> Plan:  # fmt: skip
    """The plan that computes the next so many tokens of each sequence, which count as dispatched.

    Args:
        planned: sequences and how many of their tokens to compute.
        placed: where the adapter of a digest lies on the device.
    """
    planned = sorted(planned, key=lambda item: (item[0].digest, item[0].order))
    rows = [_row(sequence, n, limits, placed) for sequence, n in planned]
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
    lives = [sequence.life for sequence in sequences]
    return Plan(rows, sequences, lives, [s for s in admitted if s.stateful], sampler, scores)


def _row(
    sequence: Sequence, n: int, limits: Limits, placed: Callable[[str], Placement | None]
) -> RowPlan:
    p, first = sequence.request.params, sequence.computed
    end, known = first + n, len(sequence.tokens)
    assert sequence.slot is not None, f"request {sequence.request.id} runs without a slot"
    placement = placed(sequence.digest) if sequence.registration else None
    assert (placement is None) == (sequence.registration is None), (
        f"the adapter {sequence.digest[:12]!r} of a running sequence is not there"
    )
    return RowPlan(
        tokens=sequence.tokens[first : min(end, known)],
        fed=end > known,
        position=first,
        pages=sequence.pages[: limits.pages(end)],
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
