"""What a group of processes costs its leader in each step: encoding, sending, comparing digests.

The steps are those of Llama-3-8B on one device of several: rows that decode, each at its own
length, sorted by adapter; every so often one of them ends and another sequence takes its place, so
that a slot is taken and the work lists change. Packing them is not counted. Devices do nothing; the
followers are processes on this machine that receive, check and decode every step.
"""

import itertools
import multiprocessing
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jslora.adapters.layout import lay_out
from jslora.batch import (
    Applied,
    Draw,
    Placement,
    RowPlan,
    StepRows,
    pack_sampling,
    pack_step,
    segments,
)
from jslora.calls import AdmitCall, Chunk, StepCall, StepResult
from jslora.distributed import messages
from jslora.distributed.deliveries import Deliveries
from jslora.distributed.deltas import Encoder
from jslora.distributed.group import Group
from jslora.distributed.hosts import AllHosts
from jslora.distributed.links import Links
from jslora.distributed.obedience import Obedience
from jslora.distributed.section import DistributedSection
from jslora.distributed.uplink import Uplink
from jslora.model.config import MODULES, from_hf
from jslora.programs import Catalog, Sizes, choose_kernels
from jslora.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from jslora.split import Split

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip

_PAGE, _RANK, _POOL = 16, 16, 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What runs: `turnover` steps pass between two sequences that end."""

    rows: int = 256
    adapters: int = 64
    devices: int = 8
    longest: int = 4096
    turnover: int = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Of each step: seconds of the leader's, bytes to one follower, and whether rows changed."""

    seconds: np.ndarray
    sizes: np.ndarray
    changed: np.ndarray


def measure(load: Load, followers: int, steps: int) -> Costs:
    """Run steps through a group on loopback."""
    sizer = Encoder()
    seconds, sizes, changed = np.zeros(steps), np.zeros(steps, int), np.zeros(steps, bool)
    with _group(followers, load.rows) as group:
        for number, call in enumerate(_calls(load, steps)):
            began = time.perf_counter()
            group.step(call).wait()
            seconds[number] = time.perf_counter() - began
            sizes[number] = len(messages.encode_step(call, sizer))
            changed[number] = call.work is not None
    return Costs(seconds, sizes, changed)


# The steps ----------------------------------------------------------------------------------------


