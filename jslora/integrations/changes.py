"""What administrators changed while an application runs: numbered, so that all replicas follow.

Invariants: numbers only grow; who obeys, in the order given, every change with a number above those
it has obeyed is where everybody else is, whether it starts from nothing or from any number. Of an
adapter only the last change is kept: a load in the place of its first, so that an alias finds what
it leads to, and an unload where it happened, when no alias led there any more. Aliases keep all of
theirs, for what they may be rolled back to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

LOAD, UNLOAD, ALIASES = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/aliases/"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """A request as the ingress read it and a replica answers it.

    Attributes:
        headers: lower-case names and values.
        changes: the number of the last change that its answer must follow.
        alike: requests for the same adapter that wait for their answers, with this one.
    """

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    changes: int = 0
    alike: int = 1

    @property
    def is_change(self) -> bool:
        """Whether it asks for a change of what is served."""
        return self.method != "GET" and (
            self.path in (LOAD, UNLOAD) or self.path.startswith(ALIASES)
        )


@dataclass(frozen=True, slots=True)
class Change:
    number: int
    call: HttpRequest


class ChangeLog:
    """The changes in force.

    Attributes:
        last: the number of the last change; 0 before the first.
    """

    def __init__(self) -> None:
        self.last = 0
        self._changes: dict[str, Change] = {}

    def add(self, call: HttpRequest) -> None:
        """Note a change that was obeyed first here."""
        self.put([Change(self.last + 1, _repeatable(call))])

    def put(self, changes: Sequence[Change]) -> None:
        """Note changes that were obeyed elsewhere first, as `after` gave them."""
        for change in changes:
            if change.call.path == UNLOAD:
                self._changes.pop(_place(change), None)
            self._changes[_place(change)] = change
            self.last = max(self.last, change.number)

    def after(self, number: int) -> list[Change]:
        """What is to be obeyed, in this order, by who has obeyed `number`."""
        return [change for change in self._changes.values() if change.number > number]


def _place(change: Change) -> str:
    """Changes of one adapter share a place; no others do."""
    if change.call.path.startswith(ALIASES):
        return f"change {change.number}"
    return f"adapter {msgspec.json.decode(change.call.body)['lora_name']}"


def _repeatable(call: HttpRequest) -> HttpRequest:
    """A change for who may have the adapter already, from its configuration."""
    if call.path != LOAD:
        return call
    body = msgspec.json.decode(call.body) | {"load_inplace": True}
    return replace(call, body=msgspec.json.encode(body))
