"""What a page is worth that nothing uses now: one measure for adapters and for cached KV.

GreedyDual-Size (Cao and Irani, 1997): worth = what the last victim was worth when the thing was
last used (its age) + seconds saved, a page, if it is used again. Old things fall behind because
every eviction raises the clock, and dear ones hold out longer. What a page saves is the time to
restore it times the chance that it is used again, measured for each kind: of the times its things
lay idle, the share that ended in use and not in eviction. So pages that are never asked for again,
say of prompts that do not repeat, do not push out adapters that are, nor the other way round.
Host only: no jax.
"""

from dataclasses import dataclass, field

_SLOWNESS = 0.01  # weight of the newest observation
_TICK = 1e-9  # far less than anything saves


@dataclass(slots=True)
class Clock:
    """Worth of the last thing evicted; never falls."""

    now: float = 0.0

    def advance(self, worth: float) -> None:
        """Something of this worth was evicted."""
        self.now = max(self.now, worth)

    def tick(self) -> float:
        """The time of a use, later than all before, so that equals leave in order of use."""
        self.now += _TICK
        return self.now


@dataclass(slots=True)
class Kind:
    """What is known of one kind of idle things.

    Attributes:
        seconds: to restore one unit (a page of KV, a byte of an adapter).
        chance: share of idle times that ended in use.
    """

    seconds: float
    chance: float = 0.5
    _measured: bool = field(default=False)

    def reused(self) -> None:
        self.chance += _SLOWNESS * (1 - self.chance)

    def evicted(self) -> None:
        self.chance -= _SLOWNESS * self.chance

    def took(self, seconds: float) -> None:
        """Note how long restoring one unit took; the first measurement replaces the guess."""
        weight = 10 * _SLOWNESS if self._measured else 1.0
        self.seconds += weight * (seconds - self.seconds)
        self._measured = True

    @property
    def saved(self) -> float:
        """Seconds that keeping one unit is expected to save."""
        return self.chance * self.seconds
