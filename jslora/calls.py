"""What a device is told to do, as plain arrays: a `Runner` makes calls, devices carry them out.

Every process of a group is told the same calls in the same order, so everything in a call is small
and host data, and means the same on every host. Host only: no jax.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SCORE_ROWS = 32
"""Prompt positions scored by one call of the scoring program."""


class AdmitCall(NamedTuple):
    """A sequence takes a slot: the arguments of the program of that name, in its order."""

    slot: np.ndarray  # int32 []
    tokens: np.ndarray  # int32 [max_model_len]
    prompt: np.ndarray  # int32 []
    total: np.ndarray  # int32 []
    bias_ids: np.ndarray  # int32 [MAX_LOGIT_BIAS]
    bias_values: np.ndarray  # float32 [MAX_LOGIT_BIAS]
    stop_ids: np.ndarray  # int32 [2 * MAX_STOP_IDS]


class StepCall(NamedTuple):
    """A step, its sampling, and the logprobs of prompt tokens.

    Attributes:
        bucket: number of the step's bucket in the catalog.
        packed: as `batch.pack_step` makes it.
        work: the LoRA work lists; None where they are those of the step before.
        sampler: one of `batch.SAMPLERS`.
        ints, floats: as `batch.pack_sampling` makes them.
        admitted: who takes a slot before the step.
        scores: (index, target), both [SCORE_ROWS], of each call of the scoring program.
    """

    bucket: int
    packed: np.ndarray
    work: tuple[np.ndarray, ...] | None
    sampler: str
    ints: np.ndarray
    floats: np.ndarray
    admitted: tuple[AdmitCall, ...] = ()
    scores: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


class StepResult(NamedTuple):
    """What is read back of a step: of its rows, and of each call of the scoring program.

    Columns are those of `jslora.sampling.Sampled`, and without the flag `finite` in `scores`.
    """

    ints: np.ndarray
    floats: np.ndarray
    scores: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A part of an adapter on its way to the device.

    Attributes:
        digest: of the adapter.
        index: number of the part, of `count`.
        pages: all pages of the adapter.
        rows: of the pool; those beyond it are dropped.
        data: the numbers for each device of this process, in the pool's dtype.
    """

    digest: str
    index: int
    count: int
    pages: tuple[int, ...]
    rows: np.ndarray  # int32 [C]
    data: np.ndarray  # [devices, C, numbers in a page]
