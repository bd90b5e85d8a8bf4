"""LoRA from pages of the pool: every implementation against a float64 oracle.

The kernels in the Triton language run in Triton's interpreter, which must be chosen before they are
imported: one test here runs all others once more, in a process where that is so.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_cases import (
    AS_IN_THE_MODEL,
    LLAMA3_8B,
    QWEN3_8B_OF_FOUR_DEVICES,
    SMOLLM2_135M,
    Part,
    Pool,
    Ranks,
    Setup,
    add_deltas,
    check,
    compare,
    draw_inputs,
    everywhere,
    expected,
    pack_work,
    run,
)

from jslora.batch import Bucket
from jslora.model.config import MODULES
from pallas_kernels.lora.finish import Finish

DECODE, WIDE_DECODE, PREFILL = Bucket(8, 8, 8), Bucket(64, 64, 8), Bucket(64, 8, 8)
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ("triton",) if INTERPRETER else ("reference", "pallas")
REAL_MODELS = (SMOLLM2_135M, QWEN3_8B_OF_FOUR_DEVICES) + (() if INTERPRETER else (LLAMA3_8B,))
ATTENTION = {(0, "q_proj"): 9, (0, "v_proj"): 3, (0, "o_proj"): 20}


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


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 16, 17, 64, 255, 256])
def test_one_adapter_of_any_rank(implementation: str, rank: int) -> None:
    pool = Pool(F32)
    ranks = everywhere(rank) if rank < 64 else {(2, "k_proj"): rank, (2, "down_proj"): rank}
    check(implementation, DECODE, pool, [(*pool.place(ranks), 0, 8)], layers=(2,))


@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_no_adapter_changes_nothing(implementation: str, bucket: Bucket) -> None:
    pool = Pool(F32)
    unused = pool.place(everywhere(8))
    check(implementation, bucket, pool, [])
    check(implementation, bucket, pool, [(*unused, 3, 3)], layers=(0,))


def test_every_row_its_own_adapter(implementation: str) -> None:
    pool = Pool(F32)
    ranks = (1, 8, 16, 3, 64, 12, 33, 2)
    parts = [(*pool.place(everywhere(rank)), t, t + 1) for t, rank in enumerate(ranks)]
    check(implementation, DECODE, pool, parts, layers=(2,))


def test_many_adapters_at_once(implementation: str) -> None:
    pool = Pool(F32)
    parts = [
        (*pool.place({(0, "k_proj"): (4, 8, 1)[t % 3], (0, "o_proj"): 17}), t, t + 1)
        for t in range(12 if INTERPRETER else 64)
    ]
    check(implementation, WIDE_DECODE, pool, parts, layers=(0,))


def test_adapters_at_both_ends_of_the_pool(implementation: str) -> None:
    pool = Pool(F32)
    low, high = pool.place(everywhere(5), "bottom"), pool.place(everywhere(5), "top")
    assert low[0].pages[0] == 1 and high[0].pages[-1] == pool.setup.pages - 1
    check(implementation, DECODE, pool, [(*low, 0, 3), (*high, 4, 8)])


@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_pages_that_do_not_follow_each_other(implementation: str, bucket: Bucket) -> None:
    pool = Pool(F32)
    whole, split = pool.place(everywhere(9), "top"), pool.place(everywhere(12), "split")
    assert whole[0].is_run and not split[0].is_run
    check(implementation, bucket, pool, [(*split, 1, 4), (*whole, 4, 7)], layers=(2,))


def test_layers_and_modules_with_ranks_of_their_own(implementation: str) -> None:
    """Targets that one adapter has in a layer and another has not; one layer without any."""
    pool = Pool(F32)
    mixed = {(0, "q_proj"): 3, (0, "v_proj"): 17, (0, "down_proj"): 8, (2, "o_proj"): 40}
    other = {(0, "k_proj"): 5, (2, "q_proj"): 9, (2, "up_proj"): 1}
    parts = [(*pool.place(mixed), 0, 2), (*pool.place(other), 2, 5), (*pool.place(mixed), 5, 8)]
    check(implementation, DECODE, pool, parts, layers=(0, 1, 2))


def test_segments_that_cross_tiles(implementation: str) -> None:
    pool = Pool(F32)
    parts = [(*pool.place(everywhere(16)), 3, 50), (*pool.place(everywhere(40)), 50, 51),
             (*pool.place(everywhere(1)), 52, 64)]  # fmt: skip
    check(implementation, PREFILL, pool, parts, layers=(0,))


def test_a_segment_of_many_spans(implementation: str) -> None:
    pool = Pool(F32)
    part = (*pool.place({(0, "q_proj"): 5, (0, "down_proj"): 18}), 1, 63)
    check(implementation, WIDE_DECODE, pool, [part], layers=(0,))


def test_one_adapter_in_two_segments(implementation: str) -> None:
    pool = Pool(F32)
    twice = pool.place(everywhere(6))
    parts = [(*twice, 0, 5), (*pool.place(everywhere(4)), 5, 9), (*twice, 9, 40)]
    check(implementation, PREFILL, pool, parts, layers=(0,))


def test_the_largest_work_there_can_be_fits(implementation: str) -> None:
    """Each of the step's rows has an adapter of the highest rank, and they cross tiles."""
    pool = Pool(F32)
    big = [pool.place({(0, "k_proj"): 256}) for _ in range(8)]
    ends = [1, 2, 3, 31, 33, 34, 63, 64]
    parts = [(*one, start, end) for one, start, end in zip(big, [0, *ends], ends, strict=False)]
    check(implementation, PREFILL, pool, parts, layers=(0,), tolerance=1e-4)


