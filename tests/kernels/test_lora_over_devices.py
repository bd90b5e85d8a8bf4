"""LoRA over four devices, in both ways of holding adapters, against a float64 oracle.

Virtual devices, and Triton's interpreter, must be asked for before anything is imported: one test
here runs all others once more, in a process where they are there. Kernels in the Triton language
run device by device, and what they make meets in numpy.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from lora_cases import (
    Part,
    Pool,
    Ranks,
    Setup,
    everywhere,
    expand_in_triton,
    expected,
    kernels,
    pack_work,
    setup,
    shrink_in_triton,
    with_adapter,
)

from jslora.batch import Bucket
from jslora.lora import apply_lora
from jslora.model.config import GROUPS, MODULES
from jslora.sharding import AXIS
from jslora.split import BY_INPUT, Split
from pallas_kernels.lora.api import Shape, Work
from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.segments import SegmentShape, SegmentWork

DEVICES = 4
FLAG = f"--xla_force_host_platform_device_count={DEVICES}"
HERE = FLAG in os.environ.get("XLA_FLAGS", "")
TRITON = importlib.util.find_spec("triton") is not None
needs_devices = pytest.mark.skipif(not HERE, reason="runs in a process with four devices")

F32 = np.dtype(np.float32)
DECODE, PREFILL = Bucket(8, 8, 8), Bucket(64, 8, 8)
SPLITS = (Split(DEVICES), Split(DEVICES, fully=True))
SUMS = (Finish.SUM,) * 4
ALL = pytest.mark.parametrize("implementation", ["reference", "pallas", *["triton"] * TRITON])
"""Triton's interpreter takes too long for a property test."""


