"""How much of a step the device idles between kernels, read from the runtime's own profile.

Where kernels run from a captured graph, gaps are those inside it; where they are launched one by
one and the host is slow, they are its own.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

from jslora.gpu.timing import Call

Span = tuple[float, float]
"""Start and end of an event, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Kernels of a profile, per call, and seconds of it in which none ran."""

    kernels: float
    span: float
    busy: float
    idle: float


def profile(call: Call, calls: int) -> Gaps | None:
    """Profile some calls; None where the profile shows no kernels."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return measure(_kernels(files[-1]), calls) if files else None


def measure(spans: Iterable[Span], calls: int) -> Gaps | None:
    """Per call: kernels, time from the first's start to the last's end, and the gaps in it."""
    ordered = sorted(spans)
    if not ordered:
        return None
    busy, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - ordered[0][0]
    per = calls * 1e9
    return Gaps(len(ordered) / calls, span / per, busy / per, (span - busy) / per)


def _kernels(file: Path) -> list[Span]:
    """What ran on the first GPU's streams; derived lines repeat the same events."""
    data = jax.profiler.ProfileData.from_file(str(file))
    return [
        (event.start_ns, event.end_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU:0")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
