"""A follower's connection to its leader: found, welcomed, and then heard to the end.

Invariant: once welcomed, a follower has no life of its own; a leader that closes the connection, is
silent for too long, or whose message was changed on its way, is the end (`lost`, called once at
most). Host only: no jax.
"""

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from jslora.distributed import messages
from jslora.distributed.channel import PATIENCE, Channel, ChannelLost, meet_leader
from jslora.distributed.links import BEATS, REMIND_SECONDS
from jslora.distributed.messages import Answer, Order
from jslora.distributed.section import DistributedSection
from jslora.errors import ConfigError
from jslora.logs import printable

_PAUSE = 0.5  # seconds between two tries to find the leader

log = logging.getLogger("jslora.distributed")


class Uplink:
    """The connection of process `section.process_id`.

    Args:
        agreed: what this process was started with (see `agreement`).
        lost: called from any thread with the reason for which the group has ended.
    """

    def __init__(
        self, section: DistributedSection, agreed: dict[str, str], lost: Callable[[str], None]
    ) -> None:
        self._section, self._agreed, self._lost = section, agreed, lost
        self._token = section.secret()
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._channel: Channel

    def join(self) -> None:
        """Find the leader, however long it takes, and wait until the group is complete.

        Raises:
            ConfigError: the leader refused this process.
        """
        remind = time.monotonic()
        while True:
            try:
                self._channel = self._meet()
                break
            except (ChannelLost, OSError) as error:
                if time.monotonic() >= remind:
                    remind += REMIND_SECONDS
                    where = f"{self._section.leader_host} port {self._section.control_port}"
                    log.info("looking for the leader at %s: it %s", where, printable(error))
                time.sleep(_PAUSE)
        log.info("welcomed as process %d", self._section.process_id)
        for target in (self._hear, self._beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        order = self.next()
        assert isinstance(order, messages.Begin), f"{type(order).__name__} before the beginning"

    def next(self) -> Order:
        """Wait for the next order."""
        return self._orders.get()

    def say(self, answer: Answer) -> None:
        """Tell the leader something, from any thread; what it cannot hear any more is dropped."""
        with contextlib.suppress(ChannelLost):  # `_hear` notices
            self._channel.send(messages.encode(answer))

    def close(self) -> None:
        """Part from the leader in peace."""
        self._ended.set()
        self._channel.close()

    def _meet(self) -> Channel:
        """A channel on which this process was welcomed."""
        address = self._section.leader_host, self._section.control_port
        connection = socket.create_connection(address, timeout=PATIENCE)
        try:
            channel = meet_leader(connection, self._token, self._section.heartbeat_seconds)
            hello = messages.Hello(self._section.process_id, self._agreed)
            channel.send(messages.encode(hello))
            answer = messages.decode_order(channel.receive())
        except BaseException:
            connection.close()
            raise
        if not isinstance(answer, messages.Welcome):
            channel.close()
        if isinstance(answer, messages.Refused):
            reason = printable(answer.reason, messages.MAX_TEXT)
            raise ConfigError(f"the leader refuses process {self._section.process_id}: {reason}")
        if not isinstance(answer, messages.Welcome):
            raise ChannelLost(f"said {type(answer).__name__} for a welcome")
        return channel

    def _hear(self) -> None:
        """Every order, until one was not meant."""
        try:
            while True:
                order = messages.decode_order(self._channel.receive())
                if not isinstance(order, messages.Beat):
                    self._orders.put(order)
        except ChannelLost as error:
            reason = str(error)
        except msgspec.DecodeError as error:
            reason = f"said what no leader says ({printable(error)})"
        if not self._ended.is_set():
            self._ended.set()
            self.say(messages.Failed(f"the leader {reason}"[: messages.MAX_TEXT]))
            self._lost(f"the leader {reason}")
            self._channel.close()

    def _beat(self) -> None:
        while not self._ended.wait(self._section.heartbeat_seconds / BEATS):
            self.say(messages.Beat())
