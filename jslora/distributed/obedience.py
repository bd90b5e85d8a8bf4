"""Carrying out a leader's orders on this process's device, one after the other.

Invariants: orders are carried out in the order they came, by one thread; no decision is taken here,
neither from a clock or a queue nor from what the device says. Results are read on a thread of their
own, for nothing but their digests. Whatever cannot be carried out is raised, and is the end.
Host only: no jax.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from jslora.calls import StepCall
from jslora.distributed import messages
from jslora.distributed.deliveries import Deliveries
from jslora.distributed.deltas import Decoder
from jslora.distributed.digests import SampledTokens
from jslora.distributed.messages import Order


class Obeyed(Protocol):
    """What of a `jslora.device.Device` is used here."""

    def step(self, call: StepCall) -> Any: ...
    def write(self, sent: Any) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


_RESET = object()


class Obedience:
    """One follower's device and adapters.

    Args:
        say: tells the leader; from any thread.
        failed: called with what a step raised when it was read.
    """

    def __init__(
        self, device: Obeyed, deliveries: Deliveries, digest_every: int,
        say: Callable[[messages.Answer], None], failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._device, self._deliveries, self._say, self._failed = device, deliveries, say, failed
        self._decoder = Decoder()
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tokens = SampledTokens(digest_every)
        self._reader = threading.Thread(target=self._read, name="results", daemon=True)
        self._reader.start()

    def carry_out(self, order: Order) -> None:
        """Do as told; what takes long goes on afterwards.

        Raises whatever stands in the way: nothing may follow then.
        """
        match order:
            case messages.Step():
                self._steps.put(self._device.step(messages.decode_step(order, self._decoder)))
            case messages.Write():
                self._device.write(self._deliveries.take(order))
            case messages.Prepare():
                self._deliveries.prepare(order)
            case messages.Bring():
                self._deliveries.bring(order)
            case messages.Drop(number):
                self._deliveries.drop(number)
            case messages.Forget(digest):
                self._deliveries.forget(digest)
            case messages.Reset():
                self._deliveries.reset()
                self._steps.put(_RESET)
                self._device.reset()
            case _:
                raise ValueError(f"{type(order).__name__} is no order for one of the group")

    def close(self) -> None:
        """Finish what was dispatched."""
        self._steps.put(None)
        self._reader.join()
        self._deliveries.close()
        self._device.close()

    def _read(self) -> None:
        """The results of every step, in order."""
        while (step := self._steps.get()) is not None:
            if step is _RESET:
                self._tokens.reset()
                continue
            try:
                full = self._tokens.add(step.wait().ints[:, 0])
            except Exception as error:
                self._failed(error)
                return
            if full is not None:
                self._say(messages.Sampled(*full))
