"""The decode step of the whole model, sampling included, with adapters and without.

A timed call is what the engine dispatches for a step of greedy rows: the step's program with its
packed numbers from the host, then the sampling program; weights are random, and the rows stand at
one position for good. "off" is a step compiled without any LoRA, which is what merged weights cost
too; "idle" is the step with LoRA and an empty work list. Uniform ranks beside a mix of them say
what the mix should cost. Mixes are timed in turns, each side by side with "off", the first ones
first; what was timed is recorded at once, and the rest is skipped when the time is over.
"""

from collections.abc import Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jslora import sampling
from jslora.batch import Bucket, RowPlan, StepRows, pack_sampling, pack_step
from jslora.bench import floor
from jslora.gpu import gaps
from jslora.gpu.cases import (
    Mix,
    Plan,
    decode_bucket,
    mix_pages,
    pack_work,
    place_mix,
    random_pool,
    share_out,
)
from jslora.gpu.session import Session
from jslora.gpu.timing import Call, measure
from jslora.model.weights import dummy_weights
from jslora.programs import Catalog
from jslora.sharding import Job
from jslora.step import Weights
from pallas_kernels import launch
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Work

SCALE = 1e-3
OFF, IDLE = "off", "idle"
FIRST_MIXES = 2
"""Those that are timed before all others."""
PROFILED = 5
"""Steps in a profile."""
COMPILE_THREADS = 4


@dataclass
class Device:
    """What stays on the device between steps."""

    weights: Weights
    head: jax.Array
    pages: jax.Array
    slots: sampling.Slots


class Step:
    """The compiled programs of one bucket."""

    def __init__(self, catalog: Catalog, bucket: Bucket, pool: Executor) -> None:
        """Lower the programs here, and have them compiled in threads of a pool."""
        self.bucket = bucket
        sample = catalog.jobs()["sample", bucket.rows, "greedy"]
        jobs = catalog.step_jobs(bucket) | {"sample": sample}
        self._programs: dict[Hashable, Future[Any]] = {
            key: pool.submit(lower_job(job).compile, catalog.kernels.compiler_options)
            for key, job in jobs.items()
        }  # fmt: skip

    def __call__(
        self, device: Device, packed: np.ndarray, sampled: tuple[np.ndarray, ...], work: Work
    ) -> jax.Array:
        """Dispatch a step; returns each row's token and whether its logits were finite."""
        h = self._run(device, packed, work)
        program = self._programs["sample"].result()
        device.slots, result = program(h, device.head, device.slots, *sampled)
        return result.ints

    def _run(self, device: Device, packed: np.ndarray, work: Work) -> jax.Array:
        programs = {key: program.result() for key, program in self._programs.items()}
        weights, last, bucket = device.weights, device.slots.last_token, self.bucket
        if bucket in programs:
            device.pages, h, _ = programs[bucket](weights, device.pages, last, packed, work)
            return h
        x, inputs = programs["begin", bucket](weights.embed, last, packed)
        for index, leaves in enumerate(weights.layers):
            x, device.pages = programs["layer", bucket](
                leaves, x, device.pages, np.int32(index), inputs, work
            )
        h, _ = programs["finish", bucket](weights.norm, x, inputs)
        return h


def lower_job(job: Job) -> Any:
    """One of the catalog's programs, lowered for the device at hand."""
    return jax.jit(job.function, donate_argnums=job.donated).lower(*job.arguments)


def without_lora(catalog: Catalog) -> Catalog:
    """The same programs with no LoRA kernel in them at all."""
    return replace(catalog, kernels=replace(catalog.kernels, lora=launch.OFF))