@pytest.mark.parametrize("setup", REAL_MODELS)
def test_shapes_of_real_models(implementation: str, setup: Setup) -> None:
    pool = Pool(BF16, setup)
    parts = [(*pool.place(everywhere(8), "top"), 0, 1), (*pool.place(ATTENTION, "split"), 1, 3),
             (*pool.place({(0, "down_proj"): 17}, "split"), 4, 8)]  # fmt: skip
    check(implementation, DECODE, pool, parts, layers=(0,), tolerance=3e-2)


@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_bfloat16(implementation: str, bucket: Bucket) -> None:
    pool = Pool(BF16)
    parts = [(*pool.place(everywhere(16), "top"), 0, 4), (*pool.place(everywhere(3)), 5, 8)]
    check(implementation, bucket, pool, parts, layers=(2,), tolerance=3e-2)


@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-5), (BF16, 5e-2)])
def test_what_follows_the_sums(
    implementation: str, bucket: Bucket, dtype: np.dtype, tolerance: float
) -> None:
    """The residual addition and the gate, for tokens of the base too."""
    pool = Pool(dtype)
    parts = [(*pool.place(everywhere(9), "top"), 1, 4), (*pool.place(ATTENTION, "split"), 4, 5),
             (*pool.place({(0, "up_proj"): 3}), 6, 7)]  # fmt: skip
    xs, ys = draw_inputs(pool, bucket, parts)
    random = np.random.default_rng(2)
    streams = [
        random.normal(size=y.shape).astype(dtype) if finish is Finish.RESIDUAL else None
        for y, finish in zip(ys, AS_IN_THE_MODEL, strict=True)
    ]
    work, shape = pack_work(implementation, pool, parts, bucket)
    found = add_deltas(implementation, pool, xs, ys, 0, work, shape, AS_IN_THE_MODEL, streams)
    _, o, gate_up, down = expected(pool, parts, 0, xs, ys)
    gate, up = np.split(gate_up, 2, axis=1)
    wanted = [streams[1] + o, gate / (1 + np.exp(-gate)) * up, streams[3] + down]
    for after, right in zip(found[1:], wanted, strict=True):
        assert after.dtype == dtype
        np.testing.assert_allclose(
            after.astype(np.float64), right.astype(np.float64), atol=tolerance, rtol=tolerance
        )


