"""What a section is given: somewhere to put records, and how much time is left."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Emit = Callable[[dict[str, Any]], None]


class Session:
    """One section's records and its share of the budget, in seconds."""

    def __init__(
        self, section: str, emit: Emit, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.section = section
        self._emit, self._clock = emit, clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def emit(self, kind: str, **fields: Any) -> None:
        """Record something; `kind` says which columns the report gives it.

        What is no number becomes None, for JSON has neither infinity nor NaN.
        """
        self._emit({"section": self.section, "kind": kind, **_finite(fields)})

    def points[T](self, points: Iterable[T]) -> Iterator[T]:
        """The points one after the other, as long as another as slow as the slowest fits.

        A point that is larger than all before may outstay the time: put the largest last.
        """
        todo, slowest = list(points), 0.0
        for done, point in enumerate(todo):
            if self.left <= slowest:
                self.emit("skipped", points=[_label(skipped) for skipped in todo[done:]])
                return
            started = self._clock()
            yield point
            slowest = max(slowest, self._clock() - started)

    def attempt(self, what: str, run: Callable[[], None]) -> bool:
        """Run one measurement; an error is recorded, and the next may still succeed."""
        try:
            run()
        except Exception as error:  # a kernel may fail in any way, and the report must say how
            text = f"{type(error).__name__}: {error}"
            self.emit("failed", what=what, error=text[:2000])
            return False
        return True


def _label(point: Any) -> str:
    return ", ".join(map(str, point)) if isinstance(point, tuple) else str(point)


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
