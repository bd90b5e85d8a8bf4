"""Which adapters are on the device: what may leave, what may not, and that no page is lost."""

from concurrent.futures import Future

import numpy as np
import pytest
from fake_adapters import (
    LAYERS,
    NUMBERS,
    FakeStore,
    FakeUploads,
    make_packed,
    make_version,
    page_mark,
)  # fmt: skip
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jslora.errors import AdapterRejected
from jslora.memory.pages import PageAllocator
from jslora.memory.residency import Residency

TOTAL = 20
DROP = LAYERS * TOTAL + 3
CHUNK = 4


def make_residency(total: int = TOTAL, chunk: int = CHUNK) -> Residency:
    beyond = DROP + LAYERS * (total - TOTAL)  # a row past the pool, whatever its size
    return Residency(PageAllocator(total), FakeStore(), FakeUploads(), LAYERS, total, beyond, chunk)


def load(residency: Residency, number: int, n_pages: int) -> None:
    """Bring an adapter to the device and let it be ready."""
    assert residency.ensure(make_version(number, n_pages), ())
    residency.upload.finish(1000)
    residency.writes(1000)
    assert residency.placement(make_version(number, n_pages)) is not None


def here(residency: Residency) -> list[int]:
    return sorted(int(digest) for digest in residency.residents)


def test_an_adapter_is_ready_after_its_last_chunk_was_written() -> None:
    residency, version = make_residency(), make_version(1, 5)
    assert residency.ensure(version, ())
    assert residency.loading and residency.placement(version) is None
    assert residency.writes(10) == [], "nothing was transferred yet"
    residency.upload.finish(1)
    assert len(residency.writes(10)) == 1
    assert residency.placement(version) is None
    residency.upload.finish(10)
    assert len(residency.writes(1)) == 1, "at most as many as asked for"
    assert residency.placement(version) is None
    assert len(residency.writes(10)) == 1
    placement = residency.placement(version)
    assert placement is not None and placement.pages == (1, 2, 3, 4, 5)
    assert not residency.loading and residency.loads == 1
    assert residency.ensure(version, ()) and residency.loads == 1, "a second load is none"


def test_the_chunks_carry_every_page_to_its_row_in_every_layer() -> None:
    residency = make_residency()
    residency.pages.take(12)
    held = [residency.pages.take_run(1) for _ in range(7)]
    for pages in held[::2]:
        residency.pages.release(pages)
    version = make_version(3, 4)
    assert residency.ensure(version, ())
    residency.upload.finish(1000)
    pool = np.zeros((LAYERS * TOTAL, NUMBERS), np.float32)
    for rows, data in residency.writes(1000):
        assert rows.dtype == np.int32 and rows.shape == (CHUNK,) and data.shape == (CHUNK, NUMBERS)
        inside = rows < len(pool)
        assert (rows[~inside] == DROP).all()
        pool[rows[inside]] = data[inside]
    placement = residency.placement(version)
    assert placement is not None and sorted(placement.pages) == [1, 3, 5, 7]
    for layer in range(LAYERS):
        for n, page in enumerate(placement.pages):
            assert pool[layer * TOTAL + page].tolist() == page_mark(3, layer, n)
    assert np.count_nonzero(pool.any(axis=1)) == LAYERS * 4


def test_an_adapter_that_is_still_being_read_takes_no_pages() -> None:
    residency, version = make_residency(), make_version(1, 5)
    residency.store.delays[version.digest] = 2
    for _ in range(2):
        assert residency.ensure(version, ())
        assert residency.placement(version) is None and residency.pages.free == TOTAL - 1
    assert residency.ensure(version, ()) and residency.pages.free == TOTAL - 6


def test_an_adapter_that_cannot_be_read_again_leaves_nothing_behind() -> None:
    residency, version = make_residency(), make_version(1, 5)
    residency.store.refused.add(version.digest)
    with pytest.raises(AdapterRejected, match="changed on disk"):
        residency.ensure(version, ())
    assert not residency.residents and residency.pages.free == TOTAL - 1


def test_pages_are_not_lost_when_an_upload_cannot_be_started() -> None:
    residency = make_residency()

    def upload(rows: np.ndarray, data: np.ndarray) -> Future:
        raise RuntimeError("no thread")

    residency.upload = upload
    with pytest.raises(RuntimeError):
        residency.ensure(make_version(1, 5), ())
    assert not residency.residents
    residency.pages.check([])


def test_a_lost_pool_leaves_nothing() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    assert residency.ensure(make_version(2, 4), ())  # loading
    residency.forget_all()
    assert here(residency) == [] and residency.writes(10) == []
    residency.pages.check([])


def test_the_least_recently_used_leaves_first_and_no_more_than_needed() -> None:
    residency = make_residency()
    for number in (1, 2, 3):
        load(residency, number, 6)
    residency.touch("001")
    load(residency, 4, 5)
    assert here(residency) == [1, 3, 4]
    assert residency.evictions == 1
    assert residency.make_room(8, ()), "2 are free"
    assert here(residency) == [1, 4]


def test_nobody_leaves_when_it_would_not_be_enough() -> None:
    residency = make_residency()
    for number in (1, 2, 3):
        load(residency, number, 6)
    residency.acquire("001")
    assert not residency.make_room(14, ())
    assert not residency.ensure(make_version(4, 14), ())
    assert here(residency) == [1, 2, 3] and residency.evictions == 0


