"""Who gives way for whom: by worth, never what is used, and for a run at the least cost."""

from itertools import pairwise

import numpy as np
import pytest
from fake_adapters import LAYERS, FakeUploads, make_blob, make_version
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache, next_key
from jslora.memory.residency import Residency
from jslora.memory.room import Room
from jslora.memory.worth import Clock


def make_room(total: int) -> Room:
    pages, clock = PageAllocator(total), Clock()
    uploads = FakeUploads()
    residency = Residency(pages, clock, uploads, LAYERS, total, LAYERS * total, 8)
    return Room(pages, PrefixCache(pages, clock), residency)


def load(room: Room, number: int, pages: list[int]) -> None:
    """Let an adapter be ready in pages taken for it."""
    version = make_version(number, len(pages))
    room.residency.bring(version, make_blob(version), pages)
    room.residency.upload.finish(1000)
    room.residency.writes(1000, 0)


def use(room: Room, number: int, now: float) -> None:
    room.residency.clock.advance(now)
    room.residency.acquire(f"{number:03}")
    room.residency.release(f"{number:03}")


def cache(room: Room, page: int, now: float) -> None:
    """Let a free page hold something that may be asked for again."""
    room.residency.clock.advance(now)
    assert room.pages.take_at(page, 1) == [page]
    room.prefix.publish(next_key(b"", [page]), page, "")
    room.prefix.release([page])


def here(room: Room) -> tuple[list[int], list[int]]:
    """Adapters on the device and cached pages."""
    cached = sorted(page for held in room.prefix.held() for page in held)
    return sorted(int(digest) for digest in room.residency.residents), cached


def set_worth(room: Room, adapter_page: float, cached_page: float) -> None:
    """Seconds that keeping a page is expected to save."""
    per_byte = LAYERS * 16  # bytes of a page of the fake adapters, all layers
    room.residency.kind.seconds, room.residency.kind.chance = adapter_page / per_byte, 1.0
    room.prefix.kind.seconds, room.prefix.kind.chance = cached_page, 1.0


@pytest.mark.parametrize(
    ("adapter_page", "cached_page", "left"),
    [(1.0, 9.0, ([], [8, 9])), (9.0, 1.0, ([1], [])), (9.0, 8.0, ([1], []))],
)
def test_the_kind_that_is_cheaper_to_restore_gives_way(
    adapter_page: float, cached_page: float, left: tuple[list[int], list[int]]
) -> None:
    room = make_room(10)
    load(room, 1, room.pages.take_at(1, 2))
    use(room, 1, 1.0)
    set_worth(room, adapter_page, cached_page)
    for page in (8, 9):
        cache(room, page, 1.0)
    assert room.take(7) is not None
    assert here(room) == left


@pytest.mark.parametrize(("now", "left"), [(3.0, ([1], [9])), (4.5, ([], [8, 9]))])
def test_old_things_give_way_to_cheaper_ones_in_the_end(
    now: float, left: tuple[list[int], list[int]]
) -> None:
    """An adapter page used at 0 that saves 5 s, against cached ones that save 1 s."""
    room = make_room(10)
    load(room, 1, room.pages.take_at(1, 2))
    for page in (8, 9):
        cache(room, page, now)
    set_worth(room, 5.0, 1.0)
    assert room.take(6) is not None
    assert here(room) == left


def test_what_is_kept_used_or_on_its_way_is_not_given_up() -> None:
    room = make_room(13)
    for number, first in ((1, 1), (2, 4), (3, 7)):
        load(room, number, room.pages.take_at(first, 3))
    room.residency.acquire("001")
    version = make_version(4, 3)
    room.residency.bring(version, make_blob(version), room.pages.take_at(10, 3))
    assert room.take(4, {"003"}) is None and room.take_run(4, {"003"}) is None
    assert here(room)[0] == [1, 2, 3, 4], "nothing is given up in vain"
    assert room.take_run(3, {"003"}) == [4, 5, 6]


