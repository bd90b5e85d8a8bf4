"""A step as the scheduler decides it, and what comes back of it. Host only: no jax."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jslora.batch import StepRows
from jslora.request import TokenLogprob
from jslora.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and the queue (the configuration's `scheduler` section, and the model).

    Attributes:
        max_rank, max_composed: of the adapters of one request, all together.
    """

    max_running: int
    max_step_tokens: int
    max_queued: int
    max_queued_tokens: int
    max_model_len: int
    page_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_rank: int = 512
    max_composed: int = 1

    def pages(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: rows sorted by adapter, their sequences, and which of them are new to their slot.

    Attributes:
        lives: of each slot, which of its lives the step belongs to (`Running.life`).
        admitted: sequences whose slot must be given its counts, bias and stop ids first.
        sampler: the least of `SAMPLERS` that serves every sampled row.
        scores: (row, first position, last position) whose prompt logprobs are wanted; the logprob
            of position p comes from the activations of p - 1.
    """

    rows: StepRows
    sequences: list[Sequence]
    lives: np.ndarray
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
