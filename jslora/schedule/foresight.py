"""Whether there will be pages enough, to the end of all that runs, if one more sequence starts.

A row holds more with every token, so what is free now may be promised already. The end of an answer
is what `max_tokens` declares, or sooner, as the answers of its adapter so far suggest (`Lengths`);
where that was too short it is asked for again, and preemption is the safety net. Pages of adapters
that are used, pinned, or were brought for those who wait are not there for tokens. Pages of a
beginning that several rows share are counted once.
Host only: no jax.
"""

from dataclasses import dataclass, field

import numpy as np

from jslora.adapters.version import Version
from jslora.memory.room import Room
from jslora.request import Request
from jslora.schedule.ahead import Ahead
from jslora.schedule.lengths import Lengths
from jslora.schedule.reserve import Future
from jslora.schedule.running import Running
from jslora.schedule.sequence import Sequence

_OFTEN = 32
"""Tokens after which what is expected of a running sequence is looked up again."""


class Foresight:
    """What the pool, of pages of `page_size` tokens, will have to hold.

    Args:
        reserve: "declared", or the quantile of an adapter's answers that is expected.
    """

    def __init__(self, ahead: Ahead, room: Room, page_size: int, reserve: str | float) -> None:
        self.ahead, self.page_size, self._room = ahead, page_size, room
        self._lengths = None if isinstance(reserve, str) else Lengths(reserve)

    def expected(self, request: Request, drawn: int) -> int:
        """Tokens that an answer is expected to have, more than the `drawn` ones."""
        most = request.params.max_tokens
        if self._lengths is None or _told(request):
            return most
        return self._lengths.expected(request.label, min(drawn, most), most)

    def ended(self, sequence: Sequence, *, cut: bool) -> None:
        """Learn from an answer's end; `cut` if it would have been longer."""
        if self._lengths is not None and sequence.generated and not _told(sequence.request):
            self._lengths.ended(sequence.request.label, sequence.generated, cut=cut)

    def future(self, running: Running) -> Future:
        """What running sequences will come to hold."""
        slots = running.slots
        now = running.known[slots] + running.pending[slots]
        drawn = now - running.prompt[slots]
        due = (drawn >= running.expected[slots]) | (now % _OFTEN == 0)  # more may be known
        again = slots[due]
        asked = zip(running.at(again), drawn[due].tolist(), strict=True)
        running.expected[again] = [self.expected(s.request, done) for s, done in asked]
        left = np.maximum(running.expected[slots] - drawn, 0)
        return Future(now - running.given[slots] * self.page_size, left, self.page_size)

    def outlook(self, future: Future, running: Running) -> "Outlook":
        """The future of those that run, which joins nobody here, beside what else takes pages."""
        adapters, counted = self.ahead.held()
        spare = self._room.pages.total - 1 - adapters - self._given(running)
        return Outlook(self, future, spare, counted, len(running) > 0, future.most)

    def _given(self, running: Running) -> int:
        """Pages that rows were given by the prefix cache and that no row counts as its own."""
        pages, prefix, residency = self._room.pages, self._room.prefix, self._room.residency
        if not prefix.enabled:
            return 0
        own = int((running.held[running.slots] - running.given[running.slots]).sum())
        return max(0, pages.total - 1 - pages.free - prefix.idle - residency.pages_held - own)

    def shared(self, sequence: Sequence) -> int:
        """Leading pages of one that waits that are in use by others, and so cost it nothing."""
        if not (sequence.read and self._room.prefix.enabled and sequence.reuses):
            return 0
        most = (len(sequence.tokens) - 1) // self.page_size
        return self._room.prefix.in_use(sequence.keys(most, self.page_size))


@dataclass(slots=True)
class Outlook:
    """The future of the pool, from one step, to which sequences may be added one by one.

    Attributes:
        spare: pages that there are for tokens.
        counted: adapters whose pages are not among them, beside those in use.
        bounded: False if nothing runs; what is alone can always run.
        most: pages that the future, with all that were added, needs at most: the sum of all at
            their largest, until that does not fit.
    """

    _foresight: Foresight
    _future: Future
    spare: int
    counted: set[str]
    bounded: bool
    most: int
    _loose: list[tuple[int, int]] = field(default_factory=list)
    _own: bool = False  # whether the future is this one's to change

    def joins(self, sequence: Sequence) -> bool:
        """Whether one more, its adapters included, can run; if so it is counted from now on."""
        foresight = self._foresight
        own = sum(r.n_pages for r in sequence.registrations if not self._known(r.version))
        # More may be known by now.
        sequence.expected = foresight.expected(sequence.request, sequence.generated)
        held, left = len(sequence.tokens), max(sequence.expected - sequence.generated, 0)
        alone, room = -(-(held + left) // foresight.page_size), self.spare - own
        if self.bounded and self.most + alone > room:
            self._settle()
        if not self.bounded or self.most + alone <= room:
            self._loose.append((held, left))
            self.most += alone
        elif not self._joins(sequence, held, left, room):
            return False
        self.spare -= own
        self.counted.update(sequence.digests)
        self.bounded = True
        return True

    def _known(self, version: Version | None) -> bool:
        """Whether an adapter's pages are counted already."""
        if version is None:
            return False
        return version.digest in self.counted or self._foresight.ahead.used(version.digest)

    def _settle(self) -> None:
        """Know exactly what is needed at most."""
        if not self._own:
            self._future, self._own = self._future.copy(), True
        for row in self._loose:
            self._future.join(*row)
        self._loose.clear()
        self.most = self._future.peak

    def _joins(self, sequence: Sequence, held: int, left: int, most: int) -> bool:
        held -= self._foresight.shared(sequence) * self._foresight.page_size
        joined = self._future.join(held, left, most)
        self.most = self._future.peak
        return joined


def _told(request: Request) -> bool:
    """Whether the answer is exactly as long as `max_tokens` says."""
    params = request.params
    return params.ignore_eos and not params.stop and not params.stop_token_ids
