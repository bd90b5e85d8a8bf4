"""The page allocator against a model that only knows who holds what."""

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

    @rule(n=st.integers(1, 12))
    def take_run(self, n: int) -> None:
        first = self.pages.free_run(n)
        assert (first is None) == (n > self.longest_run())
        if first is not None:
            pages = self.pages.take_at(first, n)
            assert pages[0] == first and all(b == a + 1 for a, b in pairwise(pages)), pages
            self.given(n, pages)

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(1, self.total - 1))
        holders = sum(page in pages for pages in self.holders)
        assert self.pages.count([page]).tolist() == [holders]
        assert self.pages.used()[page] == (holders > 0) and self.pages.used()[0]

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
            first = self.pages.free_run(min(3, self.longest_run()) or 1)
            if first is not None:
                self.pages.release(self.pages.take_at(first, min(3, self.longest_run())))

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


def take_run(pages: PageAllocator, n: int) -> list[int]:
    first = pages.free_run(n)
    assert first is not None
    return pages.take_at(first, n)


def test_runs_come_from_the_bottom_and_single_pages_from_the_top() -> None:
    pages = PageAllocator(20)
    assert pages.take(3) == [19, 18, 17]
    assert take_run(pages, 4) == [1, 2, 3, 4]
    assert pages.take(1) == [16]


def test_a_run_takes_the_shortest_gap_that_fits() -> None:
    pages = PageAllocator(20)
    runs = [take_run(pages, n) for n in (3, 1, 2, 1)]
    pages.release(runs[0])
    pages.release(runs[2])
    assert take_run(pages, 2) == [5, 6]
    assert take_run(pages, 2) == [1, 2]


def test_there_is_no_run_where_free_pages_lie_apart() -> None:
    pages = PageAllocator(7)
    singles = [pages.take(1) for _ in range(6)]
    for held in singles[::2]:
        pages.release(held)
    assert pages.free == 3 and pages.free_run(2) is None and pages.free_run(1) == 2


def test_pages_in_use_are_not_taken_again() -> None:
    pages = PageAllocator(8)
    pages.take_at(2, 2)
    with pytest.raises(AssertionError, match="1 of 3 pages at 3 are in use"):
        pages.take_at(3, 3)
    with pytest.raises(AssertionError):
        pages.take_at(0, 1)


@pytest.mark.parametrize("page", [0, 1])
def test_pages_that_nobody_holds_are_neither_shared_nor_released(page: int) -> None:
    pages = PageAllocator(4)
    with pytest.raises(AssertionError, match="are not held"):
        pages.share([page])
    with pytest.raises(AssertionError, match="are not held"):
        pages.release([page])


def test_a_page_cannot_be_released_more_often_than_it_is_held() -> None:
    pages = PageAllocator(4)
    held = pages.take(1)
    pages.share(held)
    pages.release(held)
    pages.release(held)
    with pytest.raises(AssertionError, match="are not held"):
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
