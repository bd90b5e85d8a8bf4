"""Adapters of those who wait, brought to the device ahead of their turn.

Whoever goes first keeps what it needs, its adapter and pages for its tokens, from those behind it;
the first whose adapter finds no room holds back the adapters of all others. Host only: no jax.

Invariant: an adapter that came for a waiting sequence stays until it was used, for as long as that
is among those in front, unless nothing else could move. Were it kept for whoever waits, adapters of
those that were passed over would fill the pool where the newest go first.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from collections.abc import Sequence as Seq

from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.adapters.version import Version
from jslora.errors import AdapterRejected
from jslora.memory.room import Room
from jslora.schedule.plan import Limits
from jslora.schedule.sequence import Sequence


class Ahead:
    """What those who wait need on the device.

    Args:
        loading: told of each load that begins, and of the sequence for which.

    Attributes:
        front: who goes first, when last looked at.
        short: the first sequence whose adapter found no room when last looked at.
    """

    def __init__(
        self, limits: Limits, room: Room, store: AdapterStore,
        loading: Callable[[Sequence, Version], None],
    ) -> None:  # fmt: skip
        self.front: Seq[Sequence] = ()
        self.short: Sequence | None = None
        self._limits, self._room, self._store, self._loading = limits, room, store, loading
        self._reading: set[Registration] = set()
        self._waiting: Counter[Registration] = Counter()
        self._unread: set[Registration] = set()
        self._read: dict[Registration, str] = {}  # digests of the others
        self._digests: Counter[str] = Counter()

    def add(self, registrations: Iterable[Registration]) -> None:
        """One more waits that is bound to these adapters."""
        for registration in registrations:
            if registration not in self._waiting:
                self._unread.add(registration)
            self._waiting[registration] += 1

    def remove(self, registrations: Iterable[Registration]) -> None:
        """One of them waits no more."""
        for registration in registrations:
            self._waiting[registration] -= 1
            if not self._waiting[registration]:
                del self._waiting[registration]
                self._unread.discard(registration)
                self._forget(self._read.pop(registration, None))

    def _forget(self, digest: str | None) -> None:
        """One registration less of those that wait has this digest."""
        if digest is not None:
            self._digests[digest] -= 1
            if not self._digests[digest]:
                del self._digests[digest]

    def digests(self) -> Set[str]:
        """Adapters that are waited for, as far as their contents are known; until that changes."""
        for registration in [r for r in self._unread if r.version is not None]:
            assert registration.version is not None
            digest = registration.version.digest
            self._unread.remove(registration)
            self._read[registration] = digest
            self._digests[digest] += 1
        return self._digests.keys()

    def kept(self) -> set[str]:
        """Adapters that came for those in front and were not used yet, and pinned ones."""
        residency = self._room.residency
        waiting = (s for s in self.front if s.slot is None and not s.finished)
        wanted = {digest for sequence in waiting for digest in sequence.digests}
        return (residency.fresh & wanted) | residency.pinned

    def held(self) -> tuple[int, set[str]]:
        """Pages of the adapters that are used or kept, and which of them are not used now."""
        residency, kept = self._room.residency, self.kept()
        unused = [r for d in kept if (r := residency.residents.get(d)) and not r.users]
        return residency.used + sum(len(r.placement.pages) for r in unused), kept

    def used(self, digest: str) -> bool:
        """Whether running sequences use an adapter."""
        resident = self._room.residency.residents.get(digest)
        return resident is not None and resident.users > 0

    def comes(self, sequence: Sequence) -> bool:
        """Whether its adapters are here, or were asked for."""
        return all(self._here(r) or r in self._reading for r in sequence.registrations)

    def _here(self, registration: Registration) -> bool:
        """Whether an adapter is on the device, or on its way there."""
        version = registration.version
        return version is not None and version.digest in self._room.residency.residents

    def complete(self, front: Seq[Sequence]) -> bool:
        """Whether the adapters of all of them are here, or on their way."""
        residents = self._room.residency.residents
        return all(s.read and all(map(residents.__contains__, s.digests)) for s in front)

    def fetch(
        self, front: Iterable[Sequence], moves: bool
    ) -> Iterator[tuple[Sequence, AdapterRejected]]:
        """Start to bring the adapters of those in front; yields whose cannot be had, and why.

        Args:
            front: who goes first, as far as there is room.
            moves: whether anything that runs or is on its way may yet free a page.
        """
        keep, spare = self.kept(), 0
        self._reading.clear()
        ahead: set[Registration] = set()
        for sequence in front:
            for registration in sequence.registrations:
                first = registration not in ahead
                if not self._here(registration):
                    ahead.add(registration)
                    if not self._fits_host(ahead):
                        return  # one would push the other out of host memory
                stuck = not moves and spare == 0
                try:
                    version = self._store.resolve(registration)
                    if version and not self._bring(version, sequence, keep, spare, stuck):
                        self.short = sequence
                        return
                except AdapterRejected as error:
                    yield sequence, error
                    break
                if version:
                    keep.add(version.digest)
                if not self._here(registration):
                    self._reading.add(registration)
                    spare += registration.n_pages if first else 0
            else:
                spare += self._limits.pages(len(sequence.tokens))

    def _fits_host(self, ahead: Collection[Registration]) -> bool:
        """Whether host memory holds all of these at once; one alone always fits."""
        return len(ahead) == 1 or self._store.fits_host(sum(r.n_pages for r in ahead))

    def _bring(
        self, version: Version, sequence: Sequence, keep: Collection[str], spare: int, stuck: bool
    ) -> bool:
        """Start to bring an adapter unless it is here; False if there is no room for it.

        Raises:
            AdapterRejected: its files could not be read again.
        """
        residency = self._room.residency
        residency.revive(version.digest)
        if version.digest in residency.residents:
            return True
        blob = self._store.blob(version)
        if blob is None:
            return True  # being read; asked for again in the next step
        pages = self._room.take_run(version.n_pages, keep, spare)
        if pages is None and stuck:
            pages = self._room.take_run(version.n_pages, sequence.digests)
        if pages is None:
            return False
        residency.bring(version, blob, pages)
        self._loading(sequence, version)
        return True

    def check(self, waiting: Iterable[Sequence]) -> None:
        """Assert that what is noted is of those that wait."""
        registrations = [r for sequence in waiting for r in sequence.registrations]
        assert self._waiting == Counter(registrations), "registrations that are waited for"
        known = {r.version.digest for r in registrations if r.version}
        assert self.digests() == known, f"digests {sorted(known ^ self.digests())[:10]}"
