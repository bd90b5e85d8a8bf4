"""Whether an executable that was compiled without a GPU runs on this one, and computes the same.

The file is what `scripts/check_gpu_build.py --executable` writes (`jslora.aot.saved`): a decode
step of a few layers of Llama-3-8B. It gets the arguments of a real batch, and the same program
compiled here gets them again.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jslora.aot import saved
from jslora.batch import RowPlan, StepRows, pack_step
from jslora.gpu import oracle
from jslora.gpu.cases import (
    LLAMA3_8B,
    Mix,
    decode_bucket,
    pack_work,
    place_mix,
    random_pool,
    share_out,
)
from jslora.gpu.decode import lower_job, without_lora
from jslora.gpu.session import Session
from jslora.model.weights import dummy_weights
from jslora.programs import Catalog, Sizes, choose_kernels, slack
from pallas_kernels import launch

LIMIT = 2e-2
"""Relative difference of a row's activations: both are bf16, and may sum in another order."""
CONTEXT, SCALE, MIX = 300, 1e-3, Mix(8, (16,))


def run(session: Session, path: Path) -> None:
    """Load, run and compare."""
    if not path.is_file():
        session.emit("executable", found=False, path=str(path))
        return
    described, execute = saved.load(path, jax.devices()[0])
    session.emit("executable", found=True, loaded=True, **_about(described))
    catalog = catalog_of(described)
    arguments = real_arguments(catalog, described["case"]["lora"])
    started = time.perf_counter()
    pages, h, *_ = jax.block_until_ready(execute(jax.tree.leaves(arguments)))
    seconds = time.perf_counter() - started
    session.emit("executable", found=True, loaded=True, ran=True, first_run_seconds=seconds)
    here = compile_here(catalog)
    weights, _, *rest = arguments
    _, wanted, *_ = here(weights, pages, *rest)
    found, right = (np.asarray(each, np.float64) for each in (h, wanted))
    error = oracle.worst(found, right, np.arange(len(right)))
    session.emit(
        "executable", found=True, loaded=True, ran=True, error=error, limit=LIMIT,
        ok=error <= LIMIT, **_about(described),
    )  # fmt: skip


def _about(described: dict[str, Any]) -> dict[str, Any]:
    return {name: described[name] for name in ("device", "jax", "jaxlib", "case")}


def catalog_of(described: dict[str, Any]) -> Catalog:
    """The programs that the executable is one of.

    Raises:
        ValueError: it is no decode step of Llama-3-8B for one device.
    """
    case = described["case"]
    judged = {name: case[name] for name in ("what", "model", "phase", "devices")}
    if judged != {"what": "step", "model": "llama3-8b", "phase": "decode", "devices": 1}:
        raise ValueError(f"the executable is {judged}; only Llama-3-8B's decode step is judged")
    config = replace(LLAMA3_8B, layers=case["layers"])
    (pool,) = (one for one in described["arguments"] if len(one["shape"]) == 5)
    pages = (pool["shape"][0] - slack(config, case["page_size"])) // config.layers
    sizes = Sizes(
        pages=pages, page_size=case["page_size"], max_running=case["rows"],
        max_step_tokens=case["tokens"], max_model_len=case["positions"],
        max_rank=case["max_rank"], max_composed=case["max_composed"],
        dtype=np.dtype(pool["dtype"]),
    )  # fmt: skip
    kernels = choose_kernels(config, case["page_size"], case["kernels"], launch.platform())
    catalog = Catalog(config, sizes, kernels)
    return catalog if case["lora"] else without_lora(catalog)


def real_arguments(catalog: Catalog, lora: bool) -> tuple[Any, ...]:
    """Random weights and pool; every row at the same position, with an adapter if there is LoRA."""
    c, sizes = catalog.config, catalog.sizes
    bucket, each = decode_bucket(catalog, sizes.max_running), -(-CONTEXT // sizes.page_size)
    rows = [
        RowPlan([b], False, CONTEXT - 1, range(1 + b * each, 1 + (b + 1) * each), b, True)
        for b in range(bucket.rows)
    ]
    first = 1 + bucket.rows * each
    page = catalog.geometry.page_numbers
    parts = share_out(place_mix(c, MIX, page, SCALE, first), bucket.rows) if lora else []
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = dummy_weights(c, sizes.dtype, lambda name, shape: where)
    return (
        catalog.programs.weights(leaves),
        random_pool(catalog.pool_rows, catalog),
        jnp.zeros(sizes.max_running, jnp.int32),
        jax.device_put(pack_step(StepRows.of(rows), bucket, catalog.geometry)),
        pack_work(parts, bucket, catalog),
    )


def compile_here(catalog: Catalog) -> Any:
    """The same step, compiled on this machine."""
    bucket = decode_bucket(catalog, catalog.sizes.max_running)
    (job,) = catalog.step_jobs(bucket).values()
    return lower_job(job).compile(catalog.kernels.compiler_options)