def run(session: Session, plan: Plan, kernels: Kernels) -> None:
    """Time the plan's mixes side by side, and look for gaps between launches."""
    each = -(-plan.step_context // plan.page_size)
    behind = 1 + plan.step_rows * each  # the rows' pages come first, and page 0 is nobody's
    pages = behind + max(mix_pages(plan, mix) for mix in plan.step_mixes)
    catalog = Catalog(plan.model, plan.sizes(pages, plan.step_rows), kernels)
    rows = [
        RowPlan([1], False, plan.step_context - 1, range(1 + b * each, 1 + (b + 1) * each), b, True)
        for b in range(plan.step_rows)
    ]
    calls = _calls(plan, catalog, rows, behind)
    first = str(plan.step_mixes[0])
    finite = np.asarray(calls[first]())[: plan.step_rows, 1]
    session.emit("finite", rows=int(finite.sum()), of=plan.step_rows)
    for turn in session.points(turns(plan)):
        _measure(session, plan, kernels, turn, calls)
    for name in (OFF, first):
        session.attempt(f"profile, {name}", partial(_profile, session, name, calls[name]))


def turns(plan: Plan) -> list[tuple[str, ...]]:
    """Names of what is timed side by side with "off", the most important first."""
    names = [str(mix) for mix in plan.step_mixes]
    rest = (IDLE, *names[FIRST_MIXES:])
    return [(OFF, *names[:FIRST_MIXES]), *((name,) for name in rest)]


def _calls(plan: Plan, catalog: Catalog, rows: list[RowPlan], behind: int) -> dict[str, Call]:
    """A step of each mix, whose adapters lie behind a page, and those without."""
    bucket, device = decode_bucket(catalog, plan.step_rows), _device(catalog)
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        off = Step(without_lora(catalog), bucket, pool)
        on = Step(catalog, bucket, pool)
    packed = pack_step(StepRows.of(rows), bucket, catalog.geometry)
    sampled = pack_sampling(StepRows.of(rows), bucket.rows, plan.step_rows)
    idle = pack_work([], bucket, catalog)
    calls: dict[str, Call] = {
        OFF: partial(off, device, packed, sampled, pack_work([], bucket, without_lora(catalog))),
        IDLE: partial(on, device, packed, sampled, idle),
    }
    for mix in plan.step_mixes:
        placed = place_mix(plan.model, mix, plan.page_numbers, SCALE, behind)
        work = pack_work(share_out(placed, plan.step_rows), bucket, catalog)
        calls[str(mix)] = partial(on, device, packed, sampled, work)
    return calls


def _device(catalog: Catalog) -> Device:
    """Random weights and a random pool; no two sums cancel, and nothing is zero."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = dummy_weights(catalog.config, catalog.sizes.dtype, lambda name, shape: where)
    slots = sampling.new_slots(catalog.sizes.max_running, catalog.config.vocab_size)
    pages = random_pool(catalog.pool_rows, catalog)
    return Device(catalog.programs.weights(leaves), leaves[catalog.head], pages, slots)


def _measure(
    session: Session, plan: Plan, kernels: Kernels, turn: tuple[str, ...], calls: dict[str, Call]
) -> None:
    """Record a turn; `off` is the time without LoRA in the same turn."""
    timings = measure(
        {name: calls[name] for name in dict.fromkeys((OFF, *turn))}, plan.rounds,
        4 * plan.sample_seconds,
    )  # fmt: skip
    none = Mix(0, (0,))
    named = {OFF: none, IDLE: none} | {str(mix): mix for mix in plan.step_mixes}
    for name in turn:
        mix = named[name]
        cost = floor.step_floor(
            plan.model, mix.rows(plan.step_rows, plan.step_context), plan.item.itemsize
        )
        session.emit(
            "step", name=name, lora=kernels.lora, attention=kernels.attention,
            batch=plan.step_rows, context=plan.step_context, adapters=mix.adapters,
            ranks=mix.ranks, **asdict(cost.total), base=asdict(cost.base),
            off=timings[OFF].seconds, **timings[name].record(),
        )  # fmt: skip


def _profile(session: Session, name: str, call: Call) -> None:
    found = gaps.profile(call, PROFILED)
    if found is None:
        session.emit("gaps", name=name, readable=False)
    else:
        session.emit("gaps", name=name, readable=True, **asdict(found))
