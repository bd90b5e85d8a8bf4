"""How many prompt tokens fit into a step beside decoding rows, which wait for the whole of it.

A step is taken to cost a + b * tokens seconds. The line is drawn through the last steps that only
decoded and, kept apart so that neither crowds out the other, the last that also read prompts: its
slope is the median of the slopes between all pairs of steps, the farther apart the more they
count (after Sen 1968), so steps that waited for something do not bend it. What steps with prompts
cost above the line, by noise or because their shapes are rounded up, is a factor that follows a
high quantile: it rises after a step above it, and falls a little after one below.

Invariants: never more than asked for, nor less than needed for progress; at most twice the tokens
of the largest step seen lately; never fewer for a larger target. Host only: no jax.
"""

import math
from collections import deque

import numpy as np

MEMORY = 32
"""Steps remembered of each kind."""

ABOVE = 0.03
"""Share of steps with prompts that may take longer than the target."""

_STEP = 0.1  # change of the factor's logarithm, for each share of steps
_FACTORS = math.log(0.5), math.log(4.0)  # what the factor's logarithm stays within
_WAITED = 3.0  # times what is expected: such a step waited, which says nothing of its tokens
_EVERY = 4  # steps after which the line is drawn anew


class Pace:
    """What steps cost, learned from them, and what a target in seconds leaves for prompts."""

    def __init__(self, target: float | None) -> None:
        """Seconds that a step with decoding rows shall take at most; None leaves all free."""
        self._target = target
        self._decoding: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._mixed: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._line = (0.0, 0.0)
        self._log_factor = 0.0
        self._steps = 0

    def took(self, tokens: int, rows: int, seconds: float) -> None:
        """A step of so many tokens in so many rows took so long."""
        assert tokens >= rows > 0 and seconds >= 0, f"{tokens=} {rows=} {seconds=}"
        if self._target is None:
            return
        if tokens > rows and self._steps:
            self._compare(tokens, seconds)
        (self._mixed if tokens > rows else self._decoding).append((tokens, seconds))
        if self._steps < MEMORY or self._steps % _EVERY == 0:
            self._line = _line(np.array([*self._decoding, *self._mixed]))
        self._steps += 1

    def prefill_tokens(self, rows: int, at_most: int, at_least: int) -> int:
        """Prompt tokens that may join so many decoding rows.

        Args:
            at_most: what there is; all of it without a target, decoding rows or any step yet.
            at_least: for progress, whatever the target; `at_most` goes before it.
        """
        if self._target is None or not rows or not self._steps:
            return at_most
        start, each = self._line
        left = self._target / math.exp(self._log_factor) - start
        largest = max(tokens for tokens, _ in (*self._decoding, *self._mixed))
        # Also what a slope of nothing allows is tried out in steps.
        total = min(left / each if each > 0 else math.copysign(math.inf, left), 2 * largest)
        return min(at_most, max(at_least, math.floor(max(total, 0.0)) - rows))

    def _compare(self, tokens: int, seconds: float) -> None:
        """Move the factor by what a step with prompts took against what the line says."""
        start, each = self._line
        expected = start + each * tokens
        if seconds > _WAITED * expected:
            return
        above = seconds > expected * math.exp(self._log_factor)
        moved = self._log_factor + _STEP * ((1 - ABOVE) if above else -ABOVE)
        low, high = _FACTORS
        self._log_factor = min(max(moved, low), high)


def _line(steps: np.ndarray) -> tuple[float, float]:
    """Seconds of an empty step and seconds a token, neither below zero.

    Where all steps are of one size, the line goes through nothing at nothing: a slope that is too
    steep rather than one that is made up.

    Args:
        steps: tokens and seconds, (steps, 2).
    """
    tokens, seconds = steps.T
    x, y = np.append(tokens, 0.0), np.append(seconds, 0.0)
    first, second = np.triu_indices(len(x), 1)
    apart = np.abs(x[first] - x[second])
    pairs = apart > 0
    first, second, apart = first[pairs], second[pairs], apart[pairs]
    slopes = (y[first] - y[second]) / (x[first] - x[second])
    order = np.argsort(slopes)
    weights = np.cumsum(apart[order])
    middle = np.searchsorted(weights, weights[-1] / 2)
    each = max(float(slopes[order[middle]]), 0.0)
    return max(float(np.median(seconds - each * tokens)), 0.0), each
