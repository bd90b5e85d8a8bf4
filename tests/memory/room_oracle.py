"""What a `Room` gives up, found the slow way: by looking at everything that is there."""

from collections.abc import Collection

import numpy as np

from jslora.memory.residency import Resident
from jslora.memory.room import Room

FEW = 1e-7  # seconds that giving up any page costs at least


def idle(room: Room, keep: Collection[str]) -> list[Resident]:
    """Adapters that may leave, those of least worth first."""
    found = [r for d, r in room.residency.residents.items() if not r.busy and d not in keep]
    return sorted(found, key=lambda resident: resident.since)


def cached(room: Room) -> list[int]:
    """Cached pages that nothing uses, those of least worth first."""
    pages = [page for held in room.prefix.held() for page in held]
    alone = [page for page in pages if room.pages.count([page])[0] == 1]
    return sorted(alone, key=lambda page: float(room.prefix.since[page]))


def within_reach(room: Room, n: int, keep: Collection[str]) -> bool:
    adapters = sum(len(resident.placement.pages) for resident in idle(room, keep))
    return room.pages.free + len(cached(room)) + adapters >= n


def take(room: Room, n: int, keep: Collection[str]) -> list[int] | None:
    """As `Room.take`."""
    if not within_reach(room, n, keep):
        return None
    given: list[int] = []  # cached pages, which are never free in between
    while room.pages.free + len(given) < n:
        pages, adapters = cached(room), idle(room, keep)
        page = room.prefix.worth(float(room.prefix.since[pages[0]])) if pages else np.inf
        adapter = room.residency.worth(adapters[0].since) if adapters else np.inf
        if page <= adapter:
            room.prefix.evict([pages[0]])
            given += room.pages.take_at(pages[0], 1)
        else:
            room.residency.evict(adapters[0])
    free = room.pages.take(n - len(given))
    return None if free is None else free + given


def free_run(room: Room, n: int) -> int | None:
    """First page of the lowest of the shortest gaps of at least `n` free pages."""
    gaps: list[tuple[int, int]] = []
    start = None
    for page in range(room.pages.total + 1):
        free = page < room.pages.total and page > 0 and room.pages.count([page])[0] == 0
        if free and start is None:
            start = page
        elif not free and start is not None:
            gaps.append((page - start, start))
            start = None
    return min((gap for gap in gaps if gap[0] >= n), default=(0, None))[1]


def costs(room: Room, n: int, keep: Collection[str]) -> dict[int, float]:
    """What clearing `n` pages costs by the first of them, where they can be cleared."""
    adapters, pages = idle(room, keep), cached(room)
    times = [r.since for r in adapters] + [float(room.prefix.since[page]) for page in pages]
    oldest = min(times, default=0.0)
    found = {}
    for first in range(1, room.pages.total - n + 1):
        window = set(range(first, first + n))
        clear = {page for page in window if room.pages.count([page])[0] == 0}
        cost = 0.0
        for page in window.intersection(pages):
            clear.add(page)
            cost += room.prefix.worth(float(room.prefix.since[page])) - oldest + FEW
        for resident in adapters:
            if cut := window.intersection(resident.placement.pages):
                clear |= cut
                lost = len(resident.placement.pages) if resident.placement.is_run else len(cut)
                cost += lost * (room.residency.worth(resident.since) - oldest + FEW)
        if clear == window:
            found[first] = cost
    return found


def take_run(
    room: Room, n: int, keep: Collection[str], spare: int, given: list[int] | None
) -> list[int] | None:
    """As `Room.take_run`; among places that cost the same, the one of `given`."""
    if not within_reach(room, n + spare, keep):
        return None
    first = free_run(room, n)
    if first is None:
        ways = costs(room, n, keep)
        if not ways:
            return take(room, n, keep)
        first = min(ways, key=lambda way: ways[way])
        if given is not None and abs(ways.get(given[0], np.inf) - ways[first]) < 1e-11:
            first = given[0]
        for resident in idle(room, keep):
            if set(range(first, first + n)).intersection(resident.placement.pages):
                room.residency.evict(resident)
        for page in sorted(set(range(first, first + n)).intersection(cached(room))):
            room.prefix.evict([page])
    return room.pages.take_at(first, n)
