"""A leader and its followers in one process, over loopback, with devices that only remember."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from jslora.calls import Chunk, StepCall, StepResult
from jslora.distributed import messages
from jslora.distributed.deliveries import Deliveries
from jslora.distributed.group import Group
from jslora.distributed.hosts import AllHosts
from jslora.distributed.links import Links
from jslora.distributed.obedience import Obedience
from jslora.distributed.section import DistributedSection
from jslora.distributed.uplink import Uplink
from jslora.errors import AdapterRejected

TOKEN = "a token that nobody else knows"
AGREED = {"model.dtype": '"float32"', "mesh": "2"}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in held]


def section(process_id: int = 0, **keys: Any) -> DistributedSection:
    coordinator, control = free_ports(2)
    data = {
        "coordinator": f"127.0.0.1:{coordinator}", "control_port": control, "num_processes": 3,
        "token": TOKEN, "heartbeat_seconds": 2, "digest_every": 4,
    }  # fmt: skip
    return DistributedSection(process_id=process_id, **(data | keys))


@dataclass
class RememberingDevice:
    """What was asked of it, in order. The tokens of a step are its packed numbers."""

    told: list[Any] = field(default_factory=list)
    upload_fails: bool = False
    upload_hangs: bool = False
    wrong_at: int = -1
    stuck: threading.Event = field(default_factory=threading.Event)
    geometry: Any = field(default_factory=lambda: SimpleNamespace(pages=100, drop_page=999))
    catalog: Any = None
    compilations = 3
    compile_seconds = 1.0

    def step(self, call: StepCall) -> "RememberedStep":
        self.told.append(call)
        return RememberedStep(self, call.packed + (len(self.told) == self.wrong_at))

    def upload(self, chunk: Chunk) -> "Future[Any]":
        done: Future[Any] = Future()
        if self.upload_hangs:
            return done
        if self.upload_fails:
            done.set_exception(RuntimeError("no memory"))
        else:
            done.set_result((chunk.rows, chunk.data))
        return done

    def write(self, sent: Any) -> None:
        self.told.append(sent)

    def reset(self) -> None:
        self.told.append("reset")

    def close(self) -> None:
        self.told.append("close")


@dataclass
class RememberedStep:
    device: RememberingDevice
    tokens: np.ndarray

    def wait(self) -> StepResult:
        while self.device.stuck.is_set():
            time.sleep(0.01)
        return StepResult(self.tokens.reshape(-1, 1), np.zeros((1, 1), np.float32))


@dataclass
class MemoryShelf:
    """Adapters by path: (digest, number that all its numbers are)."""

    holds: dict[str, tuple[str, float]] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)

    def read(self, root: int, path: str, storage: str) -> str:
        if path not in self.holds:
            raise AdapterRejected(f"{path!r} is no adapter folder below the adapter roots")
        return self.holds[path][0]

    def blob(self, digest: str, pages: int, root: int, path: str, storage: str) -> np.ndarray:
        found, number = self.holds[path]
        if found != digest:
            raise AdapterRejected(f"{path!r} changed on disk; load it again")
        return np.full((1, 2, pages, 4), number, np.float32)

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)


@dataclass
class Led:
    """A follower: its uplink, and a thread that obeys."""

    uplink: Uplink
    device: RememberingDevice
    shelf: MemoryShelf
    lost: "queue.Queue[str]"
    stopped: threading.Event = field(default_factory=threading.Event)

    def obey(self) -> None:
        self.uplink.join()
        deliveries = Deliveries(
            self.shelf, self.device.geometry, self.device.upload, 3, self.uplink.say
        )
        obedience = Obedience(self.device, deliveries, 4, self.uplink.say, self.give_up)
        try:
            while not isinstance(order := self.uplink.next(), messages.Stop):
                obedience.carry_out(order)
        except Exception as error:
            self.give_up(error)
        self.uplink.close()
        obedience.close()
        self.stopped.set()

    def give_up(self, error: Exception) -> None:
        self.uplink.say(messages.Failed(f"{type(error).__name__}: {error}"))


@dataclass
class Meeting:
    leader: RememberingDevice
    links: Links
    hosts: AllHosts
    group: Group
    followers: list[Led]
    lost: "queue.Queue[str]"

    def settle(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so; the test's timeout says if it never is."""
        while not condition():
            time.sleep(0.005)


@contextlib.contextmanager
def meeting(roots: list[Any], leaders: DistributedSection | None = None) -> Iterator[Meeting]:
    """A group of three, all of them in this process, joined and at rest."""
    leaders = leaders or section()
    lost: queue.Queue[str] = queue.Queue()
    links = Links(leaders, AGREED, lost.put)
    hosts, leader = AllHosts(links, roots), RememberingDevice()
    followers = []
    for process in range(1, leaders.num_processes):
        own = leaders.model_copy(update={"process_id": process})
        theirs: queue.Queue[str] = queue.Queue()
        uplink = Uplink(own, AGREED, theirs.put)
        followers.append(Led(uplink, RememberingDevice(), MemoryShelf(), theirs))
    threads = [threading.Thread(target=led.obey, daemon=True) for led in followers]
    for thread in threads:
        thread.start()
    group = Group(leader, links, hosts, leaders, lambda: None)
    links.gather()
    try:
        yield Meeting(leader, links, hosts, group, followers, lost)
    finally:
        for led in followers:
            led.device.stuck.clear()
        leader.stuck.clear()
        group.close()
