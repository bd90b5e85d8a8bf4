"""The page allocator against a model that only knows who holds what."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jslora.memory.pages import PageAllocator


class Ledger(RuleBasedStateMachine):
    """Holders with lists of pages; a page is free when no list has it."""

    @initialize(total=st.integers(2, 40))
    def start(self, total: int) -> None:
        self.pages = PageAllocator(total)
        self.total = total
        self.holders: list[list[int]] = []

    def free(self) -> set[int]:
        return set(range(1, self.total)) - {page for pages in self.holders for page in pages}

    def longest_run(self) -> int:
        longest = length = 0
        free = self.free()
        for page in range(1, self.total):
            length = length + 1 if page in free else 0
            longest = max(longest, length)
        return longest

    def given(self, n: int, pages: list[int] | None) -> None:
        """`n` pages were asked for: all of them fresh, or none because there are too few."""
        free = self.free()
        if n > len(free):
            assert pages is None
            return
        assert pages is not None
        assert len(pages) == len(set(pages)) == n
        assert set(pages) <= free
        self.holders.append(pages)

    @rule(n=st.integers(0, 12))
    def take(self, n: int) -> None:
        self.given(n, self.pages.take(n))

    @rule(n=st.integers(0, 12))
    def take_run(self, n: int) -> None:
        longest = self.longest_run()
        pages = self.pages.take_run(n)
        self.given(n, pages)
        if pages is not None and n <= longest:
            assert all(after == before + 1 for before, after in pairwise(pages)), pages

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.holders:
            pages = list(data.draw(st.sampled_from(self.holders)))
            self.pages.share(pages)
            self.holders.append(pages)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            self.pages.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(rounds=st.integers(1, 50))
    def churn(self, rounds: int) -> None:
        """Runs leave stale entries behind in whatever orders the free pages."""
        for _ in range(rounds):
            pages = self.pages.take_run(min(3, self.pages.free))
            assert pages is not None
            self.pages.release(pages)

    @invariant()
    def ledger_balances(self) -> None:
        self.pages.check(self.holders)
        assert self.pages.free == len(self.free())

    @invariant()
    def a_wrong_ledger_is_noticed(self) -> None:
        if self.holders and self.holders[-1]:
            with pytest.raises(AssertionError, match="differ"):
                self.pages.check(self.holders[:-1])
            with pytest.raises(AssertionError, match="differ"):
                self.pages.check([*self.holders, self.holders[-1]])


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_runs_come_from_the_bottom_and_single_pages_from_the_top() -> None:
    pages = PageAllocator(20)
    assert pages.take(3) == [19, 18, 17]
    assert pages.take_run(4) == [1, 2, 3, 4]
    assert pages.take(1) == [16]


def test_a_run_takes_the_shortest_gap_that_fits() -> None:
    pages = PageAllocator(20)
    runs = [pages.take_run(n) for n in (3, 1, 2, 1)]
    pages.release(runs[0])
    pages.release(runs[2])
    assert pages.take_run(2) == [5, 6]
    assert pages.take_run(2) == [1, 2]


def test_a_split_list_is_given_when_no_run_is_free() -> None:
    pages = PageAllocator(7)
    singles = [pages.take(1) for _ in range(6)]
    for held in singles[::2]:
        pages.release(held)
    found = pages.take_run(3)
    assert found is not None
    assert Counter(found) == Counter(page for held in singles[::2] for page in held)


@pytest.mark.parametrize("page", [0, 1])
def test_pages_that_nobody_holds_are_neither_shared_nor_released(page: int) -> None:
    pages = PageAllocator(4)
    with pytest.raises(AssertionError, match=f"page {page} is not held"):
        pages.share([page])
    with pytest.raises(AssertionError, match=f"page {page} is not held"):
        pages.release([page])


def test_a_page_cannot_be_released_more_often_than_it_is_held() -> None:
    pages = PageAllocator(4)
    held = pages.take(1)
    pages.share(held)
    pages.release(held)
    pages.release(held)
    with pytest.raises(AssertionError, match="is not held"):
        pages.release(held)


def test_the_ledger_check_names_the_pages_that_differ() -> None:
    pages = PageAllocator(8)
    held = pages.take(2)
    pages.check([held])
    with pytest.raises(AssertionError, match=r"\[\(3, 1, 0\), \(6, 0, 1\)\]"):
        pages.check([[7, 3]])
    with pytest.raises(AssertionError, match="null page is held"):
        pages.check([held, [0]])
    pages.free -= 1
    with pytest.raises(AssertionError, match="4 free and 2 used pages of 7"):
        pages.check([held])


def test_a_pool_without_a_page_to_give_is_refused() -> None:
    with pytest.raises(AssertionError, match="no page to give"):
        PageAllocator(1)
