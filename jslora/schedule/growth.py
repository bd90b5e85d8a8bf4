"""Pages for sequences that start, and for those that run and grow: from whom they are taken.

Free pages first, then what lies idle, adapters that somebody waits for last. Where nothing is left
the youngest that runs must make way. Host only: no jax.
"""

from collections.abc import Set

import numpy as np

from jslora.memory.room import Room
from jslora.schedule.ahead import Ahead
from jslora.schedule.running import Running, Slots
from jslora.schedule.sequence import Sequence


class Growth:
    """Takes pages from the room for those that run, in pages of `page_size` tokens."""

    def __init__(self, room: Room, ahead: Ahead, running: Running, page_size: int) -> None:
        self._room, self._ahead, self._running = room, ahead, running
        self._page_size = page_size

    @property
    def moves(self) -> bool:
        """Whether a sequence or a transfer may yet free a page."""
        return len(self._running) > 0 or self._room.residency.loading

    def first(self, sequence: Sequence, need: int) -> list[int] | None:
        """`need` pages for a sequence that starts."""
        pages = self._room.pages.take(need)
        if pages is None:
            pages = self._room.take(need, self._ahead.kept() | {*sequence.digests})
        if pages is None and not self.moves:  # nothing else will ever free a page for it
            pages = self._room.take(need, sequence.digests)
        return pages

    def all(self, slots: Slots) -> bool:
        """Give each of some slots a page, if there are enough without hurting anybody."""
        pages = self._room.pages.take(len(slots))
        if pages is None:
            pages = self._room.take(len(slots), self._spared())
        if pages is not None:
            self._running.give(slots, pages)
        return pages is not None

    def grow(self, slot: int, tokens: int) -> bool:
        """Give a running sequence pages for so many tokens; False if it must wait for them."""
        need = -(-tokens // self._page_size) - int(self._running.held[slot])
        if need <= 0:
            return True
        more = self._room.pages.take(need)
        alone = len(self._running) == 1
        if more is None:
            more = self._room.take(need, self._spared())
        if more is None:
            more = self._room.take(need, () if alone else self._ahead.kept())
        if more is None:
            if not alone:  # else an adapter is on its way, and can leave when it is here
                self._make_way()
            return False
        self._running.extend(slot, more)
        return True

    def _spared(self) -> Set[str]:
        """Adapters that leave only if nothing else can: those waited for, and pinned ones."""
        waited_for, pinned = self._ahead.digests(), self._room.residency.pinned
        return waited_for | pinned if pinned else waited_for  # there may be thousands

    def _make_way(self) -> None:
        """Choose who will be preempted: the youngest, once its sampled token was read."""
        running, slots = self._running, self._running.slots
        if not running.hold[slots].any():
            running.hold[slots[np.argmax(running.order[slots])]] = True
