"""Rows of batches: examples laid one after the other, in an order that seed and epoch decide.

A row belongs to one adapter. Which rows an adapter gets depends on its own examples, the seed and
the length of a row, never on what else is trained, and row number i of the endless sequence can
be asked for at any time: nothing has to be saved to go on from a step. Every example is in every
epoch once; none is cut here. Host only: no jax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jslora.training.data import Example

# Rows that are open to a shorter example at a time. More fill rows better but make an order less
# random; with 16, chats of 30 to 100 tokens leave about 2 % of rows of 512 unused.
_OPEN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tokens of B rows of T places, of which some are padding.

    Attributes:
        tokens: int32 [B, T].
        position: int32 [B, T], each token's place in its example.
        segment: int32 [B, T], 0 for padding, else the example's number in its row, from 1.
        loss: bool [B, T], whether the loss of the *next* token counts at this place.
        adapter: int32 [B], whose row it is.
    """

    tokens: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    loss: np.ndarray
    adapter: np.ndarray


Row = Sequence[Example]


class RowStream:
    """The endless rows of one adapter.

    Attributes:
        length: places in a row; no example may be longer.
    """

    def __init__(self, examples: Sequence[Example], length: int, seed: int) -> None:
        assert examples and max(map(len, examples)) <= length, (len(examples), length)
        self.length = length
        self._examples = examples
        self._seed = seed
        self._ends: list[int] = []  # how many rows there are up to the end of each epoch
        self._epoch: tuple[int, list[Row]] = (-1, [])

    def epoch(self, number: int) -> list[Row]:
        """The rows of one epoch, counted from 0."""
        if self._epoch[0] != number:
            order = np.random.default_rng([self._seed, 0, number]).permutation(len(self._examples))
            self._epoch = number, pack([self._examples[i] for i in order], self.length)
        return self._epoch[1]

    def take(self, first: int, count: int) -> list[Row]:
        """Rows `first` to `first + count` of the endless sequence."""
        return [self._row(number) for number in range(first, first + count)]

    def _row(self, number: int) -> Row:
        while not self._ends or self._ends[-1] <= number:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self.epoch(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        rows = self.epoch(epoch)
        return rows[number - self._ends[epoch]]  # counted from the epoch's end


def pack(examples: Sequence[Example], length: int) -> list[Row]:
    """Put examples into rows of at most `length` tokens, each into the first open row with room.

    Rows come in the order in which they were opened.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in examples:
        start = max(0, len(rows) - _OPEN)
        place = next((i for i in range(start, len(rows)) if free[i] >= len(example)), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(length)
        rows[place].append(example)
        free[place] -= len(example)
    return list(rows)


def batch_of(rows: Sequence[Row], adapters: Sequence[int], length: int) -> Batch:
    """A batch of these rows, `adapters` telling whose each is; a row may be empty."""
    shape = len(rows), length
    tokens, position, segment = (np.zeros(shape, np.int32) for _ in range(3))
    loss = np.zeros(shape, bool)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            end = start + len(example)
            tokens[b, start:end] = example.tokens
            position[b, start:end] = np.arange(len(example))
            segment[b, start:end] = number
            loss[b, start : end - 1] = example.learnt[1:]
            start = end
    return Batch(tokens, position, segment, loss, np.array(adapters, np.int32))


def held_out_batches(
    held_out: Sequence[Sequence[Example]], rows: int, length: int
) -> Iterator[Batch]:
    """All examples of every adapter once, always in the same batches of `rows` rows."""
    todo = [
        (row, adapter)
        for adapter, examples in enumerate(held_out)
        for row in pack(examples, length)
    ]
    for start in range(0, len(todo), rows):
        part = todo[start : start + rows]
        part += [((), 0)] * (rows - len(part))
        yield batch_of([row for row, _ in part], [adapter for _, adapter in part], length)
