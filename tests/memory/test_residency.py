"""Adapters on the device: whole before they are used, and no page lost whatever happens."""

import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from fake_adapters import (
    LAYERS,
    NUMBERS,
    FakeUploads,
    make_blob,
    make_version,
    page_mark,
)  # fmt: skip
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jslora.adapters.version import Version
from jslora.calls import Chunk
from jslora.memory.pages import PageAllocator
from jslora.memory.residency import Residency
from jslora.memory.worth import Clock

TOTAL = 20
DROP = LAYERS * TOTAL + 3
CHUNK = 4


def make_residency(total: int = TOTAL, chunk: int = CHUNK) -> Residency:
    beyond = DROP + LAYERS * (total - TOTAL)  # a row past the pool, whatever its size
    return Residency(PageAllocator(total), Clock(), FakeUploads(), LAYERS, total, beyond, chunk)


def bring(residency: Residency, version: Version) -> bool:
    """Start to bring an adapter if pages are free."""
    pages = residency.pages.take(version.n_pages)
    if pages is not None:
        residency.bring(version, make_blob(version), sorted(pages))
    return pages is not None


def load(residency: Residency, number: int, n_pages: int) -> None:
    """Bring an adapter to the device and let it be ready."""
    version = make_version(number, n_pages)
    assert bring(residency, version)
    residency.upload.finish(1000)
    residency.writes(1000, 0)
    assert residency.placement(version.digest) is not None


def here(residency: Residency) -> list[int]:
    return sorted(int(digest) for digest in residency.residents)


def test_an_adapter_is_ready_after_its_last_chunk_was_written() -> None:
    residency, version = make_residency(), make_version(1, 5)
    assert bring(residency, version)
    assert residency.loading and residency.placement("001") is None
    assert residency.writes(10, 0) == [], "nothing was transferred yet"
    residency.upload.finish(1)
    assert len(residency.writes(10, 0)) == 1
    assert residency.placement("001") is None
    residency.upload.finish(10)
    assert len(residency.writes(1, 0)) == 1, "at most as many as asked for"
    assert residency.placement("001") is None and residency.told == []
    assert len(residency.writes(10, 0)) == 1
    placement = residency.placement("001")
    assert placement is not None and placement.pages == (15, 16, 17, 18, 19)
    assert not residency.loading and residency.loads == 1
    [(told, seconds)] = residency.told
    assert told == version and set(seconds) == {"transfer", "write"}
    with pytest.raises(AssertionError, match="is here"):
        residency.bring(version, make_blob(version), [1, 2, 3, 4, 5])


def test_a_step_waits_for_a_transfer_that_is_about_to_be_done() -> None:
    residency = make_residency()
    assert bring(residency, make_version(1, 5))
    later = threading.Timer(0.05, residency.upload.finish, [1])
    later.start()
    assert len(residency.writes(10, 60.0)) == 1
    later.join()


def test_the_chunks_carry_every_page_to_its_row_in_every_layer() -> None:
    residency, version = make_residency(), make_version(3, 4)
    residency.pages.take_at(1, 7)
    residency.bring(version, make_blob(version), [1, 3, 5, 7])
    residency.upload.finish(1000)
    pool = np.zeros((LAYERS * TOTAL, NUMBERS), np.float32)
    for rows, data in residency.writes(1000, 0):
        assert rows.dtype == np.int32 and rows.shape == (CHUNK,) and data.shape == (CHUNK, NUMBERS)
        inside = rows < len(pool)
        assert (rows[~inside] == DROP).all()
        pool[rows[inside]] = data[inside]
    placement = residency.placement("003")
    assert placement is not None and placement.pages == (1, 3, 5, 7)
    for layer in range(LAYERS):
        for n, page in enumerate(placement.pages):
            assert pool[layer * TOTAL + page].tolist() == page_mark(3, layer, n)
    assert np.count_nonzero(pool.any(axis=1)) == LAYERS * 4


def test_pages_are_not_lost_when_an_upload_cannot_be_started() -> None:
    residency = make_residency()

    def upload(chunk: Chunk) -> Future:
        raise RuntimeError("no thread")

    residency.upload = upload
    with pytest.raises(RuntimeError):
        bring(residency, make_version(1, 5))
    assert not residency.residents
    residency.pages.check([])


def test_a_transfer_that_fails_takes_its_adapter_away_and_nothing_else() -> None:
    residency = make_residency()
    for number in (1, 2):
        assert bring(residency, make_version(number, 5))
    residency.upload.finish(1)
    residency.upload.open[0][0].set_exception(error := RuntimeError("the link is down"))
    residency.upload.open.popleft()
    residency.upload.finish(1000)
    chunks = residency.writes(1000, 0)
    assert here(residency) == [2] and residency.placement("002") is not None
    assert len(chunks) == 1 + 3, "what was written of it is never read"
    assert residency.told[0] == (make_version(1, 5), error)
    residency.pages.check([residency.residents["002"].placement.pages])
    load(residency, 1, 5)


def test_a_lost_pool_leaves_nothing() -> None:
    residency = make_residency()
    load(residency, 1, 4)
    assert bring(residency, make_version(2, 4))  # loading
    residency.forget_all()
    assert here(residency) == [] and residency.writes(10, 0) == []
    residency.pages.check([])


