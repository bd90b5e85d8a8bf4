"""A device that computes nothing: it says when a step ends, by a model, and invents its tokens.

Steps run in the order in which they are dispatched, each as soon as the one before it has ended.
Host only: no jax.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jslora.batch import Placement
from jslora.bench.steptime import StepTime, Work
from jslora.bench.virtual import Timeline
from jslora.model.config import MODULES, ModelConfig
from jslora.request import TokenLogprob
from jslora.schedule.plan import Plan, Results

TOKEN, END = 1, 2
"""What is drawn, and the token that ends an answer."""


@dataclass(frozen=True, slots=True)
class Step:
    """A dispatched step and when it is run."""

    plan: Plan
    work: Work
    began: float
    ends: float


class VirtualDevice:
    """A queue of steps.

    Args:
        most_rows: of a step.
    """

    def __init__(
        self, model: ModelConfig, step_time: StepTime, timeline: Timeline, most_rows: int
    ) -> None:
        self._model, self._step_time, self._timeline = model, step_time, timeline
        self._free = 0.0
        self._numbers: dict[str, int] = {}  # of the factors of adapters, by digest
        self._tokens = np.full(most_rows, TOKEN, np.int32)
        self._finite = np.ones(most_rows, bool)

    def dispatch(self, plan: Plan, written: int) -> Step:
        """Queue a step, and before it the writing of so many bytes of adapters."""
        work = self._work(plan)
        work.written = written
        began = max(self._timeline.now, self._free)
        self._free = began + self._step_time.seconds(work)
        return Step(plan, work, began, self._free)

    def results(self, plan: Plan, lengths: Mapping[str, int]) -> Results:
        """What is read of a step.

        Args:
            lengths: after so many tokens a request is ended; those that are not in it never are.
        """
        n = len(plan.rows)
        tokens = self._tokens[:n]
        if lengths:
            tokens = tokens.copy()
            ends = zip(plan.rows.end.tolist(), plan.rows.samples.tolist(), strict=True)
            for b, (sequence, (end, samples)) in enumerate(zip(plan.sequences, ends, strict=True)):
                done = end - sequence.prompt_length
                if samples and done >= lengths.get(sequence.request.id, done + 1):
                    tokens[b] = END
        return Results(tokens, self._finite[:n], no_logprob, {})

    def _work(self, plan: Plan) -> Work:
        work, seen = Work(), set()
        rows = plan.rows
        for tokens, position, applied in zip(
            rows.length.tolist(), rows.position.tolist(), rows.applied, strict=True
        ):
            work.add(tokens, position)
            for placement, _ in applied:
                numbers = self._numbers_of(placement)
                work.lora_products += tokens * numbers
                if placement.digest not in seen:
                    seen.add(placement.digest)
                    work.adapter_numbers += numbers
        work.adapters = len(seen)
        return work

    def _numbers_of(self, placement: Placement) -> int:
        """Numbers of an adapter's factors, in all layers."""
        found = self._numbers.get(placement.digest)
        if found is None:
            widths = [sum(self._model.widths(module)) for module in MODULES]
            found = int(placement.rank.sum(axis=0, dtype=np.int64) @ widths)
            self._numbers[placement.digest] = found
        return found


def no_logprob(row: int) -> TokenLogprob:
    """For requests that ask for none."""
    raise AssertionError(f"the logprob of row {row} was not asked for")
