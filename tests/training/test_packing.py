"""Rows hold every example once an epoch, whole, and depend on nothing but seed and examples."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.training.data import Example
from jslora.training.packing import RowStream, batch_of, held_out_batches, pack


def example(number: int, size: int) -> Example:
    """Tokens that tell whose they are; all but the first are learnt."""
    learnt = np.arange(size) > 0
    return Example(np.full(size, number, np.int32), learnt)


sizes = st.lists(st.integers(1, 32), min_size=1, max_size=80)


@given(sizes, st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_holds_every_example_once(lengths: list[int], seed: int, epoch: int) -> None:
    examples = [example(i, size) for i, size in enumerate(lengths, start=1)]
    rows = RowStream(examples, 32, seed).epoch(epoch)
    assert all(0 < sum(map(len, row)) <= 32 for row in rows)
    found = sorted(int(each.tokens[0]) for row in rows for each in row)
    assert found == list(range(1, len(lengths) + 1))


@given(sizes, st.integers(0, 60), st.integers(1, 20))
@settings(deadline=None)
def test_rows_can_be_asked_for_from_anywhere(lengths: list[int], first: int, count: int) -> None:
    examples = [example(i, size) for i, size in enumerate(lengths)]
    straight = RowStream(examples, 32, 5).take(0, first + count)[first:]
    resumed = RowStream(examples, 32, 5).take(first, count)
    assert [[id(e) for e in row] for row in straight] == [[id(e) for e in row] for row in resumed]


def test_the_endless_rows_are_the_epochs_in_turn() -> None:
    rows = RowStream([example(i, 9) for i in range(10)], 32, 0)
    epochs = [rows.epoch(0), rows.epoch(1), rows.epoch(2)]
    assert rows.take(0, sum(map(len, epochs))) == [row for epoch in epochs for row in epoch]
    assert epochs[0] != epochs[1]


def test_rows_are_well_filled() -> None:
    draw = np.random.default_rng(0)
    examples = [example(i, int(size)) for i, size in enumerate(draw.integers(30, 150, 1000))]
    rows = pack(examples, 512)
    assert sum(map(len, examples)) / 512 / len(rows) > 0.97


@given(st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_batch_is_its_rows(lengths: list[list[int]]) -> None:
    """Against the meaning of each array, place by place."""
    rows = [[example(10 * b + i, n) for i, n in enumerate(row)] for b, row in enumerate(lengths)]
    batch = batch_of(rows, range(len(rows)), 32)
    assert batch.adapter.tolist() == list(range(len(rows)))
    for b, row in enumerate(rows):
        places = [(s, i, each) for s, each in enumerate(row, start=1) for i in range(len(each))]
        for t in range(32):
            if t >= len(places):
                assert (batch.segment[b, t], batch.loss[b, t], batch.tokens[b, t]) == (0, False, 0)
                continue
            segment, place, each = places[t]
            assert batch.segment[b, t] == segment and batch.position[b, t] == place
            assert batch.tokens[b, t] == each.tokens[place]
            assert batch.loss[b, t] == (place + 1 < len(each) and each.learnt[place + 1])


def test_evaluation_sees_everything_once_in_batches_of_one_shape() -> None:
    held_out = [[example(i, 20) for i in range(5)], [example(9, 32)]]
    batches = list(held_out_batches(held_out, 4, 32))
    assert [batch.tokens.shape for batch in batches] == [(4, 32), (4, 32)]
    learnt = {0: 0, 1: 0}
    for batch in batches:
        for b in range(4):
            learnt[int(batch.adapter[b])] += int(batch.loss[b].sum())
    assert learnt == {0: 5 * 19, 1: 31}
