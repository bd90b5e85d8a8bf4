"""Work off the caller's thread, by key: one job at a time for each, its failure told once.

There are two threads: short jobs run on one, and hand what turns out to be long to the other, so
that a file of gigabytes delays nobody whose blob is at hand. Host only: no jax.
"""

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jslora.errors import AdapterRejected

Task = Callable[[], Any]
"""A job; what it returns, unless it is None, is the long rest of it, again a `Task`."""

log = logging.getLogger(__name__)


class Jobs:
    """Jobs of one store; every method may be called from any thread, and none waits but `close`."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "adapter-mapper")
        self._long = ThreadPoolExecutor(1, "adapter-reader")
        self._lock = threading.Lock()
        self._closed = False
        # Below here everything is read and written under the lock.
        self._running: dict[Hashable, bool] = {}  # whether its failure is to be told
        self._failures: dict[Hashable, str] = {}

    def want(self, key: Hashable, task: Task, *, long: bool = False) -> None:
        """Start a job unless it runs.

        Raises:
            AdapterRejected: the last one failed; the next call starts another.
        """
        with self._lock:
            failure = self._failures.pop(key, None)
            if failure is None:
                self._start(key, task, long)
        if failure is not None:
            raise AdapterRejected(failure)

    def start(self, key: Hashable, task: Task, *, long: bool = False) -> None:
        """As `want`, whatever became of the last one."""
        with self._lock:
            self._failures.pop(key, None)
            self._start(key, task, long)

    def runs(self, key: Hashable) -> bool:
        return key in self._running

    def forget(self, key: Hashable) -> None:
        """Nobody will ask how the job ended."""
        with self._lock:
            self._failures.pop(key, None)
            if key in self._running:
                self._running[key] = False

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        with self._lock:
            self._closed = True
        self._short.shutdown(cancel_futures=True)
        self._long.shutdown(cancel_futures=True)

    def _start(self, key: Hashable, task: Task, long: bool) -> None:
        runs = key in self._running
        self._running[key] = True
        if not runs and not self._closed:
            (self._long if long else self._short).submit(self._run, key, task)

    def _run(self, key: Hashable, task: Task) -> None:
        try:
            rest = task()
        except BaseException as error:
            if not isinstance(error, AdapterRejected):
                log.exception("reading an adapter failed")
            with self._lock:
                if self._running.pop(key):
                    self._failures[key] = public(error)
            return
        with self._lock:
            if rest is None:
                del self._running[key]
            elif not self._closed:
                self._long.submit(self._run, key, rest)


def public(error: BaseException) -> str:
    """What may be told of an error: all of ours, of others that there was one."""
    return error.message if isinstance(error, AdapterRejected) else "internal error"
