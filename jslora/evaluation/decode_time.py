"""How long a decode step takes with weights kept in several ways, side by side.

All ways are on the device at once and take turns step by step, so that a machine's moods fall on
all alike. A step is what the engine dispatches for rows that decode greedily, from the numbers of
the host to tokens that can be read; rows stand at one position for good.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jslora.batch import RowPlan, StepRows, pack_sampling, pack_step
from jslora.build import build_device, memory_plan, model_folder, read_model_config
from jslora.calls import StepCall
from jslora.config import EngineConfig
from jslora.device import Device
from jslora.progress import Progress, silent

_WARM = 3


@dataclass(frozen=True)
class Times:
    """Seconds of every step, [steps], by way; beside the bytes of the weights."""

    seconds: dict[str, np.ndarray]
    weights: dict[str, int]


def measure(
    config: EngineConfig,
    ways: Sequence[str],
    *,
    rows: int,
    context: int,
    steps: int,
    progress: Progress = silent,
) -> Times:
    """Time `steps` decode steps of each of some values of `model.quantize`.

    Args:
        rows: that decode, all with `context` positions, the new one included.

    Raises:
        ConfigError, ModelError: a way cannot be had on this machine, or the model's files are
            wrong.
    """
    calls: dict[str, Callable[[], object]] = {}
    weights = {}
    for way in ways:
        device, weights[way] = _build(config, way, rows, context, progress)
        calls[way] = partial(_step, device, _call(device, rows, context))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for done in range(_WARM + steps):
        progress("steps", done, _WARM + steps, "")
        for way, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - started)
    return Times({way: np.array(found[_WARM:]) for way, found in seconds.items()}, weights)


def _build(
    config: EngineConfig, way: str, rows: int, context: int, progress: Progress
) -> tuple[Device, int]:
    """A device with no more programs and pages than the step needs, and its weights' bytes."""
    size = config.pool.page_size
    scheduler = config.scheduler.model_copy(update={"max_running": rows, "max_step_tokens": rows})
    pool = config.pool.model_copy(update={"pages": 1 + rows * -(-context // size)})
    model = config.model.model_copy(update={"quantize": way, "max_model_len": context})
    config = config.model_copy(update={"scheduler": scheduler, "pool": pool, "model": model})
    folder = model_folder(config, progress)
    shape = read_model_config(config, folder)
    plan = memory_plan(config, shape)
    return build_device(config, shape, plan, folder, progress), plan.weights


def _call(device: Device, rows: int, context: int) -> StepCall:
    """Rows that each decode at the last position."""
    catalog = device.catalog
    each = -(-context // catalog.sizes.page_size)
    plans = [
        RowPlan([1], False, context - 1, range(1 + row * each, 1 + (row + 1) * each), row, True)
        for row in range(rows)
    ]
    bucket = next(b for b in catalog.buckets if b.tokens == b.rows >= rows)
    ints, floats = pack_sampling(StepRows.of(plans), bucket.rows, rows)
    return StepCall(
        bucket=catalog.buckets.index(bucket),
        packed=pack_step(StepRows.of(plans), bucket, catalog.geometry),
        work=catalog.pack_work([], bucket),
        sampler="greedy",
        ints=ints,
        floats=floats,
    )


def _step(device: Device, call: StepCall) -> None:
    device.step(call).wait()
