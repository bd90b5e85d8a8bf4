"""The table of who waits against a plain sort."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from waiting_sequences import make_sequence, queue

from jslora.schedule.queue import Waiting
from jslora.schedule.sequence import Sequence

COLUMNS = ("tenant", "level", "work", "deadline", "since")
VALUES = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 3.0, math.inf])


@dataclass(frozen=True)
class By:
    """A policy: a column, perhaps the largest first."""

    column: str
    down: bool

    def score(self, waiting: Waiting, rows: np.ndarray, now: float) -> np.ndarray:
        values = waiting.column(self.column)[rows]
        return -values if self.down else values

    def key(self, sequence: Sequence) -> float:
        value = getattr(sequence, self.column)
        return -value if self.down else value


POLICIES = st.lists(st.builds(By, st.sampled_from(COLUMNS), st.booleans()), max_size=4)


def sorted_plainly(sequences: list[Sequence], policies: list[By]) -> list[Sequence]:
    """Resumed ones by arrival, then the rest by policy after policy, then by arrival."""
    resumed = sorted((s for s in sequences if s.life), key=lambda s: s.order)
    fresh = [s for s in sequences if not s.life]
    return resumed + sorted(fresh, key=lambda s: (*(p.key(s) for p in policies), s.order))


class QueueMachine(RuleBasedStateMachine):
    """Sequences come and go; some come back after they ran."""

    @initialize(many=st.booleans())
    def begin(self, many: bool) -> None:
        self.waiting, self.all = Waiting(), list[Sequence]()
        self.orders = 0
        for _ in range(70 if many else 0):  # the table grows
            self.add({"work": float(self.orders % 3)}, 1, 0)

    @rule(
        columns=st.fixed_dictionaries({
            "tenant_number": st.integers(0, 3), "level": VALUES, "work": VALUES,
            "deadline": VALUES, "since": VALUES,
        }),
        prompt=st.integers(1, 5), life=st.sampled_from([0, 0, 0, 1]),
    )  # fmt: skip
    def add(self, columns: dict[str, float], prompt: int, life: int) -> None:
        sequence = make_sequence(self.orders, prompt=prompt, life=life, **columns)
        self.orders += 1
        self.waiting.add(sequence)
        self.all.append(sequence)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.waiting.remove(self.all.pop(data.draw(st.integers(0, len(self.all) - 1))))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """It ran meanwhile and was preempted."""
        sequence = self.all[data.draw(st.integers(0, len(self.all) - 1))]
        self.waiting.remove(sequence)
        sequence.life += 1
        self.waiting.add(sequence)

    @rule(k=st.integers(0, 100), policies=POLICIES)
    def front(self, k: int, policies: list[By]) -> None:
        expected = sorted_plainly(self.all, policies)[:k]
        found = self.waiting.front(k, policies, 0.0)
        assert [s.order for s in found] == [s.order for s in expected]

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "waiting"):
            assert len(self.waiting) == len(self.all)
            assert self.waiting.tokens == sum(s.prompt_length for s in self.all)
            assert list(self.waiting) == sorted(self.all, key=lambda s: s.order)
            fresh = [s for s in self.all if not s.life]
            assert sorted(s.place for s in fresh) == list(range(len(fresh)))
            assert all(s.place == -1 for s in self.all if s.life)
            for name in COLUMNS:
                column = self.waiting.column(name)
                assert all(column[s.place] == getattr(s, name) for s in fresh)


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueue = QueueMachine.TestCase


ROWS = st.tuples(st.integers(0, 2), VALUES, VALUES, VALUES, VALUES, st.sampled_from([0, 0, 0, 1]))


@settings(max_examples=200, deadline=None)
@given(st.lists(ROWS, max_size=40), POLICIES, st.integers(0, 45))
def test_the_front_is_that_of_a_plain_sort(
    rows: list[tuple[float, ...]], policies: list[By], k: int
) -> None:
    names = ("tenant_number", *COLUMNS[1:], "life")
    sequences = [
        make_sequence(order, **dict(zip(names, values, strict=True)))
        for order, values in enumerate(rows)
    ]
    found = queue(*sequences).front(k, policies, 0.0)
    assert [s.order for s in found] == [s.order for s in sorted_plainly(sequences, policies)[:k]]


def test_those_of_some_rows_are_found() -> None:
    sequences = [make_sequence(order, level=float(order % 2)) for order in range(9)]
    waiting = queue(*sequences)
    for gone in (0, 3):
        waiting.remove(sequences[gone])
    found = waiting.at(waiting.column("level") > 0)
    assert sorted(s.order for s in found) == [1, 5, 7]


def test_those_that_never_ran_are_added_as_they_arrived() -> None:
    waiting = queue(make_sequence(1), make_sequence(3))
    with pytest.raises(AssertionError, match="2 after 3"):
        waiting.add(make_sequence(2))
    waiting.add(make_sequence(0, life=1))
    assert [s.order for s in waiting.front(9, [], 0.0)] == [0, 1, 3]
