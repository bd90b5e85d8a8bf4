"""The starvation watch: who has waited longest for a first token, by tenant and by adapter.

Made from lists of sequences, so any thread may look. Host only: no jax.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from jslora.request import TenantStats
from jslora.schedule.sequence import Sequence

LISTED = 16
"""Adapters that are told of, those first whose requests wait longest."""


def adapters(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Names of the adapters that sequences ask for, sorted."""
    return tuple(sorted({adapter.name for s in sequences for adapter in s.request.adapters}))


def oldest(waiting: Iterable[Sequence], now: float) -> tuple[tuple[str, float], ...]:
    """(adapters, their longest wait in seconds) of those `LISTED`; see `Request.label`."""
    waits: defaultdict[str, float] = defaultdict(float)
    for sequence in waiting:
        name = sequence.request.label
        waits[name] = max(waits[name], _wait(sequence, now))
    return tuple(sorted(waits.items(), key=lambda item: (-item[1], item[0]))[:LISTED])


def tenants(
    running: Seq[Sequence], waiting: Seq[Sequence], service: Mapping[str, float], now: float
) -> dict[str, TenantStats]:
    """What each tenant has and was given; `service` has an entry for each of them."""
    runs = Counter(sequence.request.tenant for sequence in running)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    for sequence in waiting:
        waits[sequence.request.tenant].append(_wait(sequence, now))
    return {
        name: TenantStats(
            running=runs[name], waiting=len(waits[name]),
            oldest_wait=max(waits[name], default=0.0), service=served,
        )
        for name, served in service.items()
    }  # fmt: skip


def _wait(sequence: Sequence, now: float) -> float:
    """Seconds; nobody who was preempted after a first token still waits for it."""
    return 0.0 if sequence.generated else max(0.0, now - sequence.since)
