"""Adapters on their way to the devices of all processes, as the leader knows them.

Second phase of an adapter's way: the followers are told to transfer their parts to the same pages,
and a chunk counts as transferred once it is on every process's devices. What fails anywhere fails
everywhere. Invariant: followers that are told to write a chunk have it, because it is theirs until
they are told so, or that the transfer failed; and after the latter no chunk of it is written.
Host only: no jax.
"""

import contextlib
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jslora.calls import Chunk
from jslora.distributed import messages
from jslora.distributed.hosts import PATIENCE, AllHosts
from jslora.distributed.links import Links
from jslora.errors import EngineFailed


@dataclass(frozen=True, slots=True)
class Sent:
    """A chunk that all processes have; `own` is this one's."""

    number: int
    index: int
    own: Any


class _Transfer:
    """The chunks of one adapter: who does not have them yet, and who waits for that."""

    def __init__(self, number: int, count: int, processes: int) -> None:
        self.number, self.began = number, time.monotonic()
        self.missing = [{*range(processes)} for _ in range(count)]
        self.own: list[Any] = [None] * count
        self.done: list[Future[Sent]] = [Future() for _ in range(count)]
        self.unwritten = count


class Transfers:
    """All transfers since the last reset that were not written yet."""

    def __init__(self, links: Links, hosts: AllHosts) -> None:
        self._links, self._hosts = links, hosts
        self._lock = threading.Lock()
        self._last = 0
        self._open: dict[int, _Transfer] = {}
        self._under_way: dict[str, _Transfer] = {}  # to which chunks are added, by digest
        links.on(messages.Brought, self._brought)
        links.on(messages.NotBrought, self._not_brought)

    def begin(self, chunk: Chunk) -> None:
        """Let the followers transfer their parts of an adapter, whose first chunk this is."""
        place = self._hosts.place(chunk.digest)
        if place is None:
            return  # nobody asks for it any more, and `add` will say so
        with self._lock:
            self._last += 1
            transfer = _Transfer(self._last, chunk.count, len(self._links.followers) + 1)
            self._open[self._last] = self._under_way[chunk.digest] = transfer
            order = messages.Bring(self._last, chunk.digest, *place, list(chunk.pages))
            self._links.send(order)

    def add(self, chunk: Chunk, own: "Future[Any]") -> "Future[Sent]":
        """Take this process's transfer of a chunk; done when it is done everywhere."""
        transfer = self._under_way.get(chunk.digest)
        if transfer is None:
            unknown: Future[Sent] = Future()
            unknown.set_exception(EngineFailed("no other host knows where the adapter lies"))
            return unknown
        if chunk.index == chunk.count - 1:
            del self._under_way[chunk.digest]

        def arrived(own: "Future[Any]") -> None:
            error = own.exception()
            if error is not None:
                self._fail(transfer.number, error)
                return
            transfer.own[chunk.index] = own.result()
            self._arrived(transfer.number, chunk.index, 0)

        own.add_done_callback(arrived)
        return transfer.done[chunk.index]

    def take(self, sent: Sent) -> bool:
        """Let the followers write a chunk; False if the transfer has failed, and nobody does."""
        with self._lock:
            transfer = self._open.get(sent.number)
            if transfer is None:
                return False
            transfer.unwritten -= 1
            if not transfer.unwritten:
                del self._open[sent.number]
            self._links.send(messages.Write(sent.number, sent.index))
        return True

    def reset(self) -> None:
        """Let all processes make their pools anew, and forget what was on its way."""
        with self._lock:
            self._open.clear()
            self._links.send(messages.Reset())

    def end_late(self) -> None:
        """Fail what some process has not brought in `PATIENCE`: it may hang, though it beats."""
        with self._lock:
            before = time.monotonic() - PATIENCE
            late = {
                number: sorted(set().union(*transfer.missing))
                for number, transfer in self._open.items()
                if transfer.began < before
            }
        for number, missing in late.items():
            if missing:
                words = f"processes {missing} did not bring an adapter in {PATIENCE:.0f} s"
                self._fail(number, EngineFailed(words))

    def _brought(self, process: int, answer: messages.Brought) -> None:
        self._arrived(answer.number, answer.index, process)

    def _not_brought(self, process: int, answer: messages.NotBrought) -> None:
        self._fail(answer.number, EngineFailed(f"process {process}: {answer.error}"))

    def _arrived(self, number: int, index: int, process: int) -> None:
        with self._lock:
            transfer = self._open.get(number)
            if transfer is None:
                return  # it failed elsewhere, or was forgotten
            missing = transfer.missing[index]
            if process not in missing:
                return
            missing.remove(process)
            everywhere = not missing  # decided here, so that one of those who arrive says it
        if everywhere:
            transfer.done[index].set_result(Sent(number, index, transfer.own[index]))

    def _fail(self, number: int, error: BaseException) -> None:
        with self._lock:
            transfer = self._open.pop(number, None)
            if transfer is None:
                return
            pairs = zip(transfer.missing, transfer.done, strict=True)
            waiting = [done for missing, done in pairs if missing]
            with contextlib.suppress(EngineFailed):  # a group that has ended has nothing to drop
                self._links.send(messages.Drop(number))
        for done in waiting:
            done.set_exception(error)