def test_free_pages_are_taken_without_a_look_at_what_else_could_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = make_room(13)
    monkeypatch.setattr(Residency, "idle", lambda *others: pytest.fail("there may be thousands"))
    assert room.take(4) == [12, 11, 10, 9] and room.take_run(4, spare=2) == [1, 2, 3, 4]


def test_pages_to_spare_are_kept_in_reach() -> None:
    room = make_room(10)
    cache(room, 9, 0.0)
    assert room.take_run(6, spare=4) is None
    assert room.take_run(6, spare=3) == [1, 2, 3, 4, 5, 6]


def test_a_run_is_cleared_where_that_costs_least() -> None:
    room = make_room(13)
    for number, first in ((1, 1), (2, 4), (3, 7)):
        load(room, number, room.pages.take_at(first, 3))
        use(room, number, float(number))
    set_worth(room, 1.0, 3.0)
    for page in (10, 12):
        cache(room, page, 4.0)
    assert room.take(1) == [11]
    assert room.take_run(3) == [1, 2, 3] and here(room) == ([2, 3], [10, 12])


def test_two_adapters_are_not_cut_where_one_would_do() -> None:
    room = make_room(10)
    for number, first in ((1, 1), (2, 4), (3, 7)):
        load(room, number, room.pages.take_at(first, 3))
        use(room, number, 5.0)
    assert room.take_run(3) is not None
    assert len(here(room)[0]) == 2


def test_scattered_pages_are_given_where_no_run_can_be_cleared() -> None:
    room = make_room(10)
    for page in (2, 5, 8):
        room.pages.take_at(page, 1)
    cache(room, 1, 0.0)
    pages = room.take_run(4)
    assert pages is not None and len(set(pages)) == 4
    assert any(b != a + 1 for a, b in pairwise(pages))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_wish_is_met_whole_or_nothing_is_given_up(data: st.DataObject) -> None:
    total = data.draw(st.integers(3, 30))
    room, running = make_room(total), []
    keep = set()
    for number in range(data.draw(st.integers(0, 12))):
        now = data.draw(st.floats(0, 5))
        n = data.draw(st.integers(1, 6))
        first = room.pages.free_run(n)
        match data.draw(st.sampled_from(["adapter", "used", "cached", "running"])):
            case "cached" if room.pages.free:
                cache(room, int(np.flatnonzero(~room.pages.used())[-1]), now)
            case "running" if room.pages.free >= n:
                running.append(room.pages.take(n))
            case kind if first is not None:
                load(room, number, room.pages.take_at(first, n))
                use(room, number, now)
                if kind == "used":
                    room.residency.acquire(f"{number:03}")
                elif data.draw(st.booleans()):
                    keep.add(f"{number:03}")
    set_worth(room, data.draw(st.floats(0, 3)), data.draw(st.floats(0, 3)))
    idle = [r for d, r in room.residency.residents.items() if not r.users and d not in keep]
    reach = room.pages.free + room.prefix.idle + sum(len(r.placement.pages) for r in idle)
    before, run = here(room), data.draw(st.booleans())
    n, spare = data.draw(st.integers(1, total)), data.draw(st.integers(0, 4)) if run else 0
    clear = ~room.pages.used() | ~np.isnan(room.prefix.since)
    clear[[page for r in idle for page in r.placement.pages]] = True
    pages = room.take_run(n, keep, spare) if run else room.take(n, keep)
    if n + spare > reach:
        assert pages is None and here(room) == before
    else:
        assert pages is not None and len(set(pages)) == n
        running.append(pages)
        windows = np.lib.stride_tricks.sliding_window_view(clear, n).all(axis=1)
        if run and windows.any():
            assert all(b == a + 1 for a, b in pairwise(pages)), "a run could have been cleared"
        assert keep <= room.residency.residents.keys()
    held = [r.placement.pages for r in room.residency.residents.values()]
    room.pages.check([*running, *held, *room.prefix.held()])
    room.prefix.check()
