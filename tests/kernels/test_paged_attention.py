"""Attention over pages against a float64 oracle, by every implementation.

The kernels in the Triton language are interpreted, in a process of their own that runs this file.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from attention_cases import (
    BF16,
    EACH,
    GROUPED,
    ONE,
    ONE_PART,
    PAGES,
    POSITIONS,
    SMOLLM,
    WIDE,
    Heads,
    Row,
    Setup,
    attend,
    check,
    make_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import RowPlan
from pallas_kernels.paged_attention import api
from pallas_kernels.paged_attention.reference import QUERY_TILE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EDGES = [1, 2, 7, 8, 9, 47, 48, 49, 63, 64, 65, 97, 128, 129, 300, POSITIONS]
"""Contexts at the edges of pages, parts, blocks and chunks; of 97, the last part is short."""
MIXED: list[Row] = [(1, 70), (40, 40), (1, 1), (2, 130), (33, POSITIONS), (1, 300)]
"""One-token rows in between; with 97 tokens."""


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "pallas"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_kernels() -> None:
    """Everything below once more, with triton."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize("heads", [GROUPED, EACH, ONE, SMOLLM, WIDE], ids=str)
def test_decode_rows_of_every_kind_of_length(implementation: str, heads: Heads) -> None:
    setup = Setup(implementation, heads)
    check(setup, setup.bucket(16, 16), [(1, context) for context in EDGES])


def test_few_decode_rows(implementation: str) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(16, 16), [(1, 5)])
    check(setup, setup.bucket(16, 16), [(1, 131), (1, 1)])


def test_no_row(implementation: str) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(16, 16), [])
    check(setup, setup.bucket(112, 8), [])


@pytest.mark.parametrize("heads", [GROUPED, EACH, ONE, SMOLLM, WIDE], ids=str)
def test_prefill_and_decode_side_by_side(implementation: str, heads: Heads) -> None:
    setup = Setup(implementation, heads)
    check(setup, setup.bucket(112, 8), MIXED)


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_pages_of_other_sizes(implementation: str, page_size: int) -> None:
    setup = Setup(implementation, page_size=page_size)
    check(setup, setup.bucket(112, 8), MIXED)


def test_rows_that_are_never_cut_in_parts(implementation: str) -> None:
    setup = Setup(implementation, cut=ONE_PART)
    check(setup, setup.bucket(112, 8), MIXED)


@pytest.mark.parametrize("length", [2, 15, 16, 17, QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 80])
def test_prefill_tiles_of_every_shape(implementation: str, length: int) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(112, 8), [(length, length)])
    check(setup, setup.bucket(112, 8), [(length, 193)])


@pytest.mark.parametrize("length", [2, 5, 31])
def test_the_last_tile_lies_at_the_end_of_the_step(implementation: str, length: int) -> None:
    """A whole tile from its start on would run past the last token."""
    setup = Setup(implementation)
    check(setup, setup.bucket(112, 8), [(112 - length, 120), (length, 100)])


def test_a_step_shorter_than_a_tile(implementation: str) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(16, 8), [(5, 9), (1, 3), (9, 80)])
    check(setup, setup.bucket(16, 8), [(16, 16)])


def test_the_layer_says_which_pages(implementation: str) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(16, 16), [(1, 20), (1, 90)], layer=0)
    check(setup, setup.bucket(112, 8), [(30, 30), (1, 90)], layer=0)


@pytest.mark.parametrize("heads", [SMOLLM, WIDE], ids=str)
def test_bfloat16(implementation: str, heads: Heads) -> None:
    setup = Setup(implementation, heads, BF16)
    check(setup, setup.bucket(112, 8), MIXED)


def test_bfloat16_decode(implementation: str) -> None:
    setup = Setup(implementation, SMOLLM, BF16)
    check(setup, setup.bucket(16, 16), [(1, context) for context in EDGES])


def test_a_row_that_is_not_a_number_spoils_no_other(implementation: str) -> None:
    setup = Setup(implementation)
    for spoilt in range(len(MIXED)):
        check(setup, setup.bucket(112, 8), MIXED, spoilt=spoilt)
    check(setup, setup.bucket(16, 16), [(1, 90), (1, 300), (1, 5)], spoilt=1)


def test_large_scores_do_not_overflow(implementation: str) -> None:
    """Keys that fit a query well, one far better than the rest; and one of a whole part."""
    setup = Setup(implementation, EACH)
    bucket = setup.bucket(16, 16)
    pool = np.full((2 * PAGES + 1, 8, 2, 3, 16), np.nan, np.float32)
    pool[3, :4, 0] = np.array([1, 200, -200, 30])[:, None, None]
    pool[3, :4, 1] = np.arange(4)[:, None, None]
    pool[4:14, :, 0], pool[4:14, :, 1] = -200, 7
    pool[10, 5] = np.array([200, 9])[:, None, None]
    q = np.full((16, 3, 16), 50, np.float32)
    plans = [
        RowPlan([1], False, 3, [3], 0, True),
        RowPlan([1], False, 79, list(range(4, 14)), 1, True),
    ]
    rows = make_rows(plans, bucket, setup.geometry)
    found = attend(setup, bucket, q, pool, 0, rows)
    np.testing.assert_allclose(found[0], 1)
    np.testing.assert_allclose(found[1], 9)


@st.composite
def steps(draw: Callable) -> tuple[tuple[int, int], list[Row]]:
    """Tokens and rows of a bucket, and rows that fit into it."""
    bucket = draw(st.sampled_from([(16, 16), (112, 8)]))
    rows: list[Row] = []
    left, most = bucket
    longest = 1 if left == most else 40
    for _ in range(draw(st.integers(1, most))):
        length = min(left, draw(st.integers(1, longest)))
        if length:
            rows.append((length, length + draw(st.integers(0, POSITIONS - length))))
            left -= length
    return bucket, rows


@pytest.mark.parametrize("implementation", ["triton"] if INTERPRETED else ["reference", "pallas"])
@settings(max_examples=10 if INTERPRETED else 30, deadline=None)
@given(steps())
def test_any_step(implementation: str, step: tuple[tuple[int, int], list[Row]]) -> None:
    setup = Setup(implementation)
    check(setup, setup.bucket(*step[0]), step[1])


@pytest.mark.parametrize("dim", [8, 24, 80])
def test_heads_that_the_kernels_cannot_attend(dim: int) -> None:
    api.check("reference", dim)
    for name in ("pallas", "triton"):
        with pytest.raises(NotImplementedError, match=f"heads of {dim} numbers"):
            api.check(name, dim)