def test_what_is_in_use_loading_or_to_be_kept_is_not_idle() -> None:
    residency = make_residency()
    for number in (1, 2, 3):
        load(residency, number, 3)
    residency.acquire("001")
    assert bring(residency, make_version(5, 3))  # loading
    assert [r.version.digest for r in residency.idle({"003"})] == ["002"]
    with pytest.raises(AssertionError, match="is in use"):
        residency.evict(residency.residents["005"])
    residency.release("001")
    assert sorted(r.version.digest for r in residency.idle(())) == ["001", "002", "003"]


def test_those_used_longest_ago_are_worth_least() -> None:
    residency = make_residency()
    for number in (1, 2, 3):
        load(residency, number, 3)
    for digest, now in (("001", 1.0), ("002", 3.0), ("003", 2.0)):
        residency.clock.advance(now)
        residency.acquire(digest)
        residency.release(digest)
    assert [r.version.digest for r in residency.idle(())] == ["001", "002", "003"]
    residency.clock.advance(9.0)
    residency.acquire("001")
    residency.release("001")
    assert [r.version.digest for r in residency.idle(())] == ["002", "003", "001"]
    before = residency.kind.chance
    residency.evict(residency.residents["002"])
    assert here(residency) == [1, 3] and residency.evictions == 1
    assert residency.kind.chance < before and 9.0 <= residency.clock.now < 9.1


def test_adapters_are_idle_since_they_were_written_or_last_used() -> None:
    residency = make_residency(30)
    for number in (1, 2):
        load(residency, number, 3)
    for number in (3, 4):  # the transfers of 3 are done first
        assert bring(residency, make_version(number, 3))
    residency.acquire("001")
    residency.acquire("001")
    residency.release("001")
    residency.upload.finish(1000)
    residency.writes(1000, 0)
    residency.release("001")
    assert [r.version.digest for r in residency.idle(())] == ["002", "003", "004", "001"]
    assert [r.version.digest for r in residency.idle({"003"})] == ["002", "004", "001"]


def test_a_run_knows_how_far_each_of_its_pages_is_from_its_ends() -> None:
    residency = make_residency()
    residency.pages.take_at(2, 3)
    residency.bring(make_version(1, 3), make_blob(make_version(1, 3)), [2, 3, 4])
    assert residency.before[1:6].tolist() == [0, 0, 1, 2, 0]
    assert residency.after[1:6].tolist() == [0, 2, 1, 0, 0]
    residency.pages.take_at(6, 1)
    residency.pages.take_at(8, 1)
    residency.bring(make_version(2, 2), make_blob(make_version(2, 2)), [6, 8])
    assert not residency.before[5:].any() and not residency.after[5:].any(), "it is no run"
    assert [r.version.digest for r in residency.among(range(4, 9))] == ["001", "002"]
    assert residency.among(range(9, 12)) == []
    residency.forget_all()
    assert not residency.before.any() and not residency.after.any()
    residency.check()


def test_pages_of_all_adapters_hold_as_much() -> None:
    residency = make_residency()
    load(residency, 1, 3)
    other = replace(make_version(2, 3), packed_bytes=7 * 3)
    with pytest.raises(AssertionError, match="7 bytes in a page"):
        bring(residency, other)


def test_an_adapter_is_fresh_until_it_was_used() -> None:
    residency = make_residency()
    load(residency, 1, 3)
    assert residency.fresh == {"001"}
    before = residency.kind.chance
    residency.acquire("001")
    assert not residency.fresh
    assert residency.kind.chance == before, "its first use is what it came for"
    residency.release("001")
    residency.acquire("001")
    assert residency.kind.chance > before


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
    assert bring(residency, make_version(1, 4))
    residency.retire("001")
    assert here(residency) == [1], "its transfers still come"
    residency.upload.finish(100)
    residency.writes(1, 0)
    assert here(residency) == [1]
    residency.writes(100, 0)
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
        return [v.digest for v in self.versions if self.residency.placement(v.digest)]

    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.versions))
        if version.digest not in self.residency.residents:
            bring(self.residency, version)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        idle = list(self.residency.idle(()))
        assert all(not self.users[resident.version.digest] for resident in idle)
        if idle:
            self.residency.evict(data.draw(st.sampled_from(idle)))

    @precondition(lambda self: self.residency.upload.open)
    @rule()
    def fail(self) -> None:
        self.residency.upload.open.popleft()[0].set_exception(RuntimeError("the link is down"))

    @rule(n=st.integers(1, 8))
    def take_for_kv(self, n: int) -> None:
        pages = self.residency.pages.take(n)
        if pages is not None:
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
        chunks = self.residency.writes(limit, 0)
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
        self.residency.check()
        residents = self.residency.residents.values()
        self.residency.pages.check([*self.kv, *(r.placement.pages for r in residents)])

    @invariant()
    def who_is_used_is_here_whole(self) -> None:
        for version in self.versions:
            placement = self.residency.placement(version.digest)
            assert placement or not self.users[version.digest]
            if placement:
                [blob] = make_blob(version)
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
