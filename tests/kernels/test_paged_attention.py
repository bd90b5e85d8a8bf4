"""Attention over pages against a float64 oracle.

The pool holds NaN at every position that no row may see, in the null page too, and so do the
queries of padding tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import Bucket, Geometry, RowPlan, int_fields, pack_step, views
from pallas_kernels.paged_attention import CHUNK_PAGES, QUERY_TILE, Rows, paged_attention

PAGE_SIZE = 8
PAGES = 256
SPAN = CHUNK_PAGES * PAGE_SIZE
TABLE = 3 * CHUNK_PAGES
"""Pages of the longest context: three chunks."""
DIM = 16
GEOMETRY = Geometry(
    layers=2, pages=PAGES, page_size=PAGE_SIZE, page_numbers=0, slots=16, drop_page=2 * PAGES,
    query_tile=QUERY_TILE, rank_block=8, max_rank=8, row_lengths=(),
)  # fmt: skip
DECODE, MIXED, SHORT = Bucket(8, 8, TABLE), Bucket(80, 8, TABLE), Bucket(16, 8, TABLE)
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Heads:
    """Query heads and kv heads."""

    query: int
    kv: int


GROUPED, EACH, ONE = Heads(6, 2), Heads(3, 3), Heads(4, 1)
Row = tuple[int, int]
"""Tokens of a row in this step, and its context: all tokens its last query sees."""


@cache
def compiled(prefill: bool) -> Callable:
    return jax.jit(partial(paged_attention, scale=DIM**-0.5, prefill=prefill))


def make_rows(plans: list[RowPlan], bucket: Bucket) -> Rows:
    """As the step takes them from the packed batch."""
    at = views(pack_step(plans, bucket, GEOMETRY), int_fields(bucket, GEOMETRY))
    return Rows(
        at["block_table"], at["context"], at["start"], at["length"],
        at["tile_row"], at["tile_start"], at["tile_length"], at["tiles"][0],
    )  # fmt: skip


def check(
    bucket: Bucket, rows: Sequence[Row], heads: Heads = GROUPED, dtype: np.dtype = F32,
    tolerance: float = 1e-5, layer: int = 1,
) -> None:  # fmt: skip
    """Attend rows with scattered pages and compare every token."""
    random = np.random.default_rng(len(rows))
    pool = np.full((2 * PAGES + 1, PAGE_SIZE, 2, heads.kv, DIM), np.nan, dtype)
    free = random.permutation(np.arange(1, PAGES)).tolist()
    q = np.full((bucket.tokens, heads.query, DIM), np.nan, dtype)
    wanted = np.zeros(q.shape)
    plans, t = [], 0
    for slot, (length, context) in enumerate(rows):
        pages = [free.pop() for _ in range(-(-context // PAGE_SIZE))]
        kv = random.normal(size=(context, 2, heads.kv, DIM)).astype(dtype)
        for position in range(context):
            page, offset = divmod(position, PAGE_SIZE)
            pool[layer * PAGES + pages[page], offset] = kv[position]
        q[t : t + length] = random.normal(size=(length, heads.query, DIM)).astype(dtype)
        wanted[t : t + length] = oracle(q[t : t + length], kv)
        plans.append(RowPlan([1] * length, False, context - length, pages, slot, True))
        t += length
    found = compiled(bucket.prefill)(
        q, jnp.asarray(pool), jnp.int32(layer * PAGES), make_rows(plans, bucket)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found), wanted, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.asarray(found)[t:], 0)


def oracle(q: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Causal attention of the last tokens of a sequence, straight off the definition."""
    q, kv = q.astype(np.float64), kv.astype(np.float64)
    group = q.shape[1] // kv.shape[2]
    result = np.zeros(q.shape)
    for i in range(len(q)):
        visible = len(kv) - len(q) + i + 1
        for head in range(q.shape[1]):
            keys, values = kv[:visible, 0, head // group], kv[:visible, 1, head // group]
            scores = keys @ q[i, head] / DIM**0.5
            weights = np.exp(scores - scores.max())
            result[i, head] = weights @ values / weights.sum()
    return result


EDGES = [1, 2, PAGE_SIZE, PAGE_SIZE + 1, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN]


@pytest.mark.parametrize("heads", [GROUPED, EACH, ONE], ids=str)
def test_decode_rows_of_every_kind_of_length(heads: Heads) -> None:
    check(DECODE, [(1, context) for context in EDGES], heads)


def test_few_decode_rows() -> None:
    check(DECODE, [(1, 5)])
    check(DECODE, [(1, 2 * SPAN + 3), (1, 1)])


def test_no_row() -> None:
    check(DECODE, [])
    check(MIXED, [])


@pytest.mark.parametrize("heads", [GROUPED, EACH, ONE], ids=str)
def test_prefill_and_decode_side_by_side(heads: Heads) -> None:
    check(MIXED, [(1, 70), (40, 40), (1, 1), (2, 130), (33, 3 * SPAN), (1, SPAN)], heads)


@pytest.mark.parametrize("length", [2, QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 65, 80])
def test_prefill_tiles_of_every_shape(length: int) -> None:
    check(MIXED, [(length, length)])
    check(MIXED, [(length, 3 * SPAN)])


@pytest.mark.parametrize("length", [2, 5, 31])
def test_the_last_tile_lies_at_the_end_of_the_step(length: int) -> None:
    """A whole tile from its start on would run past the last token."""
    check(MIXED, [(80 - length, 90), (length, 100)])


def test_a_step_shorter_than_a_tile() -> None:
    check(SHORT, [(5, 9), (1, 3), (9, 80)])
    check(SHORT, [(16, 16)])


def test_the_layer_says_which_pages() -> None:
    check(DECODE, [(1, 20), (1, 90)], layer=0)
    check(MIXED, [(30, 30), (1, 90)], layer=0)


def test_large_scores_do_not_overflow() -> None:
    """Keys that fit a query well, one far better than the rest."""
    heads = EACH
    pool = np.full((2 * PAGES + 1, PAGE_SIZE, 2, heads.kv, DIM), np.nan, np.float32)
    pool[3, :4, 0] = np.array([1, 200, -200, 30])[:, None, None]
    pool[3, :4, 1] = np.arange(4)[:, None, None]
    q = np.full((8, heads.query, DIM), 50, np.float32)
    rows = make_rows([RowPlan([1], False, 3, [3], 0, True)], DECODE)
    found = compiled(False)(q, jnp.asarray(pool), jnp.int32(0), rows)
    np.testing.assert_allclose(np.asarray(found)[0], 1)


def test_bfloat16() -> None:
    rows = [(1, 150), (40, 100), (1, 1)]
    check(MIXED, rows, dtype=BF16, tolerance=2e-2)
    check(DECODE, [(1, context) for context in EDGES], dtype=BF16, tolerance=2e-2)


@st.composite
def steps(draw: Callable) -> tuple[Bucket, list[Row]]:
    """A bucket and rows that fit into it."""
    bucket = draw(st.sampled_from([DECODE, MIXED]))
    rows: list[Row] = []
    left = bucket.tokens
    for _ in range(draw(st.integers(1, bucket.rows))):
        length = min(left, 1 if not bucket.prefill else draw(st.integers(1, 40)))
        if length:
            rows.append((length, length + draw(st.integers(0, 3 * SPAN - length))))
            left -= length
    return bucket, rows


@settings(max_examples=60, deadline=None)
@given(steps())
def test_any_step(step: tuple[Bucket, list[Row]]) -> None:
    check(*step)
