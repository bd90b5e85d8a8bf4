"""Time that passes when it is told to: a clock, what happens at which of its moments, and links.

Events happen in order of time, those of one moment in the order in which they were set, and each
sees the clock at its own time, so a simulation is the same whenever and wherever it runs. Nothing
here reads a real clock or starts a thread. Host only: no jax.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

from jslora.calls import Chunk


class Timeline:
    """A clock and what is going to happen.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        """The time, as `time.monotonic` tells it."""
        return self.now

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen, at once if its time is over."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), event))

    @property
    def next(self) -> float:
        """When the next thing happens; infinite if nothing will."""
        return self._events[0][0] if self._events else math.inf

    def advance(self, to: float) -> None:
        """Let everything happen until a time, which it then is."""
        while self._events and self._events[0][0] <= to:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = max(self.now, to)


class Link:
    """What carries things one after the other: each sets out when the one before it is through."""

    def __init__(self, timeline: Timeline, bandwidth: float, latency: float = 0.0) -> None:
        self._timeline, self._bandwidth, self._latency = timeline, bandwidth, latency
        self._free = 0.0

    def send(self, size: float) -> float:
        """When so many bytes that set out now are through."""
        begins = max(self._timeline.now, self._free)
        self._free = begins + self._latency + size / self._bandwidth
        return self._free


class Uploads:
    """Transfers to the device, as `Residency` wants them: futures that are done at their time.

    Attributes:
        open: when each of those on their way will be done, in order.
        done: transfers that are done, until whoever takes them counts them off.
    """

    def __init__(self, timeline: Timeline, link: Link) -> None:
        self.open: deque[float] = deque()
        self.done = 0
        self._timeline, self._link = timeline, link

    def __call__(self, chunk: Chunk) -> "Future[int]":
        future: Future[int] = Future()
        self.open.append(self._link.send(chunk.data.nbytes))
        self._timeline.at(self.open[-1], lambda: self._finish(future, chunk.data.nbytes))
        return future

    def _finish(self, future: "Future[int]", size: int) -> None:
        self.open.popleft()
        self.done += 1
        future.set_result(size)


class Worker(ThreadPoolExecutor):
    """One thread that reads by a link: a job is done when what it reads of is through.

    Args:
        size: bytes that the job of a key reads.
    """

    def __init__(self, timeline: Timeline, link: Link, size: Callable[[Hashable], float]) -> None:
        super().__init__(1)  # starts no thread before its own `submit`
        self._timeline, self._link, self._size = timeline, link, size

    def submit(self, run: Any, /, key: Hashable, task: Any) -> "Future[Any]":  # type: ignore[override]
        """Run `run(key, task)` when the bytes of `key` are read."""
        done: Future[Any] = Future()
        self._timeline.at(self._link.send(self._size(key)), lambda: done.set_result(run(key, task)))
        return done
