"""Early abort: who cannot be answered in time is told so at once, and costs nothing.

S-LoRA (section 4.3): with a reward that only falls with the time to the first token, it is best to
serve the newest of those who wait, as many as can be, and to give the others up. So a request ends
as soon as it could not get its first token by its deadline any more, and while more arrive than
start, by two moving averages, the newest go first; otherwise the oldest. How long a first token
takes once a request started is learned: the mean and a few mean deviations, as TCP's timer does
(Jacobson, 1988). Host only: no jax.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from jslora.schedule.queue import Rows, Waiting
from jslora.schedule.sequence import Sequence

_DEVIATIONS = 3.0
_MAX_RETRY = 60.0


@dataclass(slots=True)
class Rate:
    """Events a second, those of `memory` seconds ago counting 1/e of those now."""

    memory: float
    _value: float = 0.0
    _at: float = -math.inf

    def note(self, now: float) -> None:
        """One more."""
        self._value, self._at = self.value(now) + 1 / self.memory, now

    def value(self, now: float) -> float:
        """Events a second, as of now."""
        return self._value * math.exp(-(now - self._at) / self.memory) if self._value else 0.0


@dataclass(slots=True)
class Deadlines:
    """The policy "slo"; `memory` seconds are what its moving averages look back on."""

    memory: float
    _arrivals: Rate = field(init=False)
    _starts: Rate = field(init=False)
    _mean: float = 0.0
    _deviation: float = 0.0

    def __post_init__(self) -> None:
        self._arrivals, self._starts = Rate(self.memory), Rate(self.memory)

    def arrived(self, now: float) -> None:
        """A request came."""
        self._arrivals.note(now)

    def started(self, now: float) -> None:
        """One was chosen to run for the first time."""
        self._starts.note(now)

    def answered(self, seconds: float) -> None:
        """A first token came so long after its request started."""
        error = seconds - self._mean
        self._mean += error / 8 if self._mean else error
        self._deviation += (abs(error) - self._deviation) / 4

    def overloaded(self, now: float) -> bool:
        """Whether more arrive than start."""
        return self._arrivals.value(now) > self._starts.value(now)

    def score(self, waiting: Waiting, rows: Rows, now: float) -> np.ndarray:
        order = waiting.column("order")[rows]
        return -order if self.overloaded(now) else order

    def late(self, waiting: Waiting, now: float) -> list[Sequence]:
        """Who would get the first token too late if it started now.

        Nobody is given up in the first half of its time: a server that was slow once would
        otherwise never start anything again, and so never learn that it is not slow any more.
        """
        deadline, since = waiting.column("deadline"), waiting.column("since")
        lead = self._mean + _DEVIATIONS * self._deviation
        if deadline.min(initial=np.inf) >= now + lead:
            return []
        return waiting.at(deadline < now + np.minimum(lead, (deadline - since) / 2))

    def retry_after(self, waiting: Waiting, now: float) -> float:
        """Seconds in which those who wait now have started, or were given up; 1 to 60."""
        rate = self._starts.value(now)
        return min(max(1.0, len(waiting) / rate if rate else _MAX_RETRY), _MAX_RETRY)
