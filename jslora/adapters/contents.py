"""What registrations hold, by digest, and how it comes to memory: from the cache, or its folder.

Contents get their digest, and so a version, when they are first read whole; registrations with
equal contents share them. A blob lies in the host tier, comes back from the cache, or else from a
folder that must have its digest still; so an old version outlives its folder. What nothing holds
any more leaves the host tier at once. No public method touches a file or waits. Host only: no jax.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jslora.adapters.cache import PackedCache
from jslora.adapters.host import HostTier
from jslora.adapters.jobs import Jobs, Task, public
from jslora.adapters.reader import Reader, Whole
from jslora.adapters.registration import Registration
from jslora.adapters.version import Version
from jslora.errors import AdapterRejected


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Gauges of the host tier; seconds by stage and failures since the start."""

    host_bytes: int
    host_count: int
    seconds: dict[str, float]
    failures: int


@dataclass(slots=True)
class _Held:
    """A version, who holds it, and seconds by stage of its last load."""

    version: Version
    holders: set[Registration] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)


class Contents:
    """The lower half of an `AdapterStore`; names are the upper."""

    def __init__(self, reader: Reader, cache: PackedCache, host_cache_bytes: int) -> None:
        self._reader, self._cache = reader, cache
        self._jobs = Jobs()
        self._lock = threading.Lock()
        # Below here everything is written under the lock, and registrations are.
        self._contents: dict[str, _Held] = {}  # by digest, of all that are held
        self._host = HostTier(host_cache_bytes)
        self._dead: set[str] = set()
        self._failures = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def resolve(self, registration: Registration) -> Version | None:
        """Its contents' version; None while they are being read whole for the first time.

        Raises:
            AdapterRejected: that failed, and this is told once; the next call reads again.
        """
        if registration.version is None:
            self._jobs.want(registration, partial(self._read_first, registration), long=True)
        return registration.version

    def blob(self, version: Version) -> Float[np.ndarray, "d L n E"] | None:
        """Its packed numbers; None while they are being fetched into memory.

        Raises:
            AdapterRejected: that failed, and this is told once; the next call fetches again.
        """
        with self._lock:
            blob = self._host.get(version.digest)
        if blob is None:
            self._jobs.want(version.digest, partial(self._fetch, version))
        return blob

    def prefetch(self, registration: Registration) -> None:
        """Start what `resolve` or `blob` would start."""
        version = registration.version
        if version is None:
            self._jobs.start(registration, partial(self._read_first, registration), long=True)
            return
        with self._lock:
            blob = self._host.get(version.digest)  # it is used again, so it leaves later
        if blob is None:
            self._jobs.start(version.digest, partial(self._fetch, version))

    def _read_first(self, registration: Registration) -> None:
        if not registration.held or registration.version is not None:
            return
        source = registration.source
        with self._failing(registration):
            found = self._reader.whole(source.folder, source.root, source.storage)
            if not found.outline.same_as(source.outline):
                raise _changed(registration.name)
        with self._lock:
            if registration.held:
                self._hold(registration, found.version)
                self._keep(found.version.digest, found.blob, found.seconds)

    def _fetch(self, version: Version) -> Task | None:
        """Load a blob from the cache; otherwise it is read from its folder, which may take long."""
        with self._lock:
            if version.digest not in self._contents or version.digest in self._host:
                return None
        began = time.monotonic()
        blob = self._cache.load(version.digest, version.n_pages)
        if blob is None:
            return partial(self._read_again, version)
        if not self._reader.hosts.agreed(version.digest):
            self._agree(version.digest)
        self._arrived(version.digest, blob, {"map": time.monotonic() - began})
        return None

    def _agree(self, digest: str) -> None:
        """Let the other hosts read a folder of these contents, which are in the cache here."""
        with self._lock:
            contents = self._contents.get(digest)
            holders = list(contents.holders) if contents else []
        with self._failing(*holders):
            for holder in holders[:1]:
                source = holder.source
                self._reader.hosts.ask(source.folder, source.root, source.storage)(digest)

    def _read_again(self, version: Version) -> None:
        with self._lock:
            contents = self._contents.get(version.digest)
            holders = list(contents.holders) if contents else []
        if not holders:
            return
        with self._failing(*holders):
            found = self._read_one_of(holders, version.digest)
        self._arrived(version.digest, found.blob, found.seconds)

    def _read_one_of(self, holders: Sequence[Registration], digest: str) -> Whole:
        """Read a folder that still has the contents its registration had."""
        errors = []
        for holder in holders:
            try:
                source = holder.source
                found = self._reader.whole(source.folder, source.root, source.storage)
                if found.version.digest == digest:
                    return found
                errors.append(_changed(holder.name))
            except AdapterRejected as error:
                errors.append(error)
        raise errors[0]

    def _arrived(self, digest: str, blob: np.ndarray, seconds: dict[str, float]) -> None:
        with self._lock:
            if digest in self._contents:
                self._keep(digest, blob, seconds)

    @contextlib.contextmanager
    def _failing(self, *holders: Registration) -> Iterator[None]:
        """Note on registrations that their contents could not be had."""
        try:
            yield
        except BaseException as error:
            self._note(holders, public(error))
            raise

    def _note(self, holders: Sequence[Registration], message: str) -> None:
        with self._lock:
            self._failures += 1
            for holder in holders:
                holder.error = message

    def holds(self, digest: str) -> bool:
        """Whether a name or a sequence has these contents."""
        return digest in self._contents

    def take_dead(self) -> list[str]:
        """Digests that nothing holds any more; each is told once for each time it died."""
        with self._lock:
            dead = [digest for digest in self._dead if digest not in self._contents]
            self._dead.clear()
        for digest in dead:
            self._reader.hosts.forget(digest)
        return dead

    def note_seconds(self, digest: str, stage: str, seconds: float) -> None:
        """What a stage took that succeeded after the blob was handed out."""
        with self._lock:
            self._seconds[stage] += seconds
            contents = self._contents.get(digest)
            if contents is not None:
                contents.seconds[stage] = seconds
                for holder in contents.holders:
                    holder.error = None

    def note_failure(self, digest: str, message: str) -> None:
        """Contents could not be brought further, for a reason that may be told."""
        with self._lock:
            contents = self._contents.get(digest)
            holders = list(contents.holders) if contents else []
        self._note(holders, message)

    @property
    def stats(self) -> StoreStats:
        """Gauges and counters."""
        with self._lock:
            return StoreStats(
                self._host.bytes, len(self._host), dict(self._seconds), self._failures
            )

    def _at_hand(self, folder: Path, root: Path, storage: str) -> Whole | None:
        """What was read of a folder before, if its blob is at hand still; opens files."""
        began = time.monotonic()
        found = self._reader.remembered(folder, storage)
        if found is None or found.version is None:
            return None
        with self._lock:
            blob = self._host.get(found.version.digest)
        if blob is None:
            blob = self._cache.load(found.version.digest, found.version.n_pages)
        if blob is None:
            return None
        self._reader.hosts.ask(folder, root, storage)(found.version.digest)
        seconds = {"map": time.monotonic() - began}
        return Whole(found.outline, found.layout, found.version, blob, seconds)

    # Under the lock ------------------------------------------------------------------------------

    def _hold(self, registration: Registration, version: Version) -> None:
        """A registration has these contents; those who share them share one `Version`."""
        contents = self._contents.setdefault(version.digest, _Held(version))
        contents.holders.add(registration)
        registration.version = contents.version

    def _keep(self, digest: str, blob: np.ndarray, seconds: dict[str, float]) -> None:
        """The blob of held contents has arrived."""
        contents = self._contents[digest]
        self._host.put(digest, blob)
        contents.seconds = dict(seconds)
        for stage, spent in seconds.items():
            self._seconds[stage] += spent
        for holder in contents.holders:
            holder.error = None

    def _let_go(self, registration: Registration) -> None:
        """Nothing holds it any more; nor its contents, unless another does."""
        self._jobs.forget(registration)
        if registration.version is None:
            return
        digest = registration.version.digest
        holders = self._contents[digest].holders
        holders.remove(registration)
        if not holders:
            del self._contents[digest]
            self._host.drop(digest)
            self._jobs.forget(digest)
            self._dead.add(digest)


def _changed(name: str) -> AdapterRejected:
    return AdapterRejected(f"adapter {name!r} changed on disk; load it again")
