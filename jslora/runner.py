"""The host's half of a step: from a plan to a `StepCall` for the devices, and back to its results.

`execute` packs a plan's numbers, hands them over and returns at once; `DispatchedPlan.wait` reads
the results. Work lists that the devices still have from the step before are not sent again. A
`jslora.device.Device` carries the calls out, or a group of processes that each have one; the runner
cannot tell. No array of the devices is touched here.
"""

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jslora.batch import Geometry, Segment, pack_sampling, pack_step, segments
from jslora.buckets import choose
from jslora.calls import SCORE_ROWS, AdmitCall, Chunk, StepCall, StepResult
from jslora.programs import Catalog
from jslora.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, TokenLogprob
from jslora.schedule.plan import Plan, Results
from jslora.schedule.sequence import Sequence

Place = tuple[int, int]
"""(row of a step, position) of a token."""


class DispatchedStep(Protocol):
    """A step on its way."""

    def wait(self) -> StepResult: ...


class Devices(Protocol):
    """What carries out calls, in the order they are made (`jslora.device.Device`)."""

    catalog: Catalog
    compile_seconds: float

    @property
    def compilations(self) -> int: ...
    def step(self, call: StepCall) -> DispatchedStep: ...
    def upload(self, chunk: Chunk) -> "Future[Any]": ...
    def write(self, sent: Any) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


class Runner:
    """Runs plans on devices."""

    def __init__(self, devices: Devices) -> None:
        self.devices, self.catalog = devices, devices.catalog
        self._sizes = devices.catalog.sizes
        self._sent: Hashable = None  # whose work lists the devices have
        self._parts: list[Segment] = []  # they keep alive whose ids `_sent` holds

    @property
    def geometry(self) -> Geometry:
        return self.catalog.geometry

    @property
    def upload_rows(self) -> int:
        return self.catalog.upload_rows

    @property
    def compilations(self) -> int:
        return self.devices.compilations

    @property
    def compile_seconds(self) -> float:
        return self.devices.compile_seconds

    def upload(self, chunk: Chunk) -> "Future[Any]":
        """Start copying a chunk of an adapter to the devices."""
        return self.devices.upload(chunk)

    def write(self, sent: Any) -> None:
        """Dispatch the write of what an upload gave."""
        self.devices.write(sent)

    def reset(self) -> None:
        """Make the pool and the slots anew; everything they held is gone."""
        self._sent = None
        self.devices.reset()

    def close(self) -> None:
        self.devices.close()

    # Steps ---------------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> "DispatchedPlan":
        """Dispatch a step and its sampling; the results are on their way when it returns."""
        rows = plan.rows
        bucket = choose(self.catalog.buckets, rows.length.tolist())
        ints, floats = pack_sampling(rows, bucket.rows, self._sizes.max_running)
        parts = segments(rows)
        lists = ((id(part.placement), part.start, part.end, part.scale) for part in parts)
        key = (bucket, tuple(lists))
        known, self._sent = key == self._sent, None  # until they were taken
        places, scores = self._scores(plan)
        step = self.devices.step(
            StepCall(
                bucket=self.catalog.buckets.index(bucket),
                packed=pack_step(rows, bucket, self.geometry),
                work=None if known else self.catalog.pack_work(parts, bucket),
                sampler=plan.sampler,
                ints=ints,
                floats=floats,
                admitted=tuple(self._admit(sequence) for sequence in plan.admitted),
                scores=scores,
            )
        )
        self._sent, self._parts = key, parts
        return DispatchedPlan(step, len(rows), places)

    def _admit(self, sequence: Sequence) -> AdmitCall:
        params, vocab = sequence.request.params, self.catalog.config.vocab_size
        assert sequence.slot is not None, f"request {sequence.request.id} has no slot"
        tokens = np.zeros(self._sizes.max_model_len, np.int32)
        tokens[: len(sequence.tokens)] = sequence.tokens
        ids = np.full(MAX_LOGIT_BIAS, vocab, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, bias) in enumerate(params.logit_bias):
            ids[i], values[i] = token, bias
        stops = np.full(2 * MAX_STOP_IDS, vocab, np.int32)
        ends = () if params.ignore_eos else self.catalog.config.eos_token_ids[:MAX_STOP_IDS]
        held = (*ends, *params.stop_token_ids)
        stops[: len(held)] = held
        return AdmitCall(
            _int(sequence.slot), tokens, _int(sequence.prompt_length), _int(len(sequence.tokens)),
            ids, values, stops,
        )  # fmt: skip

    def _scores(
        self, plan: Plan
    ) -> tuple[list[list[Place]], tuple[tuple[np.ndarray, np.ndarray], ...]]:
        """Whose logprobs are wanted, SCORE_ROWS at a time, and the calls that find them."""
        lengths = plan.rows.length
        first = np.cumsum(lengths) - lengths - plan.rows.position  # token 0 would be there
        wanted = [(b, position) for b, *ends in plan.scores for position in _between(*ends)]
        places = [wanted[at : at + SCORE_ROWS] for at in range(0, len(wanted), SCORE_ROWS)]
        calls = []
        for part in places:
            index, target = np.zeros((2, SCORE_ROWS), np.int32)
            for i, (b, position) in enumerate(part):
                index[i] = first[b] + position - 1
                target[i] = plan.sequences[b].tokens[position]
            calls.append((index, target))
        return places, tuple(calls)


@dataclass(frozen=True)
class DispatchedPlan:
    """A plan of so many rows; `places` are those of each call of the scoring program."""

    step: DispatchedStep
    rows: int
    places: list[list[Place]]

    def wait(self) -> Results:
        """Block until the step is done and read it.

        Raises whatever the device raised; the pool is lost then.
        """
        ints, floats, scored = self.step.wait()
        scores = {
            place: _logprob(row[0], row[1], row[2:], values)
            for places, (score_ints, score_floats) in zip(self.places, scored, strict=True)
            for place, row, values in zip(places, score_ints, score_floats, strict=False)
        }

        def logprob(b: int) -> TokenLogprob:
            return _logprob(ints[b, 0], ints[b, 2], ints[b, 3:], floats[b])

        return Results(ints[: self.rows, 0], ints[: self.rows, 1] != 0, logprob, scores)


def _between(first: int, last: int) -> range:
    return range(first, last + 1)


def _int(number: int) -> np.ndarray:
    return np.array(number, np.int32)


def _logprob(token: Any, rank: Any, ids: np.ndarray, values: np.ndarray) -> TokenLogprob:
    top = tuple((int(i), float(v)) for i, v in zip(ids, values[1:], strict=True) if v > -np.inf)
    return TokenLogprob(token=int(token), logprob=float(values[0]), rank=int(rank), top=top)
