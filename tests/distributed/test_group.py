"""A group in one process, with devices that only remember: what one is told, all are; and whatever
goes wrong on one ends the group in time, or only the load that it concerns."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import AGREED, Meeting, meeting, section

from jslora.calls import StepCall
from jslora.distributed import messages
from jslora.distributed.agreement import differences
from jslora.distributed.links import Links
from jslora.distributed.uplink import Uplink
from jslora.errors import AdapterRejected, ConfigError, EngineFailed
from jslora.memory.residency import chunks

A, B = "a" * 64, "b" * 64
BLOB = np.full((1, 2, 4, 4), 1.0, np.float32)


@pytest.fixture
def met(tmp_path: Path) -> Iterator[Meeting]:
    for name in ("good", "other", "absent"):
        (tmp_path / name).mkdir()
    with meeting([tmp_path]) as found:
        for led in found.followers:
            led.shelf.holds = {"good": (A, 7.0), "other": (A, 7.0)}
        found.followers[1].shelf.holds["other"] = (B, 8.0)
        yield found


def a_step(number: int) -> StepCall:
    packed = np.arange(50, dtype=np.int32)
    packed[number % 50] = number
    return StepCall(0, packed, None, "greedy", packed[:3] + 1, np.ones((6, 2), np.float32))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def test_all_are_told_the_same_in_the_same_order(met: Meeting, tmp_path: Path) -> None:
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    sent = [met.group.upload(part) for part in chunks(A, BLOB, [5, 6, 7, 8], 100, 999, 3)]
    assert len(sent) == 3
    steps = []
    for number in range(12):
        if number < len(sent):
            met.group.write(sent[number].result(5))
        steps.append(met.group.step(a_step(number)))
        if number == 7:
            met.group.reset()
            steps.clear()
    for step in steps:
        step.wait()
    for led in met.followers:
        met.settle(lambda led=led: len(led.device.told) == 16)
        for leaders, own in zip(met.leader.told, led.device.told, strict=True):
            if isinstance(leaders, tuple) and len(leaders) == 2:  # a chunk: its own numbers
                np.testing.assert_array_equal(leaders[0], own[0])
                assert own[1].shape == leaders[1].shape and set(own[1].flat) <= {0.0, 7.0}
            else:
                assert same(leaders, own)
    assert met.lost.empty()


def test_a_closed_group_stops_its_followers(tmp_path: Path) -> None:
    with meeting([tmp_path]) as met:
        met.group.step(a_step(0)).wait()
    for led in met.followers:
        assert led.stopped.wait(5) and led.lost.empty()
        assert led.device.told[-1] == "close"
    assert met.lost.empty()
    with pytest.raises(EngineFailed, match="closed"):
        met.group.step(a_step(1))


# Losses -------------------------------------------------------------------------------------------


def assert_lost(met: Meeting, words: str) -> None:
    """The leader ends for this reason, once, and tells of it from then on; so do all others."""
    assert words in met.lost.get(timeout=5)
    with pytest.raises(EngineFailed, match="the group of processes has ended"):
        met.group.step(a_step(0))
    assert met.lost.empty()


def test_a_follower_that_ends_is_a_loss(met: Meeting) -> None:
    met.followers[0].uplink.close()
    assert_lost(met, "process 1 is gone")
    assert "the leader" in met.followers[1].lost.get(timeout=5)


def test_other_tokens_are_a_loss(met: Meeting) -> None:
    met.followers[1].device.wrong_at = 6
    for number in range(8):
        with contextlib.suppress(EngineFailed):  # it may be noticed before the last
            met.group.step(a_step(number)).wait()
    assert_lost(met, "processes [2] sampled other tokens than process 0")


def test_a_step_that_hangs_is_a_loss(tmp_path: Path) -> None:
    with meeting([tmp_path], section(step_seconds=1)) as met:
        met.group.step(a_step(0)).wait()
        met.leader.stuck.set()
        began = time.monotonic()
        step = met.group.step(a_step(1))
        waiting = threading.Thread(target=step.wait, daemon=True)
        waiting.start()
        assert_lost(met, "a step has taken")
        assert time.monotonic() - began >= 1
        met.leader.stuck.clear()
        waiting.join()


def test_what_a_device_raises_is_a_loss(met: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: StepCall) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(met.followers[0].device, "step", fail)
    with contextlib.suppress(EngineFailed):  # it may be noticed before it returns
        met.group.step(a_step(0)).wait()
    assert_lost(met, "process 1 gave up: RuntimeError: device lost")


def test_what_the_leaders_device_raises_is_a_loss(
    met: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(call: StepCall) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(met.leader, "step", fail)
    with pytest.raises(RuntimeError):
        met.group.step(a_step(0))
    assert_lost(met, "process 0: RuntimeError: device lost")


def test_an_order_that_cannot_be_obeyed_is_a_loss(met: Meeting) -> None:
    with contextlib.suppress(EngineFailed):  # it may be noticed before it returns
        met.links.send(messages.Write(99, 0))
    assert "gave up: KeyError" in met.lost.get(timeout=5)


def test_an_answer_that_no_follower_gives_is_a_loss(met: Meeting) -> None:
    met.followers[0].uplink.say(messages.Prepared(99, A))
    assert_lost(met, "process 1 said what no follower says")


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other", "process 2 has other contents in 'other': bbbbbbbbbbbb there, aaaaaaaaaaaa"),
        ("absent", "process 1 cannot serve it: 'absent' is no adapter folder"),
    ],
)
def test_contents_that_are_not_the_same_everywhere_are_refused(
    met: Meeting, tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(AdapterRejected, match=words):
        met.hosts.ask(tmp_path / name, tmp_path, "full")(A)
    assert not met.hosts.agreed(A)
    met.group.step(a_step(0)).wait()
    assert met.lost.empty()


def test_a_transfer_that_fails_on_one_host_fails_alone(met: Meeting, tmp_path: Path) -> None:
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    met.followers[1].device.upload_fails = True
    parts = [*chunks(A, BLOB, [5, 6, 7, 8], 100, 999, 3)]
    for done in [met.group.upload(part) for part in parts]:
        with pytest.raises(EngineFailed, match="process 2: internal error"):
            done.result(5)
    met.followers[1].device.upload_fails = False
    for done in [met.group.upload(part) for part in parts]:
        met.group.write(done.result(5))
    met.group.step(a_step(0)).wait()
    for led in met.followers:
        met.settle(lambda led=led: len(led.device.told) == 4)
    assert met.lost.empty()


def test_chunks_of_a_failed_transfer_are_written_nowhere(met: Meeting, tmp_path: Path) -> None:
    """The first chunk is everywhere when the transfer fails: not even that is written."""
    met.hosts.ask(tmp_path / "good", tmp_path, "full")(A)
    first, second, third = chunks(A, BLOB, [5, 6, 7, 8], 100, 999, 3)
    sent = met.group.upload(first).result(5)
    met.leader.upload_fails = True
    rest = [met.group.upload(part) for part in (second, third)]
    for done in rest:
        with pytest.raises((RuntimeError, EngineFailed)):
            done.result(5)
    met.group.write(sent)
    met.group.step(a_step(0)).wait()
    for led in met.followers:
        met.settle(lambda led=led: len(led.device.told) == 1)
    assert len(met.leader.told) == 1 and met.lost.empty()


def test_contents_that_were_not_agreed_on_are_not_brought(met: Meeting) -> None:
    (only,) = chunks(B, BLOB[:, :, :1], [5], 100, 999, 3)
    with pytest.raises(EngineFailed):
        met.group.upload(only).result(5)
    met.group.step(a_step(0)).wait()
    assert met.lost.empty()


def test_what_is_forgotten_is_forgotten_everywhere(met: Meeting) -> None:
    met.hosts.forget(A)
    for led in met.followers:
        met.settle(lambda led=led: led.shelf.forgotten == [A])


# Joining ------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_what_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    leaders = section(num_processes=2)
    links = Links(leaders, AGREED, pytest.fail)
    gathering = threading.Thread(target=links.gather, daemon=True)
    gathering.start()
    own = leaders.model_copy(update={"process_id": 1})
    with caplog.at_level("INFO", "jslora.distributed"):
        with pytest.raises(ConfigError, match=r"mesh is 2 on process 0 and 4 on process 1"):
            Uplink(own, AGREED | {"mesh": "4"}, pytest.fail).join()
        assert "process 1 is refused: mesh is 2 on process 0 and 4 on process 1" in caplog.text
    with pytest.raises(ConfigError, match="process_id is 7"):
        Uplink(leaders.model_copy(update={"process_id": 7}), AGREED, pytest.fail).join()
    mended = Uplink(own, AGREED, pytest.fail)
    mended.join()
    gathering.join(5)
    assert not gathering.is_alive()
    part(links, mended)


def part(links: Links, uplink: Uplink) -> None:
    """A follower leaves when it is told to."""
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(links.close)
        assert uplink.next() == messages.Stop()
        uplink.close()
        closed.result(5)


def test_strangers_get_nothing_and_stop_nobody() -> None:
    leaders = section(num_processes=2)
    links = Links(leaders, AGREED, pytest.fail)
    gathering = threading.Thread(target=links.gather, daemon=True)
    gathering.start()
    own = leaders.model_copy(update={"process_id": 1})
    address = "127.0.0.1", leaders.control_port
    with contextlib.ExitStack() as stack:
        while True:  # until it listens
            with contextlib.suppress(ConnectionRefusedError):
                first = stack.enter_context(socket.create_connection(address))
                break
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(10)]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), bytes(100)):
            stranger = stack.enter_context(socket.create_connection(address))
            stranger.sendall(garbage)
        uplink = Uplink(own, AGREED, pytest.fail)
        uplink.join()
        gathering.join(10)
        assert not gathering.is_alive(), (first, silent)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)  # nobody is waited for any more
    part(links, uplink)


def test_it_listens_on_its_one_address_only() -> None:
    leaders = section(num_processes=2, interface="127.0.0.2")
    links = Links(leaders, AGREED, pytest.fail)
    gathering = threading.Thread(target=links.gather, daemon=True)
    gathering.start()
    connected(("127.0.0.2", leaders.control_port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", leaders.control_port))
    there = {"process_id": 1, "coordinator": "127.0.0.2:1"}
    uplink = Uplink(leaders.model_copy(update=there), AGREED, pytest.fail)
    uplink.join()
    gathering.join(5)
    part(links, uplink)


def connected(address: tuple[str, int]) -> socket.socket:
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(address)
        time.sleep(0.01)


def test_differences_are_told_in_bounded_and_printable_words() -> None:
    theirs = {f"key\n{i}": "x" * 1000 for i in range(50)}
    words = "; ".join(differences(AGREED, theirs, 7))
    assert "\n" not in words and len(words) < 1500 and "more" in words
    assert differences(AGREED, dict(AGREED), 7) == []
