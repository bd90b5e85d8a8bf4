"""The leader's connections to its followers: who is here, what they say, and when one is lost.

`gather` waits until every process has come, shown that it knows the token and was started with the
same configuration; whoever was not is told so and may try again. From then on the group lives and
ends as one: a follower that closes its connection, is silent for too long, gives up, or says what
none would, ends it. Invariants: every follower is sent the same orders; `lost` is called once at
most, and afterwards nothing is sent. Host only: no jax.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from jslora.distributed import messages
from jslora.distributed.agreement import differences
from jslora.distributed.channel import Channel, ChannelLost, meet_follower
from jslora.distributed.interface import address_of
from jslora.distributed.messages import Answer, Order
from jslora.distributed.section import DistributedSection
from jslora.errors import ConfigError, EngineFailed
from jslora.logs import printable

BEATS = 4
"""Heartbeats in the time after which silence is a loss."""

MAX_STRANGERS = 16
"""Connections at a time that have not shown the token yet; one more, and the oldest is closed."""

REMIND_SECONDS = 30.0

log = logging.getLogger("jslora.distributed")


class Links:
    """All followers of one group.

    Args:
        agreed: what every process must have been started with (see `agreement`).
        lost: called from any thread with the reason for which the group has ended; it calls nothing
            here.
    """

    def __init__(
        self, section: DistributedSection, agreed: dict[str, str], lost: Callable[[str], None]
    ) -> None:
        self._section, self._agreed, self._lost = section, agreed, lost
        self._token = section.secret()
        self._followers = range(1, section.num_processes)
        self._handlers: dict[type, Callable[[int, Any], None]] = {}
        self._changed = threading.Condition()
        # Below here everything is written under the condition's lock.
        self._channels: dict[int, Channel] = {}
        self._strangers: dict[socket.socket, None] = {}  # the oldest first
        self._unlogged, self._log_at = 0, 0.0  # of strangers that were sent away
        self._begun = self._stopping = False
        self._ended: str | None = None

    @property
    def followers(self) -> range:
        """Numbers of the processes that are led."""
        return self._followers

    @property
    def ended(self) -> str | None:
        """Why the group has ended; None while it lives."""
        return self._ended

    def on(self, kind: type[Any], handler: Callable[[int, Any], None]) -> None:
        """Let answers of this kind go to `handler(process, answer)`, on their process's thread."""
        self._handlers[kind] = handler

    def check(self) -> None:
        """Raise if the group has ended.

        Raises:
            EngineFailed: it has, with the reason.
        """
        if self._ended is not None:
            raise EngineFailed(f"the group of processes has ended: {self._ended}")

    def send(self, order: Order | bytes) -> None:
        """Tell every follower that is here, from any thread.

        Raises:
            EngineFailed: the group has ended.
        """
        data = order if isinstance(order, bytes) else messages.encode(order)
        self.check()
        for process, channel in list(self._channels.items()):
            try:
                channel.send(data)
            except ChannelLost as error:
                self._gone(process, channel, str(error))
        self.check()

    def lose(self, reason: str) -> None:
        """End the group."""
        with self._changed:
            if self._ended is not None:
                return
            log.error("the group has ended: %s", reason)
            self._lost(reason)  # before anybody fails because of it
            self._ended = reason
        self._hang_up()

    def close(self) -> None:
        """Tell the followers to stop, and wait a moment until they have."""
        with self._changed:
            self._stopping = True
        with contextlib.suppress(EngineFailed):
            self.send(messages.Stop())
        with self._changed:
            self._ended = self._ended or "the engine was closed"
            self._changed.wait_for(lambda: not self._channels, self._section.heartbeat_seconds)
        self._hang_up()

    def _hang_up(self) -> None:
        for channel in list(self._channels.values()):
            channel.close()

    # Gathering -----------------------------------------------------------------------------------

    def gather(self) -> None:
        """Wait until all are here.

        Raises:
            ConfigError: the control channel cannot listen where it should.
        """
        with self._listen() as listener:
            threading.Thread(target=self._beat, name="beat", daemon=True).start()
            listener.settimeout(0.2)
            remind = time.monotonic() + REMIND_SECONDS
            while not self._begin():
                with contextlib.suppress(TimeoutError):
                    self._admit(*listener.accept())
                if time.monotonic() > remind:
                    remind += REMIND_SECONDS
                    missing = sorted({*self._followers} - self._channels.keys())
                    log.info("still waiting for processes %s", missing)
        self.send(messages.Begin())
        log.info("all %d processes are here", self._section.num_processes)

    def _listen(self) -> socket.socket:
        address = address_of(self._section), self._section.control_port
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            listener = socket.create_server(address, family=family, backlog=MAX_STRANGERS)
        except OSError as error:
            raise ConfigError(
                f"distributed.control_port: cannot listen on {address[0]} port {address[1]} "
                f"({error.strerror})"
            ) from None
        log.info("waiting for %d processes at %s port %d", len(self._followers), *address)
        return listener

    def _begin(self) -> bool:
        with self._changed:
            self._begun = len(self._channels) == len(self._followers)
            return self._begun

    def _admit(self, connection: socket.socket, peer: tuple[Any, ...]) -> None:
        """Hear who a stranger is, on a thread of its own."""
        with self._changed:
            self._strangers[connection] = None
            if len(self._strangers) > MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                with contextlib.suppress(OSError):  # it may be gone
                    oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it

        def meet() -> None:
            try:
                self._meet(connection)
            except (ChannelLost, msgspec.DecodeError) as error:
                connection.close()
                self._log_stranger(peer[0], error)
            finally:
                self._is_known(connection)

        threading.Thread(target=meet, name="meet", daemon=True).start()

    def _is_known(self, connection: socket.socket) -> None:
        with self._changed:
            self._strangers.pop(connection, None)

    def _log_stranger(self, host: str, error: Exception) -> None:
        with self._changed:
            if time.monotonic() < self._log_at:
                self._unlogged += 1
                return
            self._log_at, others, self._unlogged = time.monotonic() + 1.0, self._unlogged, 0
        log.warning("%s wanted to join, but %s (and %d others)", host, printable(error), others)

    def _meet(self, connection: socket.socket) -> None:
        channel = meet_follower(connection, self._token, self._section.heartbeat_seconds)
        self._is_known(connection)  # it has the token
        hello = messages.decode_answer(channel.receive())
        if not isinstance(hello, messages.Hello):
            raise ChannelLost("did not say hello")
        reason = self._refusal(hello)
        with self._changed:
            if reason is None and hello.process_id in self._channels:
                reason = f"process {hello.process_id} is here already"
            if reason is None:
                channel.send(messages.encode(messages.Welcome()))  # before anything else is sent
                self._channels[hello.process_id] = channel
        if reason is not None:
            log.error("process %d is refused: %s", hello.process_id, reason)
            channel.send(messages.encode(messages.Refused(reason[: messages.MAX_TEXT])))
            channel.close()
            return
        log.info("process %d is here", hello.process_id)
        name = f"from-{hello.process_id}"
        hear = threading.Thread(
            target=self._hear, args=(hello.process_id, channel), name=name, daemon=True
        )
        hear.start()

    def _refusal(self, hello: messages.Hello) -> str | None:
        if hello.process_id not in self._followers:
            return f"process_id is {hello.process_id}; followers are {[*self._followers]}"
        return "; ".join(differences(self._agreed, hello.agreed, hello.process_id)) or None

    # Hearing -------------------------------------------------------------------------------------

    def _hear(self, process: int, channel: Channel) -> None:
        """Everything a follower says, until it says no more."""
        try:
            while True:
                self._take(process, messages.decode_answer(channel.receive()))
        except ChannelLost as error:
            reason = str(error)
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            reason = f"said what no follower says ({printable(error)})"
        except EngineFailed:
            reason = "was there when the group ended"
        except Exception as error:
            log.exception("an answer of process %d could not be taken", process)
            reason = f"said what could not be taken ({type(error).__name__}: {printable(error)})"
        self._gone(process, channel, reason)

    def _take(self, process: int, answer: Answer) -> None:
        match answer:
            case messages.Beat():
                pass
            case messages.Failed(reason):
                raise ChannelLost(f"gave up: {printable(reason, messages.MAX_TEXT)}")
            case _:
                self._handlers[type(answer)](process, answer)

    def _gone(self, process: int, channel: Channel, reason: str) -> None:
        """A follower is lost: the group with it, if it has begun and was not told to stop."""
        with self._changed:
            if self._channels.get(process) is not channel:
                return  # it was noticed before, and may have come back since
            if self._begun and not self._stopping:
                self.lose(f"process {process} {reason}")  # first, so that nobody leads the rest
            del self._channels[process]
            self._changed.notify_all()
        channel.close()
        log.info("process %d %s", process, reason)

    def _beat(self) -> None:
        beat = messages.encode(messages.Beat())
        while self._ended is None:
            with contextlib.suppress(EngineFailed):
                self.send(beat)
            time.sleep(self._section.heartbeat_seconds / BEATS)
