"""The fuzzer finds nothing in the engine, and what it is for in engines that were spoilt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_engine
import pytest
from fuzz_world import World, Wrong

from jslora.adapters.host import HostTier
from jslora.memory.prefix import PrefixCache, root_key
from jslora.memory.residency import Residency
from jslora.schedule.running import Running
from jslora.schedule.scheduler import Scheduler
from jslora.schedule.sequence import Sequence

SEED = 1
QUICK = (4, 14)
"""Seeds that in little time make everything in `COUNTED` happen, together more than once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "world"


@pytest.fixture(scope="module")
def programs() -> dict[Any, Any]:
    """All engines here run the same programs."""
    return {}


def test_random_work_finds_nothing_wrong(folder: Path, programs: dict) -> None:
    world = World(folder, programs=programs)
    try:
        for seed in QUICK:
            fuzz_engine.run_seed(world, seed)
    finally:
        world.close()
    tally = world.tally
    wrong = (tally.wrong_tokens, tally.leaked_pages, tally.leaked_host_bytes, tally.ledger_errors)
    assert wrong == (0, 0, 0, 0)
    assert tally.tokens > 1000 and tally.cached_tokens > 1000
    assert all(tally.engine.values()), f"never happened: {tally.engine}"


Patch = pytest.MonkeyPatch


def keyed_by_name(patch: Patch) -> None:
    """The prefix cache takes one adapter for another that had its name."""
    keys = Sequence.keys

    def named(self: Sequence, *arguments: Any) -> list[bytes]:
        request = self.request
        root = root_key(request.label, request.tenant, request.cache_salt)
        self._keys = self._keys or [root]
        return keys(self, *arguments)

    patch.setattr(Sequence, "keys", named)


def keyed_without_scales(patch: Patch) -> None:
    """The prefix cache takes an adapter that does not show for one that does."""
    patch.setattr("jslora.schedule.sequence.weights_key", lambda digests, scales: "+".join(digests))


def weights_stay(patch: Patch) -> None:
    """What was unloaded stays on the device."""
    patch.setattr(Residency, "retire", lambda self, digest: None)


def keys_stay(patch: Patch) -> None:
    """What was computed with an adapter that was unloaded stays in the prefix cache."""
    patch.setattr(PrefixCache, "drop", lambda self, digest: None)


def blobs_stay(patch: Patch) -> None:
    """What was unloaded stays in the host tier."""
    patch.setattr(HostTier, "drop", lambda self, digest: None)


def stale_placements(patch: Patch) -> None:
    """An adapter that comes back is looked for where it was before."""
    acquire, known = Residency.acquire, {}

    def remembered(self: Residency, digest: str) -> Any:
        return known.setdefault((id(self), digest), acquire(self, digest))

    patch.setattr(Residency, "acquire", remembered)


def published_early(patch: Patch) -> None:
    """Pages are published when their step is dispatched, and stay so when it fails."""
    plan, planned = Scheduler.plan, Running.plan

    def planning(self: Scheduler) -> Any:
        self.rows.scheduler = self  # type: ignore[attr-defined]
        return plan(self)

    def publishing(self: Running, *arguments: Any) -> Any:
        made = planned(self, *arguments)
        for sequence, end in zip(made.sequences, made.rows.end, strict=True):
            known = min(int(end), len(sequence.tokens))
            self.scheduler._publish(sequence, known)  # type: ignore[attr-defined]
        return made

    patch.setattr(Scheduler, "plan", planning)
    patch.setattr(Running, "plan", publishing)
    patch.setattr(PrefixCache, "clear", lambda self: None)


def lost_count(patch: Patch) -> None:
    """A sequence's last page is released once too few."""
    release = PrefixCache.release
    patch.setattr(PrefixCache, "release", lambda self, pages: release(self, pages[:-1]))


def never_idle(patch: Patch) -> None:
    """An adapter is held once more than it is let go."""
    acquire = Residency.acquire

    def twice(self: Residency, digest: str) -> Any:
        found = acquire(self, digest)
        self.residents[digest].users += self.residents[digest].users == 3
        return found

    patch.setattr(Residency, "acquire", twice)


def bound_late(patch: Patch) -> None:
    """A request gets what its adapter's name means when it is queued, not when it was sent."""
    add = Scheduler.add

    def late(self: Scheduler, request: Any, registrations: Any) -> None:
        bound = []
        for adapter, registration in zip(request.adapters, registrations, strict=True):
            if self.store.get(adapter.name) is not None:
                self.store.release(registration)
                registration = self.store.bind(adapter.name)
            bound.append(registration)
        add(self, request, tuple(bound))

    patch.setattr(Scheduler, "add", late)


SPOILT = [
    keyed_by_name, keyed_without_scales, weights_stay, keys_stay, blobs_stay, stale_placements,
    published_early, lost_count, never_idle, bound_late,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_engine_is_found_out(
    folder: Path, programs: dict, spoil: Callable, monkeypatch: Patch
) -> None:
    spoil(monkeypatch)
    world = World(folder, patience=5, programs=programs)
    try:
        with pytest.raises(Wrong):
            for seed in range(SEED, SEED + 5):
                fuzz_engine.run_seed(world, seed)
    finally:
        world.close()
