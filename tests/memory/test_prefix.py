"""The prefix cache against a model that knows what was computed in every page."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache, next_keys, root_key
from jslora.memory.worth import Clock

SIZE = 2


def chain(owner: tuple[str, str, str], tokens: tuple[int, ...]) -> list[bytes]:
    """Keys of the full pages of `tokens`."""
    return next_keys(root_key(*owner), tokens, SIZE) if tokens else []


owners = st.tuples(*(st.sampled_from(["", "x", "y"]) for _ in range(3)))
texts = st.lists(st.integers(0, 3), max_size=8).map(tuple)


@given(owners, texts, owners, texts)
def test_keys_are_equal_only_for_the_same_owner_and_all_tokens_before(
    one: tuple[str, str, str], text: tuple[int, ...], two: tuple[str, str, str],
    other: tuple[int, ...],
) -> None:  # fmt: skip
    for n, (a, b) in enumerate(zip(chain(one, text), chain(two, other), strict=False), start=1):
        same = one == two and text[: n * SIZE] == other[: n * SIZE]
        assert (a == b) == same


def test_owners_are_not_mixed_up_by_where_a_name_ends() -> None:
    assert root_key("a", "b", "c") != root_key("a", "bc", "")
    assert root_key('a", "b', "c", "") != root_key("a", "b", '", "c')


class Cache(RuleBasedStateMachine):
    """Sequences that start with what is known, compute the rest, publish it and end."""

    @initialize(total=st.integers(4, 24), enabled=st.sampled_from([True, True, True, False]))
    def start(self, total: int, enabled: bool) -> None:
        self.pages, self.clock = PageAllocator(total), Clock()
        self.prefix = PrefixCache(self.pages, self.clock, enabled=enabled)
        self.contents: dict[int, bytes] = {}
        self.running: list[tuple[list[int], list[bytes], str]] = []

    @rule(owner=owners, text=texts)
    def begin(self, owner: tuple[str, str, str], text: tuple[int, ...]) -> None:
        keys = chain(owner, text)
        known = self.prefix.take(keys)
        for page, key in zip(known, keys, strict=False):
            assert self.contents[page] == key, "a page holds something else"
        fresh = self.pages.take(len(keys) - len(known))
        if fresh is None:
            self.prefix.release(known)
            return
        for page, key in zip(fresh, keys[len(known) :], strict=True):
            self.contents[page] = key
        self.running.append((known + fresh, keys, owner[0]))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages, keys, digest = data.draw(st.sampled_from(self.running))
        n = data.draw(st.integers(0, len(keys)))
        held = self.known()
        for key, page in zip(keys[:n], pages, strict=False):
            if page not in held:  # as a sequence that was given the page does not offer it
                self.prefix.publish([key], [page], (digest,))

    def known(self) -> dict[int, bytes]:
        return {page: self.contents[page] for pages in self.prefix.held() for page in pages}

    @precondition(lambda self: self.running)
    @rule(data=st.data(), time=st.floats(0, 2))
    def end(self, data: st.DataObject, time: float) -> None:
        pages, _, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.clock.advance(self.clock.now + time)
        self.prefix.release(pages)

    @precondition(lambda self: self.prefix.idle)
    @rule()
    def evict(self) -> None:
        idle, least, free = self.prefix.idle, self.prefix.least, self.pages.free
        self.pages.release(self.prefix.surrender(1, np.inf))
        assert (self.prefix.idle, self.pages.free) == (idle - 1, free + 1)
        assert self.clock.now >= least and self.prefix.least >= least - 1e-2

    @rule(owner=owners)
    def drop(self, owner: tuple[str, str, str]) -> None:
        self.prefix.drop(owner[0])
        for text in ((0, 0), (1, 1), (2, 3)):
            assert self.prefix.take(chain(owner, text)) == []

    @rule()
    def lose_the_pool(self) -> None:
        for pages, _, _ in self.running:
            self.prefix.release(pages)
        self.running.clear()
        self.prefix.clear()
        assert self.pages.free == self.pages.total - 1

    @invariant()
    def ledger_balances(self) -> None:
        self.pages.check([*(pages for pages, _, _ in self.running), *self.prefix.held()])
        self.prefix.check()
        if not self.prefix.enabled:
            assert self.known() == {}


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def run(prefix: PrefixCache, pages: PageAllocator, tokens: tuple[int, ...]) -> int:
    """A sequence from its start to its end; how many pages it was spared."""
    keys = chain(("", "", ""), tokens)
    known = prefix.take(keys)
    held = known + pages.take(len(keys) - len(known))
    for key, page in list(zip(keys, held, strict=True))[len(known) :]:
        prefix.publish([key], [page], ())
    prefix.release(held)
    return len(known)


def test_the_end_of_a_prompt_leaves_before_its_beginning() -> None:
    pages = PageAllocator(10)
    prefix = PrefixCache(pages, Clock())
    assert run(prefix, pages, (1, 1, 2, 2, 3, 3)) == 0
    for left in (2, 1, 0):
        pages.release(prefix.surrender(1, np.inf))
        known = prefix.take(chain(("", "", ""), (1, 1, 2, 2, 3, 3)))
        assert len(known) == left
        prefix.release(known)


def test_what_was_used_again_stays_longest_and_raises_the_chance_of_reuse() -> None:
    pages = PageAllocator(10)
    prefix = PrefixCache(pages, Clock())
    for tokens in ((1, 1), (2, 2), (3, 3)):
        assert run(prefix, pages, tokens) == 0
    before = prefix.kind.chance
    assert run(prefix, pages, (1, 1, 5, 5)) == 1 and prefix.kind.chance > before
    pages.release(prefix.surrender(1, np.inf))
    pages.release(prefix.surrender(1, np.inf))
    assert run(prefix, pages, (1, 1)) == 1 and prefix.evictions == 2
    assert run(prefix, pages, (2, 2)) == run(prefix, pages, (3, 3)) == 0


def test_two_that_compute_the_same_keep_one_page() -> None:
    pages = PageAllocator(10)
    prefix = PrefixCache(pages, Clock())
    [key] = chain(("", "", ""), (1, 1))
    one, two = pages.take(1), pages.take(1)
    for page in (one, two):
        prefix.publish([key], page[:1], ())
    prefix.release(two)
    assert pages.free == 8 and prefix.idle == 0
    prefix.release(one)
    assert pages.free == 8 and prefix.idle == 1
