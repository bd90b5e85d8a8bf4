"""Aliases: one name for several models by weight, so that a share of the requests tries a new one.

An alias changes in one step and remembers what it was before, so that a bad change is undone by one
call. A pick with a key (a user, a conversation) depends on the alias's name, its targets and the
key alone, wherever it is made; when weights change, only as many keys move as must. Whether targets
exist is for the owner of the table to check. Every method may be called from any thread. Host only:
no jax.
"""

import hashlib
import math
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from jslora.config import NAME
from jslora.errors import InvalidRequest, UnknownModel
from jslora.logs import printable

MAX_TARGETS = 16
MAX_ALIASES = 1024


@dataclass(frozen=True, slots=True)
class Alias:
    """Weights of the targets by name, and those before the last change."""

    targets: Mapping[str, float]
    previous: Mapping[str, float] | None = None


class AliasTable:
    """The aliases of one server or engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._aliases: dict[str, Alias] = {}

    def put(self, name: str, targets: Mapping[str, float]) -> Alias:
        """Make an alias, or change it; `rollback` undoes that. To say the same again does nothing.

        Raises:
            InvalidRequest: the name cannot be used, there are not 1 to `MAX_TARGETS` targets, a
                weight is not a finite number above zero, or there are `MAX_ALIASES` others.
        """
        if not re.fullmatch(NAME, name):
            raise InvalidRequest(f"{printable(name)!r} is no alias; expected is {NAME}")
        checked = _checked(targets)
        with self._lock:
            before = self._aliases.get(name)
            if before is None and len(self._aliases) >= MAX_ALIASES:
                raise InvalidRequest(f"there are {MAX_ALIASES} aliases already")
            if before is None or before.targets != checked:
                self._aliases[name] = Alias(checked, before.targets if before else None)
            return self._aliases[name]

    def rollback(self, name: str) -> Alias:
        """Swap the targets with those before the last change.

        Raises:
            UnknownModel: there is no such alias.
            InvalidRequest: it was never changed.
        """
        with self._lock:
            alias = self._find(name)
            if alias.previous is None:
                raise InvalidRequest(f"alias {name!r} was never changed", param="name")
            self._aliases[name] = Alias(alias.previous, alias.targets)
            return self._aliases[name]

    def remove(self, name: str) -> Alias:
        """Take an alias away.

        Raises:
            UnknownModel: there is no such alias.
        """
        with self._lock:
            alias = self._find(name)
            del self._aliases[name]
            return alias

    def pick(self, name: str, key: str | None = None) -> str:
        """A target drawn by weight: at random, or always the same for one key.

        Weighted rendezvous hashing: each target draws an exponential time with its weight as the
        rate from a hash of it and the key, and the first to come is picked.

        Raises:
            UnknownModel: there is no such alias.
        """
        with self._lock:
            targets = self._find(name).targets
        key = secrets.token_hex(8) if key is None else key

        def time(target: str) -> float:
            return -math.log(_uniform(name, target, key)) / targets[target]

        return min(sorted(targets), key=time)

    def get(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._aliases)

    def targets_of(self, target: str) -> list[str]:
        """Aliases that lead to `target` now."""
        with self._lock:
            return sorted(n for n, alias in self._aliases.items() if target in alias.targets)

    def _find(self, name: str) -> Alias:
        if name not in self._aliases:
            raise UnknownModel(f"there is no alias {printable(name)!r}", param="name")
        return self._aliases[name]


def _checked(targets: Mapping[str, float]) -> dict[str, float]:
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise InvalidRequest(
            f"an alias has 1 to {MAX_TARGETS} targets, not {len(targets)}", param="targets"
        )
    found = {}
    for target, weight in targets.items():
        try:
            found[target] = float(weight)
        except OverflowError:
            found[target] = math.inf
        if not 0 < found[target] < math.inf:
            raise InvalidRequest(
                f"the weight of {printable(target)} is {printable(weight)}; "
                "finite numbers above zero are expected",
                param="targets",
            )
    return found


def _uniform(*parts: str) -> float:
    """A number above 0 and below 1 that depends on nothing else."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return ((number >> 12) + 0.5) / 2**52