def test_two_adapters_over_the_same_tokens(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("its list holds them as any other blocks")
    pool = Pool(F32)
    first, second = pool.place(everywhere(9)), pool.place(ATTENTION, "split")
    lonely = pool.place({(0, "gate_proj"): 2})
    parts = [(*first, 0, 5), (*second, 0, 5), (*second, 5, 8), (*lonely, 5, 8)]
    xs, ys = draw_inputs(pool, DECODE, parts)
    work, shape = pack_work(implementation, pool, parts, DECODE)
    work.pairs[:4, 2] = 2, 0, 2, 0
    found = add_deltas(implementation, pool, xs, ys, 0, work, shape)
    compare(parts, ys, expected(pool, parts, 0, xs, ys), found)


def test_a_row_is_the_same_whoever_shares_the_step(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("it adds the blocks of an item in one product")
    pool = Pool(F32)
    mine, others = (
        pool.place(everywhere(20)),
        [pool.place(everywhere(7), "split") for _ in range(2)],
    )
    _, _, alone = run(implementation, DECODE, pool, [(*mine, 2, 3)], layer=0)
    shared = [(*others[0], 0, 2), (*mine, 2, 3), (*others[1], 3, 8)]
    _, _, together = run(implementation, DECODE, pool, shared, layer=0)
    for one, both in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[2], both[2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["bottom", "split"])
@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_a_poisoned_adapter_reaches_no_row_but_its_own(
    implementation: str, bucket: Bucket, where: str, value: float
) -> None:
    pool = Pool(F32)
    clean, bad, last = (pool.place(everywhere(rank), where) for rank in (8, 16, 5))
    pool.poison(bad[0], value)
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    after = only_bad_rows(implementation, bucket, pool, parts)
    assert not np.isfinite(after).any(), "it is not hidden either"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_b_reaches_no_row_but_its_own(implementation: str, value: float) -> None:
    pool = Pool(F32)
    clean, bad, last = (pool.place(everywhere(rank)) for rank in (8, 16, 5))
    first = bad[0].b_offset[2, 0] + 3 * 96 + 7  # of q_proj: rank 3, column 7
    page, number = divmod(int(first), pool.setup.page)
    pool.rows[2 * pool.setup.pages + bad[0].pages[page], number] = value
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    after = only_bad_rows(implementation, DECODE, pool, parts)
    assert not np.isfinite(after[:, 7]).any()
    assert np.isfinite(after[:, 96:]).all(), "the other modules' columns"


def only_bad_rows(implementation: str, bucket: Bucket, pool: Pool, parts: list[Part]) -> np.ndarray:
    """What layer 2 makes of tokens 2 and 3, once all other tokens are seen to be right."""
    xs, ys, found = run(implementation, bucket, pool, parts, layer=2)
    wanted = expected(pool, [parts[0], parts[2]], 2, xs, ys)
    others = np.r_[0:2, 4 : bucket.tokens]
    for after, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(after[others], right[others], atol=2e-5, rtol=2e-5)
    return found[0][2:4]


@st.composite
def mixes(draw: Callable) -> tuple[Bucket, list[tuple[Ranks, str]], list[tuple[int, int, int]]]:
    """A bucket, adapters with a place each, and segments (adapter, start, end)."""
    bucket = draw(st.sampled_from([DECODE, PREFILL]))
    ranks = st.dictionaries(
        st.tuples(st.sampled_from([0, 2]), st.sampled_from(MODULES)), st.integers(1, 40), min_size=1
    )
    place = st.sampled_from(["bottom", "top", "split"])
    adapters = draw(st.lists(st.tuples(ranks, place), min_size=1, max_size=4))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=2, max_size=9)))
    chosen = draw(
        st.lists(
            st.none() | st.integers(0, len(adapters) - 1),
            min_size=len(cuts) - 1,
            max_size=len(cuts) - 1,
        )
    )
    spans = zip(chosen, cuts, cuts[1:], strict=False)
    return bucket, adapters, [(n, start, end) for n, start, end in spans if n is not None]


@settings(
    max_examples=5 if INTERPRETER else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mix=mixes())
def test_any_mix(implementation: str, mix: tuple) -> None:
    bucket, adapters, spans = mix
    pool = Pool(F32)
    placed = [pool.place(ranks, where) for ranks, where in adapters]
    check(implementation, bucket, pool, [(*placed[n], start, end) for n, start, end in spans])
