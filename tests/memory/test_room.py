"""Who gives way for whom: by worth, never what is used, and for a run at the least cost."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import room_oracle
from fake_adapters import LAYERS, FakeUploads, make_blob, make_version
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache, next_keys
from jslora.memory.residency import Residency, Resident
from jslora.memory.room import Room
from jslora.memory.worth import Clock


def make_room(total: int) -> Room:
    pages, clock = PageAllocator(total), Clock()
    uploads = FakeUploads()
    residency = Residency(pages, clock, uploads, LAYERS, total, LAYERS * total, 8, now=lambda: 0.0)
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
    room.prefix.publish(next_keys(b"", [page], 1), [page], ())
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
    def look(*others: object) -> Iterator[Resident]:
        yield pytest.fail("there may be thousands")

    room = make_room(13)
    monkeypatch.setattr(Residency, "idle", look)
    assert room.take(4) == [12, 11, 10, 9] and room.take_run(4, spare=2) == [1, 2, 3, 4]


def test_cached_pages_worth_less_than_any_adapter_leave_without_a_look_at_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(*others: object) -> Iterator[Resident]:
        yield pytest.fail("there may be thousands")

    room = make_room(10)
    load(room, 1, room.pages.take_at(1, 2))
    set_worth(room, 9.0, 1.0)
    for page in (8, 9):
        cache(room, page, 0.0)
    monkeypatch.setattr(Residency, "idle", look)
    assert room.take(7) is not None and here(room) == ([1], [])


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


def test_the_time_that_all_have_seen_does_not_count_against_what_is_large() -> None:
    room = make_room(6)
    load(room, 1, room.pages.take_at(1, 3))
    use(room, 1, 100.0)
    set_worth(room, 0.9, 1.0)
    for page in (4, 5):
        cache(room, page, 100.5)
    assert room.take_run(2) == [1, 2] and here(room) == ([], [4, 5])


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
    clear = ~room.pages.used() | (room.prefix.since < np.inf)
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


def fill(room: Room, kind: str, number: int, n: int, now: float) -> None:
    """Let something have `n` pages, if they are free."""
    first = room.pages.free_run(n)
    match kind:
        case "cached" if room.pages.free:
            cache(room, int(np.flatnonzero(~room.pages.used())[-1]), now)
        case "running" if room.pages.free:
            room.pages.take(1)
        case "scattered" if room.pages.free >= n:
            pages = np.flatnonzero(~room.pages.used())[:: room.pages.free // n][:n]
            load(room, number, [room.pages.take_at(int(page), 1)[0] for page in pages])
            use(room, number, now)
        case "adapter" | "used" if first is not None:
            load(room, number, room.pages.take_at(first, n))
            use(room, number, now)
            if kind == "used":
                room.residency.acquire(f"{number:03}")


def settle(room: Room, run: bool, number: int, pages: list[int] | None) -> None:
    """Let what was taken be idle: an adapter, or cached pages."""
    if pages is None:
        return
    if run:
        load(room, number, pages)
    else:
        for page in pages:
            room.prefix.publish(next_keys(b"", [number, page], 2), [page], ())
        room.prefix.release(pages)


KINDS = st.sampled_from(["adapter", "adapter", "scattered", "used", "cached", "running"])
FILLS = st.lists(st.tuples(KINDS, st.integers(1, 6), st.floats(0, 5)), max_size=25)
WISHES = st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 4)), max_size=6)
SECONDS = st.floats(0, 3)


@settings(max_examples=300, deadline=None)
@given(st.integers(3, 40), FILLS, st.sets(st.integers(0, 24)), WISHES, SECONDS, SECONDS)
def test_what_is_given_up_is_what_looking_at_everything_finds(
    total: int, fills: list[tuple[str, int, float]], kept: set[int],
    wishes: list[tuple[bool, int, int]], adapter_page: float, cached_page: float,
) -> None:  # fmt: skip
    room, other = make_room(total), make_room(total)
    for each in (room, other):
        for number, (kind, n, now) in enumerate(fills):
            fill(each, kind, number, n, now)
        set_worth(each, adapter_page, cached_page)
    keep = {f"{number:03}" for number in kept}
    for number, (run, n, spare) in enumerate(wishes, start=100):
        if run:
            pages = room.take_run(n, keep, spare)
            expected = room_oracle.take_run(other, n, keep, spare, pages)
        else:
            pages, expected = room.take(n, keep), room_oracle.take(other, n, keep)
        assert pages == expected and here(room) == here(other)
        assert room.residency.clock == other.residency.clock
        assert room.residency.kind == other.residency.kind and room.prefix.kind == other.prefix.kind
        room.residency.check()
        room.prefix.check()
        for each in (room, other):
            settle(each, run, number, pages)