@pytest.mark.skipif(HERE, reason="this is that process")
@pytest.mark.timeout(900)
def test_over_four_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "XLA_FLAGS": FLAG, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(params=["reference", "pallas"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SPLITS, ids=["no collective", "fully sharded"])
def split(request: pytest.FixtureRequest) -> Split:
    return request.param


def tiny(split: Split) -> Setup:
    """Rows of a device: 16 to 64 numbers in pages of 256."""
    return setup(2, 64, 4, 4, 16, 192, pages=512, page_size=8, split=split)


def by_input(group: int) -> bool:
    return GROUPS[group][0] in BY_INPUT


def arranged(setup: Setup, group: int) -> np.ndarray:
    """The fused columns of a group in the order of the devices that have them."""
    widths = [setup.config.widths(module)[1] for module in GROUPS[group]]
    starts = np.cumsum([0, *widths[:-1]])
    parts = [np.split(s + np.arange(w), DEVICES) for s, w in zip(starts, widths, strict=True)]
    return np.concatenate([part[d] for d in range(DEVICES) for part in parts])


@cache
def compiled(
    implementation: str, setup: Setup, shape: Shape, finishes: tuple[Finish, ...]
) -> Callable:
    """All deltas of one layer, as a function of whole inputs and of each device's base outputs."""
    mesh, split = Mesh(np.array(jax.devices()), (AXIS,)), setup.split
    rows, columns, each = (
        PartitionSpec(), PartitionSpec(None, AXIS), PartitionSpec(AXIS),
    )  # fmt: skip
    inputs = [columns if by_input(group) else rows for group in range(4)]
    outputs = [rows if by_input(group) else columns for group in range(4)]

    def deltas(
        xs: list[jax.Array], ys: list[jax.Array], pool: jax.Array, layer: jax.Array, work: Work
    ) -> list[jax.Array]:
        pages, found = pool.reshape(-1, *setup.page_shape), []
        for group, (x, y, finish) in enumerate(zip(xs, ys, finishes, strict=True)):
            y = apply_lora(
                y[0], x, group=group, config=split.local(setup.config), shape=shape,
                kernels=kernels(implementation), pages=pages, first_page=layer * setup.pages,
                layer=layer, work=work, finish=finish, split=split,
            )  # fmt: skip
            found.append(lax.psum(y, AXIS) if by_input(group) else y)
        return found

    return jax.jit(jax.shard_map(
        deltas, mesh=mesh, in_specs=(inputs, [each] * 4, each, rows, rows), out_specs=outputs,
        check_vma=False,
    ))  # fmt: skip


def in_triton(
    pool: Pool, xs: list[np.ndarray], ys: list[np.ndarray], layer: int, work: SegmentWork,
    shape: SegmentShape, finishes: Sequence[Finish],
) -> list[np.ndarray]:  # fmt: skip
    """The same by kernels in the Triton language, and in numpy what `Meeting` does."""
    split, found = pool.setup.split, []
    for group, (x, y, finish) in enumerate(zip(xs, ys, finishes, strict=True)):
        mine = np.split(x, DEVICES, axis=1) if by_input(group) else [x] * DEVICES
        peers = DEVICES if split.fully and not by_input(group) else 1
        cut = shape._replace(peers=peers)
        lows = [
            shrink_in_triton(pool, np.ascontiguousarray(part), device, group, layer, work, cut)
            for device, part in enumerate(mine)
        ]
        if split.fully:
            lows = [low.reshape(cut.splits, -1).sum(axis=0) for low in lows]
            cut = cut._replace(splits=1)
            met = np.sum(lows, axis=0) if by_input(group) else np.concatenate(lows)
            lows = [met] * DEVICES
        outs, width = [], y.shape[2] // DEVICES
        for device, low in enumerate(lows):
            first = device * width if split.fully and by_input(group) else None
            own = np.ascontiguousarray(y[device])
            outs.append(expand_in_triton(
                pool, own, low, device, group, layer, work, cut, finish, None, first
            ))  # fmt: skip
        found.append(np.sum(outs, axis=0) if by_input(group) else np.concatenate(outs, axis=1))
    return found


def run(
    implementation: str, bucket: Bucket, pool: Pool, parts: Sequence[Part], layer: int,
    finishes: tuple[Finish, ...] = SUMS,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:  # fmt: skip
    """(inputs, whole outputs before, whole outputs after) of every group of a layer."""
    xs, ys, befores = draw_inputs(pool, bucket, parts)
    work, shape = pack_work(implementation, pool, parts, bucket)
    if implementation == "triton":
        assert isinstance(work, SegmentWork) and isinstance(shape, SegmentShape)
        found = in_triton(pool, xs, ys, layer, work, shape, finishes)
    else:
        over = compiled(implementation, pool.setup, shape, finishes)
        found = [np.asarray(y) for y in over(xs, ys, pool.parts, np.int32(layer), work)]
    for group in range(4):
        if finishes[group] is Finish.SUM and not by_input(group):
            found[group] = found[group][:, np.argsort(arranged(pool.setup, group))]
    return xs, befores, found


def draw_inputs(
    pool: Pool, bucket: Bucket, parts: Sequence[Part]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Whole inputs, each device's base outputs, and whole base outputs, of every group."""
    random, config = np.random.default_rng(1), pool.setup.config
    xs, ys, befores = [], [], []
    for group, modules in enumerate(GROUPS):
        x = random.normal(size=(bucket.tokens, config.widths(modules[0])[0])).astype(pool.dtype)
        x[~with_adapter(parts, bucket.tokens)] = np.nan
        out = sum(config.widths(module)[1] for module in modules)
        if by_input(group):
            y = random.normal(size=(DEVICES, bucket.tokens, out)).astype(np.float32)
            befores.append(y.sum(axis=0))
        else:
            befores.append(random.normal(size=(bucket.tokens, out)).astype(np.float32))
            y = np.stack(np.split(befores[-1][:, arranged(pool.setup, group)], DEVICES, axis=1))
        xs.append(x)
        ys.append(y)
    return xs, ys, befores


def check(
    implementation: str, bucket: Bucket, pool: Pool, parts: Sequence[Part], tolerance: float = 4e-5
) -> None:
    for layer in range(2):
        xs, befores, found = run(implementation, bucket, pool, parts, layer)
        wanted = expected(pool, parts, layer, xs, befores)
        mine = with_adapter(parts, bucket.tokens)
        for group, (before, right, after) in enumerate(zip(befores, wanted, found, strict=True)):
            np.testing.assert_allclose(after, right, atol=tolerance, rtol=tolerance)
            if not by_input(group):
                np.testing.assert_array_equal(after[~mine], before[~mine])


@st.composite
def mixes(draw: Callable) -> tuple[Bucket, list[tuple[Ranks, str]], list[tuple[int, int, int]]]:
    """A bucket, adapters with a place each, and segments (adapter, start, end).

    Ranks are below, at and above what four devices share alike, and span several blocks.
    """
    bucket = draw(st.sampled_from([DECODE, PREFILL]))
    targets = st.tuples(st.sampled_from([0, 1]), st.sampled_from(MODULES))
    ranks = st.dictionaries(targets, st.sampled_from([1, 2, 3, 4, 5, 8, 13, 33, 70]), min_size=1)
    where = st.sampled_from(["bottom", "top", "split"])
    adapters = draw(st.lists(st.tuples(ranks, where), min_size=1, max_size=3))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=2, max_size=7)))
    number = st.none() | st.integers(0, len(adapters) - 1)
    spans = [(draw(number), start, end) for start, end in pairwise(cuts)]
    return bucket, adapters, [(n, start, end) for n, start, end in spans if n is not None]


