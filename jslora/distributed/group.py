"""The devices of all processes behind the methods of one `Device`: the leader's side.

Every call is sent to the followers, numbered and hashed, before it is carried out here. That order
is the invariant on which everything stands: all processes carry out the same calls in the same
order, and only the leader decides on any. What the devices raise here, a step that takes too long,
and tokens that differ between processes end the group, because none of them can go on alone. Host
only: no jax but the device's.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jslora.calls import Chunk, StepCall, StepResult
from jslora.distributed import messages
from jslora.distributed.deltas import Encoder
from jslora.distributed.digests import Comparison, SampledTokens
from jslora.distributed.hosts import AllHosts
from jslora.distributed.links import Links
from jslora.distributed.section import DistributedSection
from jslora.distributed.transfers import Sent, Transfers

if TYPE_CHECKING:
    from jslora.device import Device, Step

_LOOK = 0.1  # seconds between two looks at how long a step takes


class Group:
    """A `jslora.runner.Devices`: this process's device, and the followers.

    Args:
        leave: parts this process from the devices of the others, who do the same at their end.
    """

    def __init__(
        self, device: "Device", links: Links, hosts: AllHosts, section: DistributedSection,
        leave: Callable[[], None],
    ) -> None:  # fmt: skip
        self.catalog, self.compile_seconds = device.catalog, device.compile_seconds
        self._device, self._links, self._leave = device, links, leave
        self._encoder = Encoder()
        self._transfers = Transfers(links, hosts)
        self._watch = StepWatch(links, self._transfers, section.step_seconds)
        self._lock = threading.Lock()
        self._tokens = SampledTokens(section.digest_every)
        self._compared = Comparison(section.num_processes)
        links.on(messages.Sampled, self._hear_sampled)

    @property
    def compilations(self) -> int:
        return self._device.compilations

    def step(self, call: StepCall) -> "GroupStep":
        """As `Device.step`, on all processes.

        Raises:
            EngineFailed: the group has ended.
        """
        with self._fatal():
            self._links.send(messages.encode_step(call, self._encoder))
            self._watch.begin()
            return GroupStep(self, self._device.step(call))

    def read(self, step: "Step") -> StepResult:
        """What a step gave, which is the oldest that was not read.

        Raises:
            EngineFailed: other processes sampled other tokens.
        """
        with self._fatal():
            result = step.wait()
        self._watch.end()
        with self._lock:
            full = self._tokens.add(result.ints[:, 0])
        if full:
            self._compare(0, *full)
            self._links.check()
        return result

    def upload(self, chunk: Chunk) -> "Future[Sent]":
        """As `Device.upload`; done when every process has its part on its devices."""
        if chunk.index == 0:
            self._transfers.begin(chunk)
        return self._transfers.add(chunk, self._device.upload(chunk))

    def write(self, sent: Sent) -> None:
        """As `Device.write`, on all processes."""
        if self._transfers.take(sent):
            with self._fatal():
                self._device.write(sent.own)

    def reset(self) -> None:
        """As `Device.reset`, on all processes."""
        self._transfers.reset()
        self._watch.reset()
        with self._lock:
            self._tokens.reset()
            self._compared.reset(self._tokens.resets)
        with self._fatal():
            self._device.reset()

    def close(self) -> None:
        """Stop all processes."""
        self._watch.close()
        whole = self._links.ended is None
        self._links.close()
        self._device.close()
        if whole:
            self._leave()

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """What the device raises inside ends the group."""
        try:
            yield
        except Exception as error:
            self._links.lose(f"process 0: {type(error).__name__}: {error}")
            raise

    def _hear_sampled(self, process: int, told: messages.Sampled) -> None:
        self._compare(process, told.resets, told.window, told.digest)

    def _compare(self, process: int, resets: int, window: int, digest: str) -> None:
        with self._lock:
            problem = self._compared.add(process, resets, window, digest)
        if problem:
            self._links.lose(problem)


class GroupStep:
    """A dispatched step of a group."""

    def __init__(self, group: Group, step: "Step") -> None:
        self._group, self._step = group, step

    def wait(self) -> StepResult:
        """As `Step.wait`; steps are read in the order of their dispatch."""
        return self._group.read(self._step)


class StepWatch:
    """Ends a group in which a step takes too long: some process hangs, though it may still beat.

    A transfer that takes too long fails alone, since steps need not wait for it.
    """

    def __init__(self, links: Links, transfers: Transfers, limit: float) -> None:
        self._links, self._transfers, self._limit = links, transfers, limit
        self._begun: deque[float] = deque()  # of steps that were not read
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="step-watch", daemon=True).start()

    def begin(self) -> None:
        self._begun.append(time.monotonic())

    def end(self) -> None:
        """The oldest step was read."""
        self._begun.popleft()
        if self._begun:  # it could not end before the one before it
            self._begun[0] = time.monotonic()

    def reset(self) -> None:
        self._begun.clear()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_LOOK):
            self._transfers.end_late()
            with contextlib.suppress(IndexError):  # none runs
                took = time.monotonic() - self._begun[0]
                if took > self._limit:
                    self._links.lose(f"a step has taken {took:.0f} s")
                    return
