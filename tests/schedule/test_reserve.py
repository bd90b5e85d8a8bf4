"""The peak of pages against playing every step through."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jslora.schedule.reserve import Future

ROW = st.tuples(st.integers(0, 200), st.integers(0, 150))
ROWS = st.lists(ROW, max_size=12)
SIZE = st.sampled_from([1, 3, 8, 16, 64])


def simulated(rows: list[tuple[int, int]], page_size: int) -> int:
    """Play it: each step count the pages of who is there, then drop who ended and grow the rest."""
    there, peak = list(rows), 0
    while there:
        peak = max(peak, sum((held + page_size - 1) // page_size for held, _ in there))
        there = [(held + 1, left - 1) for held, left in there if left > 0]
    return peak


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@given(rows=ROWS, size=SIZE)
def test_the_peak_is_the_one_of_the_simulation(rows: list[tuple[int, int]], size: int) -> None:
    future = Future(*columns(rows), size)
    assert simulated(rows, size) <= future.most
    assert future.peak == simulated(rows, size) <= future.most


@given(rows=ROWS, more=st.lists(ROW, max_size=4), size=SIZE)
def test_rows_one_by_one_are_as_all_at_once(
    rows: list[tuple[int, int]], more: list[tuple[int, int]], size: int
) -> None:
    future = Future(*columns(rows), size)
    for n, (held, remaining) in enumerate(more, 1):
        expected = simulated(rows + more[:n], size)
        before = future.peak
        assert not future.join(held, remaining, expected - 1) and future.peak == before
        assert future.peak == before, "a question changed it"
        assert future.join(held, remaining, expected)
        assert future.peak == expected


def test_a_batch_of_full_size_in_narrow_integers() -> None:
    random = np.random.default_rng(0)
    held, remaining = random.integers(0, 4000, 257), random.integers(0, 2000, 257)
    expected = simulated(list(zip(held.tolist(), remaining.tolist(), strict=True)), 16)
    assert Future(held, remaining, 16).peak == expected
    assert Future(held.astype(np.int32), remaining.astype(np.int32), 16).peak == expected


def test_room_comes_back_before_it_is_needed() -> None:
    """A row that soon ends makes way for one that grows: 4 + 1 pages, never 4 + 4."""
    held, remaining = np.array([64, 1]), np.array([0, 63])
    assert Future(held, remaining, 16).peak == 5