def _calls(load: Load, steps: int) -> Iterator[StepCall]:
    catalog, random = _catalog(load), np.random.default_rng(0)
    placements = _placements(load, catalog)
    bucket = next(b for b in catalog.buckets if b.tokens == b.rows >= load.rows)
    free = itertools.cycle(random.permutation(np.arange(1, _POOL)).tolist())

    def start(slot: int) -> RowPlan:
        position = int(random.integers(8, load.longest // 2))
        pages = [next(free) for _ in range(position // _PAGE + 1)]
        which = Applied(placements[random.integers(len(placements))])
        return RowPlan([], True, position, pages, slot, True, (which,), Draw(seed=slot))

    rows = [start(slot) for slot in range(load.rows)]
    for step in range(steps):
        admitted: tuple[AdmitCall, ...] = ()
        changed = step % load.turnover == 0
        if changed:
            ended = int(random.integers(load.rows))
            rows[ended] = start(rows[ended].slot)
            admitted = (_admit(rows[ended], load),)
            rows.sort(key=lambda row: row.applied[0].placement.digest)
        yield _call(catalog, bucket, StepRows.of(rows), changed, admitted)
        rows = [_next(row, free) for row in rows]


def _catalog(load: Load) -> Catalog:
    model, split = from_hf(LLAMA3_8B), Split(load.devices)
    sizes = Sizes(
        pages=_POOL, page_size=_PAGE, max_running=load.rows, max_step_tokens=2048,
        max_model_len=load.longest, max_rank=64, dtype=jnp.dtype("bfloat16"),
    )  # fmt: skip
    return Catalog(model, sizes, choose_kernels(model, _PAGE, "auto", "cuda", split), split)


def _placements(load: Load, catalog: Catalog) -> list[Placement]:
    """Adapters of one rank on all modules, wherever they may lie."""
    model, random = catalog.config, np.random.default_rng(1)
    rank = np.full((model.layers, len(MODULES)), _RANK, np.int32)
    scale = np.ones(rank.shape, np.float32)
    numbers = catalog.split.page_numbers(model, _PAGE)
    layout = lay_out(rank, scale, model, numbers, catalog.split)
    return [
        Placement(
            f"{n:064x}", tuple(random.integers(1, _POOL, layout.n_pages).tolist()),
            layout.a_offset, layout.b_offset, layout.rank, layout.scale,
        )
        for n in range(load.adapters)
    ]  # fmt: skip


def _call(
    catalog: Catalog, bucket: Any, rows: StepRows, changed: bool, admitted: tuple[AdmitCall, ...]
) -> StepCall:
    ints, floats = pack_sampling(rows, bucket.rows, catalog.sizes.max_running)
    return StepCall(
        bucket=catalog.buckets.index(bucket),
        packed=pack_step(rows, bucket, catalog.geometry),
        work=catalog.pack_work(segments(rows), bucket) if changed else None,
        sampler="draw",
        ints=ints,
        floats=floats,
        admitted=admitted,
    )


def _next(row: RowPlan, free: Iterator[int]) -> RowPlan:
    """The same row a step later."""
    position, pages = row.position + 1, row.pages
    if position // _PAGE >= len(pages):
        pages = [*pages, next(free)]
    return row._replace(position=position, pages=pages)


def _admit(row: RowPlan, load: Load) -> AdmitCall:
    tokens = np.zeros(load.longest, np.int32)
    tokens[: row.position] = np.random.default_rng(row.position).integers(1, 10**5, row.position)
    return AdmitCall(
        np.asarray(np.int32(row.slot)), tokens, np.asarray(np.int32(row.position)),
        np.asarray(np.int32(row.position)), np.full(MAX_LOGIT_BIAS, 128256, np.int32),
        np.zeros(MAX_LOGIT_BIAS, np.float32), np.full(2 * MAX_STOP_IDS, 128256, np.int32),
    )  # fmt: skip


# The group ----------------------------------------------------------------------------------------


class _IdleDevice:
    """Done with everything at once."""

    catalog: Any = None
    compilations = 0
    compile_seconds = 0.0

    def __init__(self, rows: int) -> None:
        self._result = StepResult(np.zeros((rows, 8), np.int32), np.zeros((rows, 8), np.float32))

    def step(self, call: StepCall) -> "_IdleDevice":
        return self

    def wait(self) -> StepResult:
        return self._result

    def upload(self, chunk: Chunk) -> "Future[Any]":
        raise NotImplementedError("no adapter is brought here")

    def write(self, sent: Any) -> None:
        raise NotImplementedError("no adapter is brought here")

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def _group(followers: int, rows: int) -> Iterator[Group]:
    with socket.create_server(("127.0.0.1", 0)) as any_socket:
        port = any_socket.getsockname()[1]
    section = DistributedSection.model_validate({
        "coordinator": "127.0.0.1:1", "control_port": port, "num_processes": followers + 1,
        "token": "a token for one measurement",
    })  # fmt: skip
    links = Links(section, {}, _never)
    spawn = multiprocessing.get_context("spawn")
    children = [
        spawn.Process(target=_follow, args=(port, followers + 1, n + 1, rows))
        for n in range(followers)
    ]
    for child in children:
        child.start()
    links.gather()
    device: Any = _IdleDevice(rows)
    group = Group(device, links, AllHosts(links, []), section, lambda: None)
    try:
        yield group
    finally:
        group.close()
        for child in children:
            child.join()


def _follow(port: int, processes: int, process: int, rows: int) -> None:
    """A follower without a device."""
    section = DistributedSection.model_validate({
        "coordinator": "127.0.0.1:1", "control_port": port, "num_processes": processes,
        "process_id": process, "token": "a token for one measurement",
    })  # fmt: skip
    uplink, device = Uplink(section, {}, _never), _IdleDevice(rows)
    uplink.join()
    geometry: Any = SimpleNamespace(pages=0, drop_page=0)
    shelf: Any = None
    deliveries = Deliveries(shelf, geometry, device.upload, 1, uplink.say)
    obedience = Obedience(device, deliveries, section.digest_every, uplink.say, _raise)
    while not isinstance(order := uplink.next(), messages.Stop):
        obedience.carry_out(order)
    uplink.close()
    obedience.close()


def _never(reason: str) -> None:
    raise AssertionError(f"the group has ended: {reason}")


def _raise(error: Exception) -> None:
    raise error
