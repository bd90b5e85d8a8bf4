"""Everything that touches the device: weights, the pool, compiled programs, transfers.

All programs are compiled at start-up from abstract values, in a few threads, and looked up by key;
a missing key is an error, so nothing compiles while serving. `execute` dispatches one step and its
sampling and returns at once; `Step.wait` reads the results. Buffers given to the device are never
written again by the host (JAX on a CPU reads them where they are).

Invariant: `pages` and `slots` are donated to every program that changes them; after a failure in
between they are lost, and only `reset` makes the runner usable again.
"""

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jslora import sampling
from jslora.batch import (
    SAMPLERS,
    Bucket,
    Segment,
    StepRows,
    pack_sampling,
    pack_step,
    segments,
)
from jslora.blocks import pack_blocks
from jslora.buckets import choose
from jslora.programs import SCORE_ROWS, Catalog
from jslora.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, TokenLogprob
from jslora.schedule.plan import Plan, Results
from jslora.schedule.sequence import Sequence
from jslora.spans import pack_spans
from pallas_kernels.lora.api import Work
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork

COMPILE_THREADS = 2


class Runner:
    """One model on one device."""

    def __init__(
        self,
        catalog: Catalog,
        weights: dict[str, jax.Array],
        progress: Callable[[str, int, int, str], None],
    ) -> None:
        self.catalog, self.geometry, self.sizes = catalog, catalog.geometry, catalog.sizes
        self.upload_rows = catalog.upload_rows
        self._weights = catalog.programs.weights(weights)
        self._layers = [np.int32(layer) for layer in range(catalog.config.layers)]
        self._head = weights[catalog.head]
        self._executables: dict[Hashable, Any] = {}
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._lora: tuple[Hashable, Work, list[Segment]] | None = None
        self.compile_seconds = 0.0
        self._make_state()
        self._compile(progress)
        self._warm_up()

    @property
    def compilations(self) -> int:
        return len(self._executables)

    def reset(self) -> None:
        """Make the pool and the slots anew; everything they held is gone."""
        for array in jax.tree.leaves((self.pages, self.slots)):
            array.delete()  # there is no room for the new pool beside the old one
        self._make_state()

    def _make_state(self) -> None:
        pool = self.catalog.pool()
        self.pages = jnp.zeros(pool.shape, pool.dtype)
        self.slots = sampling.new_slots(self.sizes.max_running, self.catalog.config.vocab_size)

    # Compiling -----------------------------------------------------------------------------------

    def _compile(self, progress: Callable[[str, int, int, str], None]) -> None:
        """Lower every program from abstract values, one after the other, and compile in threads."""
        started, lock = time.monotonic(), threading.Lock()
        jobs = self.catalog.jobs()
        done = 0

        def finish(key: Hashable, lowered: Any, name: str) -> None:
            nonlocal done
            executable = lowered.compile(compiler_options=self.catalog.kernels.compiler_options)
            with lock:
                self._executables[key] = executable
                done += 1
                progress("compile", done, len(jobs), name)

        progress("compile", 0, len(jobs), "")
        with ThreadPoolExecutor(COMPILE_THREADS, "compile") as pool:
            waiting = []
            for key, (name, function, donated, arguments) in jobs.items():
                lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
                waiting.append(pool.submit(finish, key, lowered, name))
            for job in waiting:
                job.result()
        self.compile_seconds = time.monotonic() - started

    def _warm_up(self) -> None:
        """Run every step once without rows: what a first run loads, or lacks, shows before serving.

        A GPU's kernels are assembled and loaded, and temporaries allocated, when they first run.
        """
        for bucket in self.catalog.buckets:
            packed, work = (
                pack_step(StepRows.of([]), bucket, self.geometry),
                self._pack_lora([], bucket),
            )
            h, _ = self._step(bucket, packed, work)
            rows = pack_sampling(StepRows.of([]), bucket.rows, self.sizes.max_running)
            for sampler in SAMPLERS:
                program = self._executables["sample", bucket.rows, sampler]
                self.slots, _ = program(h, self._head, self.slots, *rows)
        jax.block_until_ready((self.pages, self.slots))

    # Steps ---------------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> "Step":
        """Dispatch a step and its sampling; the results are on their way when it returns."""
        rows = plan.rows
        bucket = choose(self.catalog.buckets, rows.length.tolist())
        packed = pack_step(rows, bucket, self.geometry)
        sampling_rows = pack_sampling(rows, bucket.rows, self.sizes.max_running)
        for sequence in plan.admitted:
            self._admit(sequence)
        h, x = self._step(bucket, packed, self._work(plan, bucket))
        program = self._executables["sample", bucket.rows, plan.sampler]
        self.slots, sampled = program(h, self._head, self.slots, *sampling_rows)
        for array in sampled:
            array.copy_to_host_async()
        return Step(len(rows), sampled, self._score(plan, x))

    def _step(self, bucket: Bucket, packed: np.ndarray, work: Work) -> tuple[jax.Array, jax.Array]:
        """Activations of each row's last token, and of all tokens; the pool is updated."""
        weights, last_token, programs = self._weights, self.slots.last_token, self._executables
        if bucket in programs:
            self.pages, h, x = programs[bucket](weights, self.pages, last_token, packed, work)
            return h, x
        x, inputs = programs["begin", bucket](weights.embed, last_token, packed)
        layer = programs["layer", bucket]
        for index, leaves in zip(self._layers, weights.layers, strict=True):
            x, self.pages = layer(leaves, x, self.pages, index, inputs, work)
        return programs["finish", bucket](weights.norm, x, inputs)

    def _work(self, plan: Plan, bucket: Bucket) -> Work:
        """The LoRA work lists; kept until the rows or adapters of a step change."""
        parts = segments(plan.rows)
        key = (bucket, tuple((id(part.placement), part.start, part.end) for part in parts))
        if self._lora is None or self._lora[0] != key:
            work = self._pack_lora(parts, bucket)
            self._lora = (key, work, parts)  # the parts keep the key's ids alive
        return self._lora[1]

    def _pack_lora(self, parts: list[Segment], bucket: Bucket) -> Work:
        """The work lists, in the form that the chosen kernel walks."""
        shape = self.catalog.programs.lora_shape(bucket)
        if isinstance(shape, BlockShape):
            blocks = pack_blocks(parts, bucket, self.geometry, shape)
            return BlockWork(*jax.device_put(tuple(blocks)))
        spans = pack_spans(parts, bucket, self.geometry, shape)
        return SegmentWork(*jax.device_put(tuple(spans)))

    def _admit(self, sequence: Sequence) -> None:
        params, vocab = sequence.request.params, self.catalog.config.vocab_size
        assert sequence.slot is not None, f"request {sequence.request.id} has no slot"
        tokens = np.zeros(self.sizes.max_model_len, np.int32)
        tokens[: len(sequence.tokens)] = sequence.tokens
        ids = np.full(MAX_LOGIT_BIAS, vocab, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, bias) in enumerate(params.logit_bias):
            ids[i], values[i] = token, bias
        stops = np.full(2 * MAX_STOP_IDS, vocab, np.int32)
        ends = () if params.ignore_eos else self.catalog.config.eos_token_ids[:MAX_STOP_IDS]
        held = (*ends, *params.stop_token_ids)
        stops[: len(held)] = held
        self.slots = self._executables["admit"](
            self.slots, np.int32(sequence.slot), tokens, np.int32(sequence.prompt_length),
            np.int32(len(sequence.tokens)), ids, values, stops,
        )  # fmt: skip

    def _score(self, plan: Plan, x: jax.Array) -> "list[tuple[list[tuple[int, int]], Any]]":
        """Logprobs of prompt tokens: [((row, position) of each), sampled], SCORE_ROWS at a time."""
        starts = np.cumsum([0, *plan.rows.length])
        wanted = [
            (b, position) for b, first, last in plan.scores for position in range(first, last + 1)
        ]
        found = []
        for at in range(0, len(wanted), SCORE_ROWS):
            part = wanted[at : at + SCORE_ROWS]
            index, target = np.zeros((2, SCORE_ROWS), np.int32)
            for i, (b, position) in enumerate(part):
                index[i] = starts[b] + position - 1 - plan.rows.position[b]
                target[i] = plan.sequences[b].tokens[position]
            scored = self._executables["score", x.shape[0]](x, self._head, index, target)
            found.append((part, scored))
        return found

    # Adapter pages -------------------------------------------------------------------------------

    def upload(self, rows: np.ndarray, data: np.ndarray) -> "Future[tuple[jax.Array, jax.Array]]":
        """Start copying a chunk of pages to the device, off the caller's thread."""

        def send() -> tuple[jax.Array, jax.Array]:
            sent = jax.device_put((rows, data))
            return jax.block_until_ready(sent)

        return self._uploads.submit(send)

    def write(self, chunk: tuple[jax.Array, jax.Array]) -> None:
        """Dispatch the write of a transferred chunk into the pool."""
        self.pages = self._executables["write"](self.pages, *chunk)

    def close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Step:
    """A dispatched step of so many rows."""

    rows: int
    sampled: sampling.Sampled
    scored: list[tuple[list[tuple[int, int]], sampling.Sampled]]

    def wait(self) -> Results:
        """Block until the step is done and read it.

        Raises whatever the device raised; the pool is lost then.
        """
        ints, floats = np.asarray(self.sampled.ints), np.asarray(self.sampled.floats)
        scores = {}
        for places, scored in self.scored:
            score_ints, score_floats = np.asarray(scored.ints), np.asarray(scored.floats)
            for i, place in enumerate(places):
                row = score_ints[i]
                scores[place] = _logprob(row[0], row[1], row[2:], score_floats[i])

        def logprob(b: int) -> TokenLogprob:
            return _logprob(ints[b, 0], ints[b, 2], ints[b, 3:], floats[b])

        return Results(ints[: self.rows, 0], ints[: self.rows, 1] != 0, logprob, scores)


def _logprob(token: Any, rank: Any, ids: np.ndarray, values: np.ndarray) -> TokenLogprob:
    top = tuple((int(i), float(v)) for i, v in zip(ids, values[1:], strict=True) if v > -np.inf)
    return TokenLogprob(token=int(token), logprob=float(values[0]), rank=int(rank), top=top)
