"""LoRA whose weights are integers in words of the pool: every implementation against the oracle.

What the oracle multiplies is what the stored integers and scales stand for. As in `test_lora`, one
test runs all others once more, in a process where Triton interprets its kernels.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_cases import (
    LLAMA3_8B,
    SMOLLM2_135M,
    Pool,
    Ranks,
    Setup,
    add_deltas,
    check,
    draw_inputs,
    expected,
    pack_work,
    run,
    setup,
)

from jslora.adapters.peft import Adapter, Factors
from jslora.batch import Bucket
from jslora.model.config import MODULES
from jslora.step import write_pages

ALL = ("full", "int8", "int4")
DECODE, PREFILL = Bucket(8, 8, 8), Bucket(64, 8, 8)
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ("triton",) if INTERPRETER else ("reference", "pallas")
SMALL = replace(setup(2, 128, 4, 2, 64, 384, pages=512, page_size=8, storages=ALL), composed=3)
"""Rows of 128, 256 and 384 numbers in pages of 2,048: 16 to 48 words of float32 with 4 bits."""


def ranked(rank: int) -> Ranks:
    """All modules; of a layer, and a few of them, for the interpreter, which takes its time."""
    few = ("k_proj", "v_proj", "o_proj", "down_proj")
    return {(1, module): rank for module in (few if INTERPRETER else MODULES)}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETER, reason="this is that process")
def test_the_kernels_in_the_triton_language() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_rows_with_and_without_an_adapter(
    implementation: str, bucket: Bucket, storage: str
) -> None:
    pool = Pool(F32, SMALL)
    parts = [(*pool.place(ranked(9), "top", storage), 0, 2),
             (*pool.place({(1, "q_proj"): 1, (1, "down_proj"): 18}, "split", storage), 3, 5),
             (*pool.place(ranked(16), "bottom", storage), 5, 7)]  # fmt: skip
    check(implementation, bucket, pool, parts, layers=(1,))


@pytest.mark.parametrize(
    ("bucket", "dtype", "tolerance"), [(DECODE, BF16, 3e-2), (PREFILL, F32, 2e-5)]
)
def test_every_storage_in_one_batch(
    implementation: str, bucket: Bucket, dtype: np.dtype, tolerance: float
) -> None:
    pool = Pool(dtype, SMALL)
    places = ("bottom", "split", "top")
    placed = [
        pool.place(ranked(rank), where, storage)
        for rank, where, storage in zip((8, 3, 17), places, ALL, strict=True)
    ]
    bounds = (0, 2, 3, 5, 6, 8)
    parts = [(*placed[n], bounds[i], bounds[i + 1]) for i, n in enumerate((2, 0, 1, 2, 1))]
    check(implementation, bucket, pool, parts, layers=(0, 1), tolerance=tolerance)


def test_a_batch_of_one_storage_alone(implementation: str) -> None:
    pool = Pool(F32, replace(SMALL, storages=("int4",)))
    parts = [(*pool.place(ranked(9), "split", "int4"), 0, 3),
             (*pool.place({(1, "down_proj"): 4}, "top", "int4"), 3, 8)]  # fmt: skip
    check(implementation, DECODE, pool, parts, layers=(1,))


@pytest.mark.parametrize("model", [SMOLLM2_135M, *[LLAMA3_8B] * (not INTERPRETER)])
def test_shapes_of_real_models(implementation: str, model: Setup) -> None:
    """Groups of 56 and 72 columns, which column blocks do not divide."""
    pool = Pool(BF16, replace(model, storages=ALL))
    down = {(0, "down_proj"): 17}
    parts = [(*pool.place({(0, "q_proj"): 3, (0, "up_proj"): 2}, "top", "int4"), 0, 1),
             (*pool.place(down, "split", "int4"), 1, 4),
             (*pool.place(down, "split", "int8"), 5, 6),
             (*pool.place({(0, "v_proj"): 5, (0, "o_proj"): 2}, storage="int8"), 6, 8)]  # fmt: skip
    check(implementation, DECODE, pool, parts, layers=(0,), tolerance=3e-2)


def test_adapters_over_the_same_tokens(implementation: str) -> None:
    """Of all storages, a chain of three and one of two."""
    pool = Pool(F32, SMALL)
    placed = [
        pool.place({(1, "k_proj"): 4 + 7 * n, (1, "down_proj"): 3}, storage=name)
        for n, name in enumerate(ALL)
    ]
    parts = [*((*each, 0, 5) for each in placed), *((*each, 6, 8) for each in placed[:2])]
    check(implementation, DECODE, pool, parts, layers=(1,))


@pytest.mark.parametrize(("where", "storage"), [("bottom", "int8"), ("split", "int4")])
def test_a_poisoned_adapter_reaches_no_row_but_its_own(
    implementation: str, where: str, storage: str
) -> None:
    pool = Pool(F32, SMALL)
    clean, bad, last = (
        pool.place({(1, module): rank for module in MODULES}, where, storage) for rank in (8, 16, 5)
    )
    pool.poison(bad[0], np.nan)
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    xs, ys, found = run(implementation, DECODE, pool, parts, layer=1)
    wanted = expected(pool, [parts[0], parts[2]], 1, xs, ys)
    others = np.r_[0:2, 4:8]
    for after, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(after[others], right[others], atol=2e-5, rtol=2e-5)
        assert not np.isfinite(after[2:4]).any(), "it is not hidden either"


# Bits ----------------------------------------------------------------------------------------


def any_words(dtype: np.dtype, count: int) -> np.ndarray:
    """All there are of 16 bits, or some of 32; NaN of every kind are among them."""
    if dtype == BF16:
        return np.resize(np.arange(2**16, dtype=np.uint16), count).view(BF16)
    words = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    words[::4] |= 0x7F800000
    return words.view(F32)


def integers_in(words: np.ndarray, bits: int) -> np.ndarray:
    """Of words [r, n / k] the integers [r, n]."""
    whole = words.view(f"u{words.itemsize}").astype(np.int64)
    lanes = [(whole >> at) % 2**bits for at in range(0, 8 * words.itemsize, bits)]
    found = np.concatenate(lanes, axis=1)
    return np.where(found < 2 ** (bits - 1), found, found - 2**bits)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("storage", "bits", "most"), [("int8", 8, 127), ("int4", 4, 7)])
def test_any_bits_may_be_in_a_word(
    implementation: str, storage: str, bits: int, most: int, dtype: np.dtype
) -> None:
    """Inputs pick one row of B for each token."""
    rank, target, out = 64, (0, "q_proj"), 4096 if dtype == BF16 else 1024
    words = any_words(dtype, rank * out * bits // (8 * dtype.itemsize)).reshape(rank, -1)
    one_layer = setup(1, 128, out // 64, 2, 64, 384, pages=256, storages=ALL)
    pool = Pool(dtype, one_layer)
    a, b = most * np.eye(rank, 128, dtype=dtype), np.full((out, rank), most, dtype)
    factors = {target: Factors(a, b, np.float32(1))}
    adapter = Adapter(factors=factors, digest="", base_model=None, bytes=0, warnings=())
    placement, _ = pool.lay(adapter, "top", storage)
    pages = pool.rows[list(placement.pages)].reshape(-1)
    first = placement.b_offset[0, MODULES.index("q_proj")]
    pages[first : first + words.size] = words.ravel()
    pool.rows[list(placement.pages)] = pages.reshape(len(placement.pages), -1)
    part = (placement, adapter, 0, 64)
    xs, ys = draw_inputs(pool, PREFILL, [part])
    xs[0], ys[0] = np.eye(64, 128, dtype=dtype), np.zeros_like(ys[0])
    work, shape = pack_work(implementation, pool, [part], PREFILL)
    found = add_deltas(implementation, pool, xs, ys, 0, work, shape)
    np.testing.assert_array_equal(found[0][:, :out], most * integers_in(words, bits))


@pytest.mark.skipif(INTERPRETER, reason="no kernel of ours")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_any_bits_are_written_into_the_pool(dtype: np.dtype) -> None:
    words = any_words(dtype, 2**16).reshape(16, -1)
    pages = jnp.zeros((20, 8, 2, 1, words.shape[1] // 16), dtype)
    write = jax.jit(write_pages, donate_argnums=0)
    after = write(pages, jnp.arange(2, 18), jnp.asarray(words))
    kind = f"u{words.itemsize}"
    np.testing.assert_array_equal(
        np.asarray(after).reshape(20, -1)[2:18].view(kind), words.view(kind)
    )


# Any mix -------------------------------------------------------------------------------------


@st.composite
def mixes(draw: Callable) -> tuple[Bucket, list[tuple], list[tuple[int, int, int]]]:
    """A bucket, adapters (ranks, place, storage), and segments (adapter, start, end)."""
    bucket = draw(st.sampled_from([DECODE, PREFILL]))
    targets = st.tuples(st.sampled_from([0, 1]), st.sampled_from(MODULES))
    ranks = st.dictionaries(targets, st.integers(1, 40), min_size=1)
    place = st.sampled_from(["bottom", "top", "split"])
    kinds = st.tuples(ranks, place, st.sampled_from(ALL))
    adapters = draw(st.lists(kinds, min_size=1, max_size=4))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=2, max_size=9)))
    number = st.none() | st.integers(0, len(adapters) - 1)
    spans = [(draw(number), start, end) for start, end in pairwise(cuts)]
    return bucket, adapters, [(n, start, end) for n, start, end in spans if n is not None]


@settings(
    max_examples=2 if INTERPRETER else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mix=mixes())
def test_any_mix(implementation: str, mix: tuple) -> None:
    bucket, adapters, spans = mix
    pool = Pool(F32, SMALL)
    placed = [pool.place(*each) for each in adapters]
    check(
        implementation, bucket, pool, [(*placed[n], start, end) for n, start, end in spans],
        layers=(0, 1),
    )  # fmt: skip
