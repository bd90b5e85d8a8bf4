"""Steps, pools and a float64 oracle for tests of paged attention, and how each implementation runs.

The pool holds NaN at every position that no row may see, in the null page too, and so do the
queries of padding tokens; items beyond the last one name rows and tokens that do not exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jslora.batch import Bucket, Geometry, RowPlan, StepRows, int_fields, pack_step, views
from pallas_kernels.launch import Kernels
from pallas_kernels.paged_attention import reference, triton
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Rows
from pallas_kernels.paged_attention.tiles import (
    INTERPRETED_PROGRAMS,
    make_tile,
    outputs,
    power_of_two,
)

POSITIONS = 384
"""The longest context: six blocks of the kernels, six chunks of the reference."""
PAGES = 512
CUT = Cut(query_tile=16, parts=3, span=48)
ONE_PART = Cut(query_tile=16, parts=1, span=48)
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads, and numbers of a head."""

    query: int
    kv: int
    dim: int


GROUPED, EACH, ONE = Heads(6, 2, 16), Heads(3, 3, 16), Heads(4, 1, 64)
SMOLLM, WIDE = Heads(9, 3, 64), Heads(7, 1, 128)
Row = tuple[int, int]
"""Tokens of a row in this step, and its context: all tokens that its last query sees."""


@dataclass(frozen=True)
class Setup:
    """An implementation, and what it is compiled for."""

    implementation: str
    heads: Heads = GROUPED
    dtype: np.dtype = F32
    page_size: int = 8
    cut: Cut = CUT

    @property
    def geometry(self) -> Geometry:
        cut = self.cut
        if self.implementation == "reference":
            cut = Cut(reference.QUERY_TILE, parts=0, span=0)
        return Geometry(
            layers=2, pages=PAGES, page_size=self.page_size, page_numbers=0, slots=16,
            drop_page=2 * PAGES, attention=cut, rank_block=8, max_rank=8, row_lengths=(),
        )  # fmt: skip

    def bucket(self, tokens: int, rows: int) -> Bucket:
        chunk = reference.CHUNK_PAGES
        return Bucket(tokens, rows, -(-POSITIONS // (self.page_size * chunk)) * chunk)

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == F32 else 2e-2


def make_rows(plans: list[RowPlan], bucket: Bucket, geometry: Geometry) -> Rows:
    """As the step takes them from the packed batch."""
    at = views(pack_step(StepRows.of(plans), bucket, geometry), int_fields(bucket, geometry))
    at["items"][at["item_count"][0] :] = 1 << 30
    return Rows(
        at["block_table"], at["context"], at["start"], at["length"], at["parts"], at["items"],
        at["item_count"],
    )  # fmt: skip


def attend(
    setup: Setup, bucket: Bucket, q: np.ndarray, pool: np.ndarray, first_page: int, rows: Rows
) -> np.ndarray:
    """The output of one call."""
    if setup.implementation == "triton":
        return interpret_triton(setup, bucket, q, pool, first_page, rows)
    run = compiled(setup.implementation, bucket.prefill, setup.geometry.attention, setup.heads)
    return np.asarray(run(q, jnp.asarray(pool), jnp.int32(first_page), rows))


@cache
def compiled(implementation: str, prefill: bool, cut: Cut, heads: Heads) -> Callable:
    kernels = Kernels("reference", implementation, "cpu")
    return jax.jit(
        partial(paged_attention, scale=heads.dim**-0.5, prefill=prefill, cut=cut, kernels=kernels)
    )


def interpret_triton(
    setup: Setup, bucket: Bucket, q: np.ndarray, pool: np.ndarray, first_page: int, rows: Rows
) -> np.ndarray:
    """The same by the kernels in the Triton language, in Triton's interpreter."""
    from triton_numpy import launch

    from pallas_kernels.paged_attention import triton_kernels

    cut, programs = setup.cut, INTERPRETED_PROGRAMS
    tile = make_tile(q, pool, cut, prefill=bucket.prefill)
    out, sums, stats = (np.full(x.shape, np.nan, x.dtype) for x in outputs(q, rows, cut))
    common = triton.common_constants(q, rows, cut)
    with np.errstate(invalid="ignore"):  # a tile without tokens divides zero by zero
        launch(
            triton_kernels.attend, (programs,),
            np.array([first_page], np.int32), rows.block_table, rows.parts, rows.items, rows.total,
            q, pool, out, sums, stats,
            **triton.attend_constants(pool, rows, tile, cut, setup.heads.dim**-0.5, programs),
            **common,
        )  # fmt: skip
        if cut.parts > 1:
            launch(
                triton_kernels.merge, sums.shape[::2], rows.parts, rows.start, sums, stats, out,
                PADDED_PARTS=power_of_two(cut.parts), **common,
            )  # fmt: skip
    return out


def check(
    setup: Setup, bucket: Bucket, rows: Sequence[Row], layer: int = 1, spoilt: int | None = None
) -> None:
    """Attend rows with scattered pages and compare every token.

    A key of the `spoilt` row is NaN, and so must be what its queries get.
    """
    heads, random = setup.heads, np.random.default_rng(len(rows))
    pool = np.full((2 * PAGES + 1, setup.page_size, 2, heads.kv, heads.dim), np.nan, setup.dtype)
    free = random.permutation(np.arange(1, PAGES)).tolist()
    q = np.full((bucket.tokens, heads.query, heads.dim), np.nan, setup.dtype)
    wanted, compared = np.zeros(q.shape), np.zeros(len(q), bool)
    plans, t = [], 0
    for slot, (length, context) in enumerate(rows):
        pages = [free.pop() for _ in range(-(-context // setup.page_size))]
        kv = random.normal(size=(context, 2, heads.kv, heads.dim)).astype(setup.dtype)
        if slot == spoilt:
            kv[0, 0] = np.nan
        position = np.arange(context)
        page = layer * PAGES + np.array(pages)[position // setup.page_size]
        pool[page, position % setup.page_size] = kv
        q[t : t + length] = random.normal(size=(length, *q.shape[1:])).astype(setup.dtype)
        wanted[t : t + length] = oracle(q[t : t + length], kv)
        compared[t : t + length] = slot != spoilt
        plans.append(RowPlan([1] * length, False, context - length, pages, slot, True))
        t += length
    packed = make_rows(plans, bucket, setup.geometry)
    found = attend(setup, bucket, q, pool, layer * PAGES, packed)
    assert found.dtype == setup.dtype
    found, tolerance = found.astype(np.float64), setup.tolerance
    np.testing.assert_allclose(found[compared], wanted[compared], atol=tolerance, rtol=tolerance)
    if spoilt is not None:
        start = sum(plan.length for plan in plans[:spoilt])
        assert np.isnan(found[start : start + plans[spoilt].length]).all(), (
            "it is not hidden either"
        )


def oracle(q: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Causal attention of the last tokens of a sequence, straight off the definition."""
    q, kv = q.astype(np.float64), kv.astype(np.float64)
    kv = np.repeat(kv, q.shape[1] // kv.shape[2], axis=2)
    result = np.zeros(q.shape)
    for i in range(len(q)):
        visible = len(kv) - len(q) + i + 1
        keys, values = kv[:visible, 0], kv[:visible, 1]
        scores = np.einsum("hd,shd->hs", q[i], keys) / q.shape[2] ** 0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        result[i] = np.einsum("hs,shd->hd", weights, values)
    return result
