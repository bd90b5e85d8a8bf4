"""A step as the scheduler decides it, and what comes back of it. Host only: no jax."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jslora.batch import SAMPLERS, RowPlan
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
    planned: list[tuple[Sequence, int]], admitted: list[Sequence], limits: Limits
) -> Plan:
    """The plan that computes the next so many tokens of each sequence, which count as dispatched.

    Args:
        planned: sequences and how many of their tokens to compute, sorted by adapter.
    """
    rows, sequences, lives, scores, sampler = [], [], [], [], 0
    for b, (sequence, n) in enumerate(planned):
        row = _row(sequence, n, limits.page_size)
        if sequence.request.params.prompt_logprobs is not None:
            first = sequence.computed + 1
            last = min(sequence.computed + n, sequence.prompt_length - 1)
            if last >= first:
                scores.append((b, first, last))
        if row.samples:
            sequence.pending += 1
            sampler = max(sampler, sequence.sampler)
        sequence.computed += n
        rows.append(row)
        sequences.append(sequence)
        lives.append(sequence.life)
    stateful = [s for s in admitted if s.draw.stateful]
    return Plan(rows, sequences, lives, stateful, SAMPLERS[sampler], scores)


def _row(sequence: Sequence, n: int, page_size: int) -> RowPlan:
    first, tokens = sequence.computed, sequence.tokens
    end, known = first + n, len(tokens)
    assert sequence.slot is not None, f"request {sequence.request.id} runs without a slot"
    assert (sequence.placement is None) == (sequence.registration is None), (
        f"the adapter {sequence.digest[:12]!r} of a running sequence is not there"
    )
    params, pages, needed = sequence.request.params, sequence.pages, -(-end // page_size)
    return RowPlan(
        tokens[first:end],
        end > known,
        first,
        pages[:needed],
        sequence.slot,
        end == known + sequence.pending and params.max_tokens > 0,
        sequence.placement,
        sequence.draw,
        end - sequence.prompt_length < params.min_tokens,
    )
