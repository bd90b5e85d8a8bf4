"""A follower's part of adapters on their way to its devices; the other end of `transfers`.

Invariant: a chunk that the leader was told of stays here until it is written, or the leader says
that its transfer failed or the pool is made anew. Host only: no jax.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from jslora.batch import Geometry
from jslora.calls import Chunk
from jslora.distributed import messages
from jslora.distributed.shelf import Shelf
from jslora.errors import AdapterRejected
from jslora.memory.residency import chunks

_THREADS = 2  # the leader reads one large adapter at a time, and small ones beside it

log = logging.getLogger("jslora.distributed")


class Deliveries:
    """Adapters that are read, and chunks that are transferred.

    Args:
        upload: of this process's device; its chunks have `upload_rows` rows.
        say: tells the leader; from any thread.
    """

    def __init__(
        self, shelf: Shelf, geometry: Geometry, upload: Callable[[Chunk], "Future[Any]"],
        upload_rows: int, say: Callable[[messages.Answer], None],
    ) -> None:  # fmt: skip
        self._shelf, self._geometry, self._say = shelf, geometry, say
        self._upload, self._upload_rows = upload, upload_rows
        self._jobs = ThreadPoolExecutor(_THREADS, "adapters")
        self._lock = threading.Lock()
        self._wanted: set[int] = set()  # transfers that may still be written
        self._ready: dict[tuple[int, int], tuple[Any, bool]] = {}  # and whether it is the last

    def prepare(self, order: messages.Prepare) -> None:
        """Read an adapter and say what it is."""
        self._jobs.submit(self._prepare, order)

    def bring(self, order: messages.Bring) -> None:
        """Start a transfer."""
        with self._lock:
            self._wanted.add(order.number)
        self._jobs.submit(self._bring, order)

    def forget(self, digest: str) -> None:
        self._shelf.forget(digest)

    def take(self, order: messages.Write) -> Any:
        """A chunk that is to be written now.

        Raises:
            KeyError: it is not here, so the leader cannot have been told of it.
        """
        with self._lock:
            sent, last = self._ready.pop((order.number, order.index))
            if last:  # they are written in order
                self._wanted.discard(order.number)
        return sent

    def drop(self, number: int) -> None:
        """A transfer failed somewhere."""
        self._drop(lambda other: other == number)

    def reset(self) -> None:
        """The pool is made anew; no transfer is for it."""
        self._drop(lambda other: True)

    def close(self) -> None:
        self._jobs.shutdown(cancel_futures=True)

    def _drop(self, gone: Callable[[int], bool]) -> None:
        with self._lock:
            self._wanted = {number for number in self._wanted if not gone(number)}
            self._ready = {key: sent for key, sent in self._ready.items() if not gone(key[0])}

    def _prepare(self, order: messages.Prepare) -> None:
        try:
            digest = self._shelf.read(order.root, order.path, order.storage)
            answer = messages.Prepared(order.seq, digest)
        except Exception as error:
            answer = messages.Prepared(order.seq, error=_told(error))
        self._say(answer)

    def _bring(self, order: messages.Bring) -> None:
        """Upload a transfer's chunks."""
        geometry = self._geometry
        try:
            place = order.root, order.path, order.storage
            blob = self._shelf.blob(order.digest, len(order.pages), *place)
            parts = chunks(
                order.digest, blob, order.pages, geometry.pages, geometry.drop_page,
                self._upload_rows,
            )  # fmt: skip
            for chunk in parts:
                last = chunk.index == chunk.count - 1
                uploaded = partial(self._uploaded, order.number, chunk.index, last)
                self._upload(chunk).add_done_callback(uploaded)
        except Exception as error:
            self._fail(order.number, error)

    def _uploaded(self, number: int, index: int, last: bool, sent: "Future[Any]") -> None:
        """A chunk is on the devices, or the transfer has failed."""
        error = sent.exception()
        if error is not None:
            self._fail(number, error)
            return
        with self._lock:
            if number not in self._wanted:
                return
            self._ready[number, index] = sent.result(), last
        self._say(messages.Brought(number, index))

    def _fail(self, number: int, error: BaseException) -> None:
        """Tell once that a transfer has failed."""
        with self._lock:
            if number not in self._wanted:
                return
            self._wanted.discard(number)
        self._say(messages.NotBrought(number, _told(error)))


def _told(error: BaseException) -> str:
    """What the leader is told of an error."""
    if isinstance(error, AdapterRejected):
        return error.message[: messages.MAX_TEXT]
    log.error("an adapter could not be had", exc_info=error)
    return "internal error; see its log"
