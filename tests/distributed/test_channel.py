"""Two ends that know the token hear each other exactly; strangers and changes are noticed."""

import hashlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jslora.distributed import channel
from jslora.distributed.channel import Channel, ChannelLost, meet_follower, meet_leader

TOKEN = b"a token that nobody else knows"


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        follower = socket.create_connection(listener.getsockname())
        leader, _ = listener.accept()
    with leader, follower:
        yield leader, follower


def meet(
    leader: socket.socket, follower: socket.socket, token: bytes = TOKEN, silence: float = 5.0
) -> tuple[Channel, Channel]:
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet_leader, follower, token, silence)
        return meet_follower(leader, TOKEN, silence), met.result()


def test_messages_come_out_in_order_both_ways(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = meet(*sockets)
    sent = [b"", b"one", bytes(100_000), b"one"]
    with ThreadPoolExecutor(2) as pool:
        for one, other in ((leader, follower), (follower, leader)):
            heard = pool.submit(lambda end=other: [end.receive() for _ in sent])
            for message in sent:
                one.send(message)
            assert heard.result() == sent


@pytest.mark.parametrize("token", [b"another token", b"", TOKEN + b"!"])
def test_another_token_is_refused_by_both(
    sockets: tuple[socket.socket, socket.socket], token: bytes
) -> None:
    leader, follower = sockets
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet_leader, follower, token, 5.0)
        with pytest.raises(ChannelLost, match="does not know the token"):
            meet_follower(leader, TOKEN, 5.0)
        leader.close()
        with pytest.raises(ChannelLost):
            met.result()


def test_a_leader_without_the_token_is_refused(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    leader, follower = sockets
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet_leader, follower, TOKEN, 5.0)
        leader.sendall(b"jslora control 1\n" + bytes(16))
        leader.recv(1000)
        leader.sendall(hmac.digest(b"guess", b"jslora leader\0" + bytes(32), "sha256"))
        with pytest.raises(ChannelLost, match="does not know the token"):
            met.result()


def test_a_follower_that_repeats_the_leaders_own_proof_is_refused(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """Who answers with what was said to another connection proves nothing."""
    leader, follower = sockets
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet_follower, leader, TOKEN, 5.0)
        greeting = follower.recv(1000)
        follower.sendall(greeting + hmac.digest(TOKEN, b"jslora leader\0" + bytes(32), "sha256"))
        with pytest.raises(ChannelLost, match="token"):
            met.result()


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n" + bytes(100), bytes(200), b"\xff" * 999]
)
def test_a_stranger_gets_a_greeting_and_no_more(
    sockets: tuple[socket.socket, socket.socket], first: bytes
) -> None:
    leader, follower = sockets
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet_follower, leader, TOKEN, 5.0)
        follower.sendall(first)
        with pytest.raises(ChannelLost, match="does not speak"):
            met.result()
    leader.close()
    follower.settimeout(5)
    heard = b""
    try:
        while part := follower.recv(1000):
            heard += part
    except ConnectionResetError:
        pass
    assert len(heard) <= len(b"jslora control 1\n") + 16


def test_a_stranger_that_says_nothing_is_left_in_time(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "PATIENCE", 0.3)
    began = time.monotonic()
    drip = threading.Thread(target=drip_slowly, args=(sockets[1],))
    drip.start()
    with pytest.raises(ChannelLost, match="did not say"):
        meet_follower(sockets[0], TOKEN, 60.0)
    drip.join()
    assert time.monotonic() - began < 10, "sixty seconds are for those who were met"


def drip_slowly(connection: socket.socket) -> None:
    for byte in b"jslora":
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def flip(data: bytearray, at: int) -> None:
    data[at % len(data)] ^= 1 << at % 8


def repeat(data: bytearray, at: int) -> None:
    data[:] = data + data


def shorten(data: bytearray, at: int) -> None:
    del data[at % len(data)]


def swap(data: bytearray, at: int) -> None:
    data[:] = data[len(data) // 2 :] + data[: len(data) // 2]


@given(
    st.lists(st.binary(max_size=50), min_size=2, max_size=2),
    st.sampled_from([flip, repeat, shorten, swap]),
    st.integers(0, 10_000),
)
def test_any_change_on_the_way_is_noticed(
    sent: list[bytes], change: Callable[[bytearray, int], None], at: int
) -> None:
    """Of the messages only those come out that lie wholly before the change."""
    ours, theirs = socket.socketpair()
    wire, back = socket.socketpair()
    with ours, theirs, wire, back:
        sender = Channel(ours, bytes(32), bytes(32), 1.0)
        for message in sent:
            sender.send(message)
        data = bytearray(theirs.recv(10_000))
        before = bytes(data)
        change(data, at)
        if data == before:
            return  # two equal halves
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        receiver = Channel(back, bytes(32), bytes(32), 1.0)
        heard = []
        with pytest.raises(ChannelLost):
            while True:
                heard.append(receiver.receive())
        assert heard == sent[: len(heard)]
        if change is flip:
            assert len(heard) < 2


def test_silence_is_a_loss(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = meet(*sockets, silence=0.3)
    with pytest.raises(ChannelLost, match=r"was silent for 0\.3 s"):
        leader.receive()
    with pytest.raises(ChannelLost, match=r"took nothing for 0\.3 s"):
        for _ in range(100):
            follower.send(bytes(2**20))


def test_an_end_is_a_loss(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = meet(*sockets)
    follower.close()
    with pytest.raises(ChannelLost, match="is gone"):
        leader.receive()


def test_a_length_beyond_all_messages_takes_no_memory(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    leader, follower = meet(*sockets)
    sockets[1].sendall(struct.pack(">IQ", 2**32 - 1, 0))
    with pytest.raises(ChannelLost, match="sent no message 0"):
        leader.receive()
    follower.close()


def test_the_hash_is_keyed_and_chained() -> None:
    """The check is BLAKE2b as its RFC has it, over what the protocol says."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = Channel(ours, b"k" * 32, bytes(32), 1.0)
        sender.send(b"first")
        sender.send(b"second")
        data = theirs.recv(1000)
    last = bytes(16)
    for number, message in enumerate([b"first", b"second"]):
        frame = struct.pack(">IQ", len(message), number) + message
        last = hashlib.blake2b(last + frame, digest_size=16, key=b"k" * 32).digest()
        assert data.startswith(frame + last)
        data = data[len(frame) + 16 :]
