"""Sequences for tests of the queue and its policies: only the columns matter."""

from typing import Any

from jslora.request import Request, SamplingParams, Scaled
from jslora.schedule.queue import Waiting
from jslora.schedule.sequence import Sequence


def make_sequence(
    order: int, *, prompt: int = 1, tenant: str = "default", adapter: str | None = None,
    generated: int = 0, **columns: Any,
) -> Sequence:  # fmt: skip
    """A sequence; `columns` are attributes, those of the queue's table among them."""
    request = Request(
        id=str(order), prompt=(1,) * prompt, params=SamplingParams(), tenant=tenant,
        adapters=(Scaled(adapter),) if adapter else (),
    )  # fmt: skip
    sequence = Sequence(request, (), 0, order, [1] * (prompt + generated))
    names = {"tenant_number": "tenant", "adapter_number": "adapter"}
    for name, value in columns.items():
        setattr(sequence, names.get(name, name), value)
    return sequence


def queue(*sequences: Sequence) -> Waiting:
    """All of them wait."""
    waiting = Waiting()
    for sequence in sequences:
        waiting.add(sequence)
    return waiting