def test_what_is_in_use_pinned_loading_or_wanted_stays() -> None:
    residency = make_residency()
    for number in (1, 2, 3, 4):
        load(residency, number, 3)
    residency.acquire("001")
    residency.pinned.add("002")
    assert residency.ensure(make_version(5, 3), ())  # loading
    assert not residency.make_room(8, {"003"})
    assert residency.make_room(7, {"003"})
    assert here(residency) == [1, 2, 3, 5]
    residency.release("001")
    residency.upload.finish(100)
    residency.writes(100)
    assert residency.make_room(TOTAL - 1 - 3, ())
    assert here(residency) == [2]


def test_a_retired_adapter_leaves_when_its_last_user_does() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    residency.acquire("001")
    residency.acquire("001")
    residency.retire("001")
    residency.release("001")
    assert here(residency) == [1]
    residency.release("001")
    assert here(residency) == [] and residency.pages.free == TOTAL - 1
    assert residency.evictions == 0


def test_an_idle_adapter_leaves_as_soon_as_it_is_retired() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    residency.retire("001")
    residency.retire("002")  # never was here
    assert here(residency) == [] and residency.pages.free == TOTAL - 1


def test_an_adapter_retired_while_loading_leaves_after_its_last_chunk() -> None:
    residency = make_residency()
    assert residency.ensure(make_version(1, 4), ())
    residency.retire("001")
    assert here(residency) == [1], "its transfers still come"
    residency.upload.finish(100)
    residency.writes(1)
    assert here(residency) == [1]
    residency.writes(100)
    assert here(residency) == [] and residency.pages.free == TOTAL - 1


def test_a_revived_adapter_stays() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    residency.acquire("001")
    residency.retire("001")
    residency.revive("001")
    residency.revive("002")
    residency.release("001")
    assert here(residency) == [1]


def test_an_adapter_nobody_uses_cannot_be_released() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    with pytest.raises(AssertionError, match="is not in use"):
        residency.release("001")


class Traffic(RuleBasedStateMachine):
    """Loads, users, names that come and go; the pages of the device as the chunks left them."""

    @initialize(total=st.integers(4, 24), chunk=st.integers(1, 9), data=st.data())
    def start(self, total: int, chunk: int, data: st.DataObject) -> None:
        self.total = total
        self.residency = make_residency(total, chunk)
        sizes = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=6))
        self.versions = [make_version(number, n) for number, n in enumerate(sizes)]
        self.users = dict.fromkeys((v.digest for v in self.versions), 0)
        self.kv: list[list[int]] = []
        self.pool = np.zeros((LAYERS * total, NUMBERS), np.float32)

    def ready(self) -> list[str]:
        return [v.digest for v in self.versions if self.residency.placement(v)]

    @rule(data=st.data())
    def ensure(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.versions))
        free, before = self.residency.pages.free, set(self.residency.residents)
        there = self.residency.ensure(version, data.draw(st.sets(st.sampled_from(self.versions))))
        if not there:
            assert (free, before) == (self.residency.pages.free, set(self.residency.residents))
        else:
            assert version.digest in self.residency.residents

    @rule(n=st.integers(1, 8))
    def take_for_kv(self, n: int) -> None:
        if self.residency.make_room(n, ()):
            pages = self.residency.pages.take(n)
            assert pages is not None
            self.kv.append(pages)
            for layer in range(LAYERS):
                self.pool[[layer * self.total + page for page in pages]] = -1

    @precondition(lambda self: self.kv)
    @rule(data=st.data())
    def release_kv(self, data: st.DataObject) -> None:
        self.residency.pages.release(self.kv.pop(data.draw(st.integers(0, len(self.kv) - 1))))

    @rule(n=st.integers(0, 30))
    def transfer(self, n: int) -> None:
        self.residency.upload.finish(n)

    @rule(limit=st.integers(0, 30))
    def write(self, limit: int) -> None:
        chunks = self.residency.writes(limit)
        assert len(chunks) <= limit
        for rows, data in chunks:
            inside = rows < len(self.pool)
            self.pool[rows[inside]] = data[inside]

    @precondition(lambda self: self.ready())
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.ready()))
        self.residency.acquire(digest)
        self.users[digest] += 1

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from([d for d, n in self.users.items() if n]))
        self.users[digest] -= 1
        self.residency.release(digest)

    @rule(data=st.data(), gone=st.booleans())
    def name(self, data: st.DataObject, gone: bool) -> None:
        digest = data.draw(st.sampled_from(self.versions)).digest
        (self.residency.retire if gone else self.residency.revive)(digest)

    @invariant()
    def ledger_balances(self) -> None:
        residents = self.residency.residents.values()
        self.residency.pages.check([*self.kv, *(r.placement.pages for r in residents)])

    @invariant()
    def who_is_used_is_here_whole(self) -> None:
        for version in self.versions:
            placement = self.residency.placement(version)
            assert placement or not self.users[version.digest]
            if placement:
                blob = make_packed(version).blob
                for layer in range(LAYERS):
                    rows = [layer * self.total + page for page in placement.pages]
                    np.testing.assert_array_equal(self.pool[rows], blob[layer])

    def teardown(self) -> None:
        """Whatever was going on: once all is released and retired, nothing is held."""
        self.residency.upload.finish(10**6)
        self.write(10**6)
        for digest, users in self.users.items():
            for _ in range(users):
                self.residency.release(digest)
            self.residency.retire(digest)
        self.residency.pages.check(self.kv)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
