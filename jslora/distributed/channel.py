"""A connection of two processes that share a token: numbered messages under a chained hash.

Each side proves that it knows the token by an HMAC over both sides' fresh random numbers before it
is told anything else; a stranger gets a protocol number and sixteen random bytes. From then on
each message carries its number and a keyed hash over the hash before it, its number and itself: a
message that was changed, lost, repeated or put between others is noticed before it is obeyed, and
the connection is of no use any more. Nothing is secret on the wire. Messages are bounded in size,
waits in time. Host only: no jax.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time

PROTOCOL = 1
PATIENCE = 5.0
"""Seconds that a stranger may take to prove that it is none."""

MAX_MESSAGE = 2**28
"""Bytes; a step with every array whole has a few million."""

_MAGIC = b"jslora control %d\n"
_NONCE = 16
_PROOF = 32
_CHECK = 16
_HEADER = struct.Struct(">IQ")  # length, number


class ChannelLost(Exception):
    """The connection can no more be used, for the reason that the text says."""


class Channel:
    """One end. `send` may be called from any thread, `receive` from one.

    Args:
        silence: seconds after which a peer that says nothing, or takes nothing, is lost.
    """

    def __init__(
        self, connection: socket.socket, send_key: bytes, receive_key: bytes, silence: float
    ) -> None:
        connection.settimeout(silence)
        self._socket, self._silence = connection, silence
        self._lock = threading.Lock()
        self._sent, self._received = _Chain(send_key), _Chain(receive_key)

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            ChannelLost: the peer is gone, or has not taken anything for too long.
        """
        assert len(message) <= MAX_MESSAGE, f"a message of {len(message)} bytes"
        with self._lock:
            header = _HEADER.pack(len(message), self._sent.count)
            frame = b"".join((header, message, self._sent.next(header, message)))
            try:
                self._socket.sendall(frame)
            except TimeoutError:
                raise ChannelLost(f"took nothing for {self._silence:g} s") from None
            except OSError as error:
                raise ChannelLost(f"is gone ({error.strerror or error})") from None

    def receive(self) -> bytes:
        """Wait for the next message.

        Raises:
            ChannelLost: the peer is gone, was silent for too long, or this is not its message.
        """
        header = self._read(_HEADER.size)
        length, number = _HEADER.unpack(header)
        expected = self._received.count
        if length > MAX_MESSAGE or number != expected:
            raise ChannelLost(f"sent no message {expected}, but one numbered {number}")
        message = self._read(length)
        if not hmac.compare_digest(self._read(_CHECK), self._received.next(header, message)):
            raise ChannelLost(f"sent a message {expected} that was changed on its way")
        return message

    def close(self) -> None:
        """End the connection; a thread in `receive` wakes up."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int) -> bytes:
        try:
            return _read(self._socket, count)
        except TimeoutError:
            raise ChannelLost(f"was silent for {self._silence:g} s") from None
        except OSError as error:
            raise ChannelLost(f"is gone ({error.strerror or error})") from None


class _Chain:
    """One direction's hashes."""

    def __init__(self, key: bytes) -> None:
        self._key, self._last = key, bytes(_CHECK)
        self.count = 0

    def next(self, header: bytes, message: bytes) -> bytes:
        found = hashlib.blake2b(self._last, digest_size=_CHECK, key=self._key)
        found.update(header)
        found.update(message)
        self._last = found.digest()
        self.count += 1
        return self._last


# Meeting ------------------------------------------------------------------------------------------


def meet_follower(connection: socket.socket, token: bytes, silence: float) -> Channel:
    """The leader's side of a new connection.

    Raises:
        ChannelLost: the other side does not know the token, or is none of ours.
    """
    mine = secrets.token_bytes(_NONCE)
    clock = _Deadline(connection)
    clock.send(_magic() + mine)
    theirs = _check_magic(clock.read(len(_magic()) + _NONCE))
    if not hmac.compare_digest(clock.read(_PROOF), _prove(token, b"follower", mine, theirs)):
        raise ChannelLost("does not know the token")
    clock.send(_prove(token, b"leader", mine, theirs))
    keys = [_prove(token, name, mine, theirs) for name in (b"orders", b"answers")]
    return Channel(connection, keys[0], keys[1], silence)


def meet_leader(connection: socket.socket, token: bytes, silence: float) -> Channel:
    """The follower's side of a new connection.

    Raises:
        ChannelLost: as `meet_follower`.
    """
    mine = secrets.token_bytes(_NONCE)
    clock = _Deadline(connection)
    theirs = _check_magic(clock.read(len(_magic()) + _NONCE))
    clock.send(_magic() + mine + _prove(token, b"follower", theirs, mine))
    if not hmac.compare_digest(clock.read(_PROOF), _prove(token, b"leader", theirs, mine)):
        raise ChannelLost("does not know the token")
    keys = [_prove(token, name, theirs, mine) for name in (b"orders", b"answers")]
    return Channel(connection, keys[1], keys[0], silence)


class _Deadline:
    """Reads and writes of a stranger's, all within `PATIENCE`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._end = connection, time.monotonic() + PATIENCE
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, count: int) -> bytes:
        found = b""
        try:
            while len(found) < count:
                self._socket.settimeout(max(self._end - time.monotonic(), 0.001))
                found += _read(self._socket, min(count - len(found), 1024), whole=False)
        except OSError as error:
            raise ChannelLost(f"did not say who it is ({error.strerror or error})") from None
        return found

    def send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(max(self._end - time.monotonic(), 0.001))
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelLost(f"is gone ({error.strerror or error})") from None


def _read(connection: socket.socket, count: int, *, whole: bool = True) -> bytes:
    """`count` bytes, or some of them; raises OSError where there will be no more."""
    found = bytearray()
    while len(found) < count:
        part = connection.recv(min(count - len(found), 2**20))
        if not part:
            raise ConnectionResetError("it closed the connection")
        found += part
        if not whole:
            break
    return bytes(found)


def _magic() -> bytes:
    return _MAGIC % PROTOCOL


def _check_magic(greeting: bytes) -> bytes:
    """The random bytes after the magic."""
    magic = _magic()
    if greeting[: len(magic)] != magic:
        raise ChannelLost(f"does not speak {magic.decode().strip()!r}")
    return greeting[len(magic) :]


def _prove(token: bytes, what: bytes, leaders: bytes, followers: bytes) -> bytes:
    return hmac.digest(token, b"jslora " + what + b"\0" + leaders + followers, "sha256")
