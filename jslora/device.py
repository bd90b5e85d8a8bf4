"""Everything that touches the devices: weights, the pool, compiled programs, transfers.

A `Device` is this process's part of a replica's mesh, of one device or many; it carries out the
calls that a `jslora.runner.Runner` makes. All programs are compiled at start-up from abstract
values, in a few threads, and looked up by key; a missing key is an error, so nothing compiles while
serving. `step` dispatches one step and its sampling and returns at once; `Step.wait` reads the
results. Buffers given to the devices are never written again by the host (JAX on a CPU reads them
where they are).

Invariants: the processes of a mesh carry out the same calls in the same order; none waits for the
others but in the programs. `pages` and `slots` are donated to every program that changes them;
after a failure in between they are lost, and only `reset` makes the device usable again.
"""

import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jslora import sampling
from jslora.batch import SAMPLERS, Bucket, StepRows, pack_sampling, pack_step
from jslora.calls import Chunk, StepCall, StepResult
from jslora.programs import Catalog
from jslora.progress import Progress
from jslora.sharding import EACH, POOL, WHOLE, lies, whole_array
from pallas_kernels.lora.api import Work
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork

COMPILE_THREADS = 2

Sent = tuple[jax.Array, jax.Array]
"""A chunk on the devices: rows of the pool, and each device's numbers."""


class Device:
    """One model on the devices of a mesh.

    Args:
        weights: every leaf, split as the catalog says.
    """

    def __init__(
        self, catalog: Catalog, mesh: Mesh, weights: dict[str, jax.Array], progress: Progress
    ) -> None:
        self.catalog, self.geometry, self._mesh = catalog, catalog.geometry, mesh
        self.upload_rows = catalog.upload_rows
        self._own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        self._weights = catalog.programs.weights(weights)
        self._head = weights[catalog.head]
        numbers = np.arange(catalog.config.layers, dtype=np.int32)
        self._layers = self._everywhere([np.array(number) for number in numbers])
        self._executables: dict[Hashable, Any] = {}
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._work: Work | None = None
        self._state = jax.jit(self._zeros, out_shardings=(lies(mesh, POOL), lies(mesh, WHOLE)))
        self.pages, self.slots = self._state()
        self.compile_seconds = 0.0
        self._compile(progress)
        self._warm_up()

    @property
    def compilations(self) -> int:
        return len(self._executables)

    def reset(self) -> None:
        """Make the pool and the slots anew; everything they held is gone."""
        for array in jax.tree.leaves((self.pages, self.slots)):
            array.delete()  # there is no room for the new pool beside the old one
        self.pages, self.slots = self._state()

    def close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)

    def _zeros(self) -> tuple[jax.Array, sampling.Slots]:
        part, sizes = self.catalog.pool(), self.catalog.sizes
        whole = whole_array(part, POOL, self._mesh).shape
        slots = sampling.new_slots(sizes.max_running, self.catalog.config.vocab_size)
        return jnp.zeros(whole, part.dtype), slots

    # Compiling -----------------------------------------------------------------------------------

    def _compile(self, progress: Progress) -> None:
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
            for key, job in jobs.items():
                job = job.over(self._mesh)
                lowered = jax.jit(job.function, donate_argnums=job.donated).lower(*job.arguments)
                waiting.append(pool.submit(finish, key, lowered, job.name))
            for compiled in waiting:
                compiled.result()
        self.compile_seconds = time.monotonic() - started

    def _warm_up(self) -> None:
        """Run every step once without rows: what a first run loads, or lacks, shows before serving.

        A GPU's kernels are assembled and loaded, and temporaries allocated, when they first run.
        """
        none = StepRows.of([])
        for bucket in self.catalog.buckets:
            work = self._place(self.catalog.pack_work([], bucket), bucket)
            h, _ = self._run(bucket, pack_step(none, bucket, self.geometry), work)
            rows = pack_sampling(none, bucket.rows, self.catalog.sizes.max_running)
            for sampler in SAMPLERS:
                self._sample(bucket, sampler, h, *rows)
        jax.block_until_ready((self.pages, self.slots))

    # Steps ---------------------------------------------------------------------------------------

    def step(self, call: StepCall) -> "Step":
        """Dispatch a step and its sampling; the results are on their way when it returns."""
        bucket = self.catalog.buckets[call.bucket]
        if call.work is not None:
            self._work = self._place(call.work, bucket)
        assert self._work is not None, "the first step brings no LoRA work"
        for admitted in call.admitted:
            self.slots = self._executables["admit"](self.slots, *admitted)
        h, x = self._run(bucket, call.packed, self._work)
        sampled = self._sample(bucket, call.sampler, h, call.ints, call.floats)
        score = self._executables["score", bucket.tokens]
        scored = [score(x, self._head, *places) for places in call.scores]
        for array in jax.tree.leaves((sampled, scored)):
            array.copy_to_host_async()
        return Step(sampled, scored)

    def _run(self, bucket: Bucket, packed: np.ndarray, work: Work) -> tuple[jax.Array, jax.Array]:
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

    def _sample(
        self, bucket: Bucket, sampler: str, h: jax.Array, ints: np.ndarray, floats: np.ndarray
    ) -> sampling.Sampled:
        program = self._executables["sample", bucket.rows, sampler]
        self.slots, sampled = program(h, self._head, self.slots, ints, floats)
        return sampled

    # What comes from the host -------------------------------------------------------------------

    def upload(self, chunk: Chunk) -> "Future[Sent]":
        """Start copying a chunk of pages to the devices, off the caller's thread."""

        def send() -> Sent:
            parts = jax.device_put(list(chunk.data[:, None]), self._own)
            shape = (self._mesh.size, *chunk.data.shape[1:])
            data = jax.make_array_from_single_device_arrays(shape, lies(self._mesh, EACH), parts)
            return jax.block_until_ready((*self._everywhere([chunk.rows]), data))

        return self._uploads.submit(send)

    def write(self, sent: Sent) -> None:
        """Dispatch the write of a transferred chunk into the pool."""
        self.pages = self._executables["write"](self.pages, *sent)

    def _place(self, lists: tuple[np.ndarray, ...], bucket: Bucket) -> Work:
        """Work lists on the devices, in the form that the chosen kernel walks."""
        blocks = isinstance(self.catalog.programs.lora_shape(bucket), BlockShape)
        placed = self._everywhere(lists)
        return BlockWork(*placed) if blocks else SegmentWork(*placed)

    def _everywhere(self, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
        """The same on every device; each process says it of its own, and none asks another."""
        where = lies(self._mesh, WHOLE)
        if self._mesh.size == 1:
            return jax.device_put(list(arrays), where)  # all in one call
        parts = [jax.device_put([array] * len(self._own), self._own) for array in arrays]
        make = jax.make_array_from_single_device_arrays
        return [make(array.shape, where, part) for array, part in zip(arrays, parts, strict=True)]


@dataclass(frozen=True)
class Step:
    """A dispatched step; every device has all its results."""

    sampled: sampling.Sampled
    scored: list[sampling.Sampled]

    def wait(self) -> StepResult:
        """Block until the step is done and read it.

        Raises whatever the device raised; the pool is lost then.
        """
        scores = tuple((np.asarray(each.ints), np.asarray(each.floats)) for each in self.scored)
        return StepResult(np.asarray(self.sampled.ints), np.asarray(self.sampled.floats), scores)
