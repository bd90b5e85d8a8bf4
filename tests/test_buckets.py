"""The list of step shapes and the choice among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.batch import Bucket
from jslora.buckets import SMALLEST, choose, make_buckets


def test_the_buckets_of_the_demo() -> None:
    assert [(b.tokens, b.rows) for b in make_buckets(16, 256, 128)] == [
        (8, 8), (16, 16), (32, 16), (64, 16), (128, 16), (256, 16),
    ]  # fmt: skip


def test_a_small_server_has_few() -> None:
    assert make_buckets(1, 8, 16) == [Bucket(8, 8, 16), Bucket(16, 8, 16)]


@given(st.integers(1, 300), st.integers(8, 5000), st.data())
def test_any_step_within_the_limits_has_a_bucket(
    rows: int, tokens: int, data: st.DataObject
) -> None:
    buckets = make_buckets(rows, tokens, 8)
    assert len(set(buckets)) == len(buckets) < 25
    assert min(bucket.rows for bucket in buckets) >= SMALLEST
    most = data.draw(st.integers(1, min(rows, tokens)))
    lengths = [1] * most
    if data.draw(st.booleans()):
        lengths[0] += data.draw(st.integers(0, tokens - most))
    found = choose(buckets, lengths)
    assert found.tokens >= sum(lengths) and found.rows >= len(lengths)
    assert found.prefill == (max(lengths) > 1)
    smaller = [b for b in buckets if b.prefill == found.prefill and b < found]
    assert all(b.tokens < sum(lengths) or b.rows < len(lengths) for b in smaller)


def test_one_token_a_row_decodes() -> None:
    buckets = make_buckets(16, 64, 8)
    assert not choose(buckets, [1]).prefill
    assert choose(buckets, [1] * 9) == Bucket(16, 16, 8)
    assert choose(buckets, [2]).prefill


@pytest.mark.parametrize("lengths", [[1] * 17, [65], [60, 5]])
def test_a_step_over_the_limits_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="no bucket for"):
        choose(make_buckets(16, 64, 8), lengths)