@needs_devices
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mix=mixes())
def test_any_mix(implementation: str, split: Split, mix: tuple) -> None:
    bucket, adapters, spans = mix
    pool = Pool(F32, tiny(split))
    placed = [pool.place(ranks, where) for ranks, where in adapters]
    check(implementation, bucket, pool, [(*placed[n], start, end) for n, start, end in spans])


@ALL
@needs_devices
def test_every_row_its_own_rank(implementation: str, split: Split) -> None:
    pool = Pool(F32, tiny(split))
    ranks = (1, 18) if implementation == "triton" else (1, 2, 3, 4, 5, 16, 7)
    parts = [(*pool.place(everywhere(rank)), t, t + 1) for t, rank in enumerate(ranks)]
    check(implementation, DECODE, pool, parts)


@ALL
@needs_devices
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_integers_beside_full_numbers(implementation: str, split: Split, storage: str) -> None:
    """Rows of a device: 128 to 512 numbers; each its own groups and scales."""
    rows = 512 if split.fully else 128  # those of B of o and down are cut as well
    storages = ("full", storage)
    of = setup(2, rows, 4, 4, 128, 512, pages=256, page_size=8, split=split, storages=storages)
    pool = Pool(np.dtype(ml_dtypes.bfloat16), of)
    few = {(0, "q_proj"): 5, (0, "o_proj"): 3, (1, "v_proj"): 1}
    parts = [(*pool.place(few, "split", storage), 0, 3),
             (*pool.place({(0, "up_proj"): 2, (1, "down_proj"): 18}, "top", storage), 3, 5),
             (*pool.place(everywhere(2)), 6, 8)]  # fmt: skip
    check(implementation, DECODE, pool, parts, tolerance=3e-2)


@ALL
@needs_devices
def test_what_follows_the_sums(implementation: str, split: Split) -> None:
    pool = Pool(F32, tiny(split))
    parts = [(*pool.place(everywhere(9), "split"), 1, 4), (*pool.place(everywhere(3)), 6, 7)]
    finishes = (Finish.SUM, Finish.SUM, Finish.GATED, Finish.SUM)
    xs, befores, found = run(implementation, DECODE, pool, parts, 0, finishes)
    gate, up = np.split(expected(pool, parts, 0, xs, befores)[2], 2, axis=1)
    np.testing.assert_allclose(found[2], gate / (1 + np.exp(-gate)) * up, atol=4e-5, rtol=4e-5)


@ALL
@needs_devices
@pytest.mark.parametrize(("bucket", "value"), [(DECODE, np.nan), (PREFILL, np.inf)])
def test_a_poisoned_part_reaches_no_row_but_its_own(
    implementation: str, split: Split, bucket: Bucket, value: float
) -> None:
    """One device's part of an adapter is bad; what it sends to others stays in its own rows."""
    pool = Pool(F32, tiny(split))
    clean, bad, last = (pool.place(everywhere(rank)) for rank in (8, 16, 5))
    pool.poison(bad[0], value, device=2)
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    xs, befores, found = run(implementation, bucket, pool, parts, 1)
    wanted = expected(pool, [parts[0], parts[2]], 1, xs, befores)
    others = np.r_[0:2, 4 : bucket.tokens]
    for group, (after, right) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(after[others], right[others], atol=4e-5, rtol=4e-5)
        everywhere_bad = split.fully or by_input(group)
        columns = np.isfinite(after[2:4]).any(axis=0)
        assert not columns.any() if everywhere_bad else (columns.mean() == 3 / 4)


@needs_devices
@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_devices_meet_no_more_than_they_must(
    implementation: str, split: Split, bucket: Bucket
) -> None:
    """Two sums of the base; fully sharded, a gathering or a small sum a group beside them."""
    pool = Pool(F32, tiny(split))
    parts = [(*pool.place(everywhere(3)), 0, 8)]
    xs, ys, _ = draw_inputs(pool, bucket, parts)
    work, shape = pack_work(implementation, pool, parts, bucket)
    over = compiled(implementation, pool.setup, shape, SUMS)
    text = over.lower(xs, ys, pool.parts, np.int32(0), work).as_text()
    found = Counter(re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text))
    assert found == ({"all_reduce": 4, "all_gather": 2} if split.fully else {"all_reduce": 2})
