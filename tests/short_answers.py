"""How tests come to preemption: an engine that expects every answer to end with its next token."""

from jslora.schedule.scheduler import Scheduler

QUANTILE = 0.01
"""For `scheduler.reserve`: of answers as short as one in a hundred."""


def expect_short_answers(scheduler: Scheduler) -> None:
    """Let a scheduler have seen answers of one token; for any but `ignore_eos` without stops."""
    lengths = scheduler._foresight._lengths
    assert lengths is not None, "lengths are declared"
    for _ in range(100):
        lengths.ended("", 1, cut=False)
