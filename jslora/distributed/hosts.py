"""The leader's question to all hosts: what is in this adapter's folder, where you are?

First phase of an adapter's way to the devices: every host reads its own copy, below its own root of
the same number, packs its own part, and says the digest of the whole. Only contents that are the
same everywhere are kept by the store, and so can be registered or brought to the devices. Host
only: no jax.
"""

import contextlib
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from jslora.distributed import messages
from jslora.distributed.links import Links
from jslora.errors import AdapterRejected, EngineFailed
from jslora.logs import printable

PATIENCE = 300.0
"""Seconds that a host may take to read an adapter."""

_Answers = dict[int, messages.Prepared]  # by process

MAX_PLACES = 2**17
"""Contents that are known to have been agreed on, those agreed on last."""

_LOOK = 0.2  # seconds between two looks at whether the group lives

Place = tuple[int, str, str]
"""Number of a root, a folder's path below it, and how its adapter is stored."""


class AllHosts:
    """`adapters.hosts.Hosts` over a group's links."""

    def __init__(self, links: Links, roots: Sequence[Path]) -> None:
        self._links = links
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._open: dict[int, _Answers] = {}  # by question, until all have answered
        self._places: OrderedDict[str, Place] = OrderedDict()  # by digest, last agreed on last
        links.on(messages.Prepared, self._hear)

    def ask(self, folder: Path, root: Path, storage: str) -> Callable[[str], None]:
        """See `Hosts.ask`; the answer also raises EngineFailed if the group has ended."""
        place = self._roots.index(root), folder.relative_to(root).as_posix(), storage
        with self._changed:
            seq = next(self._numbers)
            answers = self._open[seq] = {}
        self._links.send(messages.Prepare(seq, *place))
        return lambda digest: self._agree(answers, place, digest)

    def place(self, digest: str) -> Place | None:
        """Where contents lie that were agreed on; None if that is long ago."""
        return self._places.get(digest)

    def agreed(self, digest: str) -> bool:
        """See `Hosts.agreed`."""
        return digest in self._places

    def forget(self, digest: str) -> None:
        """See `Hosts.forget`; where they lie is known on, because they may be asked for again."""
        with contextlib.suppress(EngineFailed):  # a group that has ended has nothing to forget
            self._links.send(messages.Forget(digest))

    def _hear(self, process: int, answer: messages.Prepared) -> None:
        with self._changed:
            answers = self._open[answer.seq]
            answers[process] = answer
            if len(answers) == len(self._links.followers):
                del self._open[answer.seq]
            self._changed.notify_all()

    def _agree(self, answers: _Answers, place: Place, digest: str) -> None:
        self._await(answers)
        for process, answer in sorted(answers.items()):
            if answer.digest is None:
                raise AdapterRejected(
                    f"process {process} cannot serve it: {printable(answer.error, 400)}"
                )
            if answer.digest != digest:
                raise AdapterRejected(
                    f"process {process} has other contents in {printable(place[1])!r}: "
                    f"{answer.digest[:12]} there, {digest[:12]} on process 0"
                )
        with self._changed:
            self._places[digest] = place
            self._places.move_to_end(digest)
            if len(self._places) > MAX_PLACES:
                self._places.popitem(last=False)

    def _await(self, answers: _Answers) -> None:
        """Return when every follower has answered."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while len(answers) < len(self._links.followers):
                self._changed.wait(_LOOK)
                self._links.check()
                if time.monotonic() > deadline:
                    late = sorted({*self._links.followers} - answers.keys())
                    raise AdapterRejected(f"processes {late} did not read it in {PATIENCE:.0f} s")
