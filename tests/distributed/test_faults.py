"""Faults of threads that meet at a bad moment, of hosts that hang, and of strangers."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from loopback import AGREED, Meeting, meeting, section
from test_group import BLOB, A, a_step, assert_lost, connected

from jslora.calls import Chunk
from jslora.distributed import follower, launch, messages, transfers
from jslora.distributed.links import MAX_STRANGERS, Links
from jslora.distributed.transfers import Transfers
from jslora.distributed.uplink import Uplink
from jslora.errors import EngineFailed
from jslora.memory.residency import chunks


@pytest.fixture
def met(tmp_path: Path) -> Iterator[Meeting]:
    (tmp_path / "good").mkdir()
    with meeting([tmp_path], section(digest_every=1)) as found:
        for led in found.followers:
            led.shelf.holds = {"good": (A, 7.0)}
        yield found


class Gate:
    """A lock at whose `where` one thread waits for `open`, as if it were switched out there."""

    def __init__(self, lock: Any, where: str, thread: str) -> None:
        self._lock, self._where, self._thread = lock, where, thread
        self.reached, self.open = threading.Event(), threading.Event()

    def _pass(self, where: str) -> None:
        if (where, threading.current_thread().name) == (self._where, self._thread):
            self.reached.set()
            self.open.wait()

    def __enter__(self) -> None:
        self._pass("entry")
        self._lock.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._lock.__exit__(*raised)
        self._pass("exit")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def on_thread(name: str, what: Callable[[], None]) -> "Future[None]":
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(what())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


# Transfers ----------------------------------------------------------------------------------------


class FakeLinks:
    """Links to `count` followers that are told nothing."""

    def __init__(self, count: int) -> None:
        self.followers, self.handlers = range(1, count + 1), dict[type, Any]()
        self.sent: list[Any] = []

    def on(self, kind: type, handler: Any) -> None:
        self.handlers[kind] = handler

    def send(self, order: Any) -> None:
        self.sent.append(order)

    def say(self, process: int, answer: Any) -> None:
        self.handlers[type(answer)](process, answer)


def a_transfer(followers: int) -> tuple[Any, Transfers, "Future[Any]", "Future[Any]"]:
    """A transfer of one chunk: (links, transfers, the leader's part, done everywhere)."""
    fake: Any = FakeLinks(followers)
    hosts: Any = SimpleNamespace(place=lambda digest: (0, "good", "full"))
    all_of_them = Transfers(fake, hosts)
    chunk = Chunk(A, 0, 1, (1,), np.zeros(1, np.int32), np.zeros((1, 1, 1)))
    own: Future[Any] = Future()
    all_of_them.begin(chunk)
    return fake, all_of_them, own, all_of_them.add(chunk, own)


def test_a_chunk_that_arrives_twice_at_a_time_is_done_once() -> None:
    fake, found, own, done = a_transfer(1)
    gate: Any = Gate(found._lock, "exit", "from-1")
    found._lock = gate
    heard = on_thread("from-1", lambda: fake.say(1, messages.Brought(1, 0)))
    gate.reached.wait()
    own.set_result("own")
    assert done.result(5).own == "own"
    gate.open.set()
    assert heard.result(5) is None


def test_an_arrival_that_is_told_twice_counts_once() -> None:
    fake, _, own, done = a_transfer(2)
    own.set_result("own")
    for process, everywhere in ((1, False), (1, False), (2, True), (2, True)):
        fake.say(process, messages.Brought(1, 0))
        assert done.done() == everywhere


def test_a_failure_does_not_meet_an_arrival() -> None:
    """A chunk is everywhere, and before its future says so the transfer fails."""
    fake, found, own, done = a_transfer(1)
    own.set_result("own")
    gate: Any = Gate(found._lock, "exit", "from-1")
    found._lock = gate
    heard = on_thread("from-1", lambda: fake.say(1, messages.Brought(1, 0)))
    gate.reached.wait()
    fake.say(1, messages.NotBrought(1, "no memory"))
    gate.open.set()
    assert heard.result(5) is None and done.result(5).own == "own"
    assert fake.sent[-1] == messages.Drop(1)


def test_a_transfer_that_one_host_never_ends_fails_in_time(
    met: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    met.followers[1].device.upload_hangs = True
    parts = [*chunks(A, BLOB, [5, 6, 7, 8], 100, 999, 3)]
    monkeypatch.setattr(transfers, "PATIENCE", 0.3)
    for done in [met.group.upload(part) for part in parts]:
        with pytest.raises(EngineFailed, match=r"processes \[2\] did not bring"):
            done.result(5)
    monkeypatch.undo()
    met.followers[1].device.upload_hangs = False
    for done in [met.group.upload(part) for part in parts]:
        met.group.write(done.result(5))
    assert met.lost.empty()


def test_a_transfer_that_waits_to_be_written_does_not_fail(
    met: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    sent = [met.group.upload(part).result(5) for part in chunks(A, BLOB, [5, 6, 7, 8], 9, 99, 3)]
    monkeypatch.setattr(transfers, "PATIENCE", 0.0)
    threading.Event().wait(0.5)
    for each in sent:
        met.group.write(each)
    met.group.step(a_step(0)).wait()
    assert len(met.leader.told) == len(sent) + 1 and met.lost.empty()


# Links --------------------------------------------------------------------------------------------


def test_an_answer_that_breaks_its_handler_is_a_loss(met: Meeting, tmp_path: Path) -> None:
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    first, *_ = chunks(A, BLOB, [5, 6, 7, 8], 100, 999, 3)
    met.group.upload(first)
    met.followers[0].uplink.say(messages.Brought(1, 7))  # there are three
    assert_lost(met, "process 1 said what could not be taken (IndexError")


def test_a_follower_that_is_lost_as_the_last_one_comes_is_a_loss() -> None:
    lost: list[str] = []
    found = Links(section(num_processes=3), AGREED, lost.append)
    here: list[Any] = [SimpleNamespace(close=lambda: None) for _ in range(2)]
    found._channels = dict(enumerate(here, 1))
    gate: Any = Gate(found._changed, "entry", "from-1")
    found._changed = gate
    gone = on_thread("from-1", lambda: found._gone(1, here[0], "is gone"))
    gate.reached.wait()
    assert found._begin()
    gate.open.set()
    gone.result(5)
    assert lost == ["process 1 is gone"]


def test_idle_strangers_keep_no_follower_out(caplog: pytest.LogCaptureFixture) -> None:
    leaders = section(num_processes=2)
    found = Links(leaders, AGREED, pytest.fail)
    gathering = threading.Thread(target=found.gather, daemon=True)
    address = "127.0.0.1", leaders.control_port
    with caplog.at_level(logging.WARNING, "jslora.distributed"):
        gathering.start()
        idle = [connected(address) for _ in range(2 * MAX_STRANGERS + 1)]
        for each in idle[:MAX_STRANGERS]:  # the oldest are let go
            each.settimeout(5)
            while each.recv(64):
                pass
        uplink = Uplink(leaders.model_copy(update={"process_id": 1}), AGREED, pytest.fail)
        uplink._channel = uplink._meet()  # at the first try
        gathering.join(5)
        assert not gathering.is_alive()
    assert caplog.text.count("wanted to join") < MAX_STRANGERS
    for each in idle:
        each.close()
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(found.close)
        while messages.decode_order(uplink._channel.receive()) != messages.Stop():
            pass
        uplink._channel.close()
        closed.result(5)


# Groups -------------------------------------------------------------------------------------------


def test_tokens_that_differ_are_not_given_to_anybody(met: Meeting) -> None:
    for process in (1, 2):  # before the leader has read it
        met.group._hear_sampled(process, messages.Sampled(0, 1, "other"))
    with pytest.raises(EngineFailed, match="sampled other tokens"):
        met.group.step(a_step(0)).wait()
    assert "processes [1, 2] sampled other tokens" in met.lost.get(timeout=5)


def test_a_step_that_cannot_be_told_is_a_loss(
    met: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("too large")

    monkeypatch.setattr(messages, "encode_step", fail)
    with pytest.raises(ValueError, match="too large"):
        met.group.step(a_step(0))
    monkeypatch.undo()
    assert_lost(met, "process 0: ValueError: too large")


def test_a_follower_that_cannot_stop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(launch, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(follower.os, "_exit", ended.put)
    hangs = threading.Event()
    uplink: Any = SimpleNamespace(close=lambda: None)
    obedience: Any = SimpleNamespace(close=hangs.wait)
    monkeypatch.setattr(launch, "leave", lambda: None)
    stopping = on_thread("stops", lambda: follower._stop(uplink, obedience))
    assert ended.get(timeout=5) == follower.EXIT_CODE and not stopping.done()
    hangs.set()
    stopping.result(5)
