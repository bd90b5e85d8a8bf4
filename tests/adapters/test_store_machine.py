"""Any sequence of operations on a store, against a model that knows only names and seeds."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import MODEL, tensors, write
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from stores import BLOB, F32, PAGE, Stores, poll, version_of

from jslora.adapters.layout import pack
from jslora.adapters.peft import WEIGHTS, Limits, read_adapter
from jslora.adapters.registration import Registration
from jslora.adapters.store import AdapterStore
from jslora.errors import AdapterRejected, UnknownModel

SEEDS = range(5)
LABELS = st.sampled_from("pqr")
FOLDERS = st.sampled_from(["f0", "f1", "f2", "f3"])


def _contents(folder: Path) -> tuple[dict[str, int], dict[int, np.ndarray]]:
    """Digest → seed, and seed → packed numbers, of what the machine writes."""
    digests, blobs = {}, {}
    for seed in SEEDS:
        adapter = read_adapter(write(folder, weights=tensors(seed=seed)), MODEL, Limits())
        digests[adapter.digest] = seed
        blobs[seed] = pack(adapter, MODEL, PAGE, F32).blob
    return digests, blobs


class StoreMachine(RuleBasedStateMachine):
    """`seeds[registration]` is what it was bound to, or None while that is not decided."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("jslora.adapters.known.SETTLED_SECONDS", -60.0)
        self.folder = Path(tempfile.mkdtemp())
        self.digests, self.blobs = _contents(self.folder / "elsewhere")
        self.stores = Stores(self.folder)
        self.on_disk: dict[str, int | None] = {}
        self.store: AdapterStore = self.stores(host_cache_bytes=2 * BLOB)
        self.named: dict[str, Registration] = {}
        self.seeds: dict[Registration, int | None] = {}
        self.uses: dict[Registration, int] = {}
        self.dead: set[str] = set()
        self.clock = 0
        for number, seed in enumerate((0, 1, 2, 2)):
            self.write(f"f{number}", seed)

    # The disk ------------------------------------------------------------------------------------

    @rule(folder=FOLDERS, seed=st.sampled_from(SEEDS))
    def write(self, folder: str, seed: int) -> None:
        path = write(self.stores.root / folder, weights=tensors(seed=seed))
        self.clock += 1  # whatever the resolution of the file system's clock
        os.utime(path / WEIGHTS, (self.clock, self.clock))
        self.on_disk[folder] = seed

    @rule(folder=FOLDERS)
    def delete(self, folder: str) -> None:
        shutil.rmtree(self.stores.root / folder, ignore_errors=True)
        self.on_disk[folder] = None

    @rule(n=st.integers(0, 99), at=st.integers(0, 4000))
    def corrupt(self, n: int, at: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # evicted or dropped just now
            path = self._cached(n)
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 4
            path.write_bytes(data)

    @rule(n=st.integers(0, 99))
    def evict_from_disk(self, n: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._cached(n).unlink()

    def _cached(self, n: int) -> Path:
        files = [*self.stores.cache_folder.glob("*/*/[0-9a-f]*")]
        if not files:
            raise FileNotFoundError
        return sorted(files)[n % len(files)]

    # Names ---------------------------------------------------------------------------------------

    @rule(label=LABELS, folder=FOLDERS)
    def register(self, label: str, folder: str) -> None:
        if label in self.named or self.on_disk[folder] is None:
            with pytest.raises(AdapterRejected):
                self.store.register(label, folder)
            return
        registration = self.store.register(label, folder)
        assert self.store.get(label) is registration
        self._enter(label, registration, None)
        self._decide(registration)
        assert self.seeds[registration] in (None, self.on_disk[folder])

    @rule(label=LABELS, folder=FOLDERS, replace=st.booleans())
    def load(self, label: str, folder: str, replace: bool) -> None:
        future = self.store.load(label, folder, replace)
        if self.on_disk[folder] is None or (label in self.named and not replace):
            assert isinstance(future.exception(60), AdapterRejected)
            assert self.store.get(label) is self.named.get(label)
            return
        registration = future.result(60)
        assert registration.version is not None
        assert self.digests[registration.version.digest] == self.on_disk[folder]
        self._enter(label, registration, self.on_disk[folder])

    def _enter(self, label: str, registration: Registration, seed: int | None) -> None:
        self.named[label] = registration
        self.seeds[registration] = seed
        self.uses[registration] = 0

    def _decide(self, registration: Registration) -> None:
        """A version, once it is known, is one that was written, and stays."""
        if registration.version is None:
            return
        seed = self.digests[registration.version.digest]
        if self.seeds[registration] is None:
            self.seeds[registration] = seed
        assert self.seeds[registration] == seed

    @rule(label=LABELS)
    def unload(self, label: str) -> None:
        if label in self.named:
            assert self.store.unload(label) is self.named.pop(label)
        else:
            with pytest.raises(UnknownModel):
                self.store.unload(label)

    # Sequences -----------------------------------------------------------------------------------

    @rule(target=held, label=LABELS)
    def bind(self, label: str) -> Registration | None:
        if label not in self.named:
            with pytest.raises(UnknownModel):
                self.store.bind(label)
            return None
        registration = self.store.bind(label)
        assert registration is self.named[label]
        self.uses[registration] += 1
        return registration

    @rule(registration=held)
    def release(self, registration: Registration | None) -> None:
        if registration and self.uses[registration]:
            self.store.release(registration)
            self.uses[registration] -= 1

    @rule(registration=held)
    def prefetch(self, registration: Registration | None) -> None:
        if registration and self.uses[registration]:
            self.store.prefetch(registration)

    @rule(registration=held)
    def use(self, registration: Registration | None) -> None:
        """The numbers are those it is bound to; or it is refused because its folder changed."""
        if registration is None or not self.uses[registration]:
            return
        try:
            self._check_blob(registration)
        except AdapterRejected:  # perhaps of a prefetch before the folder was put right
            try:
                self._check_blob(registration)
            except AdapterRejected as error:
                assert not self._on_disk(registration), error.message

    def _check_blob(self, registration: Registration) -> None:
        version = version_of(self.store, registration)
        self._decide(registration)
        blob = poll(lambda: self.store.blob(version))
        seed = self.seeds[registration]
        assert seed is not None
        np.testing.assert_array_equal(blob, self.blobs[seed])

    def _on_disk(self, registration: Registration) -> bool:
        """Whether its own folder has what it needs."""
        now = self.on_disk[registration.source.folder.name]
        return now is not None and self.seeds[registration] in (None, now)

    # What always holds ---------------------------------------------------------------------------

    @rule()
    def ask_for_the_dead(self) -> None:
        dead = set(self.store.take_dead())
        assert dead <= self.digests.keys() and not dead & self._held()

    def _held(self) -> set[str]:
        """Digests of what is named or in use."""
        named = set(self.named.values())
        found = [r for r in self.seeds if (r in named or self.uses[r]) and r.version]
        return {r.version.digest for r in found if r.version}

    @invariant()
    def names_uses_and_bytes_agree(self) -> None:
        assert self.store.names() == sorted(self.named)
        for registration, uses in self.uses.items():
            assert registration.uses == uses
            assert registration.named == (self.named.get(registration.name) is registration)
            self._decide(registration)
        infos = self.store.infos()
        shown = sorted((i.name, i.in_flight) for i in infos if i.state not in ("failed", "loading"))
        held = [r for r, n in self.uses.items() if n or r in self.named.values()]
        failed = {i.name for i in infos if i.state in ("failed", "loading")}
        assert {*shown} <= {(r.name, r.uses) for r in held}
        assert {r.name for r in held} <= {name for name, _ in shown} | failed
        stats = self.store.stats
        assert stats.host_bytes == stats.host_count * BLOB <= 2 * BLOB
        in_host = {i.digest for i in infos if i.bytes_host}
        assert in_host <= self._held()

    def teardown(self) -> None:
        """Nothing is left once nothing is held."""
        for registration, uses in self.uses.items():
            for _ in range(uses):
                self.store.release(registration)
        for label in list(self.named):
            self.store.unload(label)
        self.store.close()
        assert (self.store.stats.host_bytes, self.store.stats.host_count) == (0, 0)
        assert {i.state for i in self.store.infos()} <= {"failed"}
        assert not any(self.store.holds(digest) for digest in self.digests)
        assert self.store.get("p") is None and self.store.registered() == {}
        shutil.rmtree(self.folder)
        self.patch.undo()


StoreMachine.TestCase.settings = settings(
    deadline=None,
    max_examples=40,
    stateful_step_count=40,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


class TestStore(StoreMachine.TestCase):
    """Run by pytest."""
