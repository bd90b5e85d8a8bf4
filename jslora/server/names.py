"""The names a server answers to: the base's, the adapters' and the aliases'; no two are the same.

Invariants: a name is visible to a key or unknown: nothing falls back to the base, and a name of
somebody else looks like one that does not exist. An alias leads to adapters that are there, or to
the base, and no adapter that an alias leads to is unloaded; who may use an alias may use what it
leads to. Should a restarted engine lack a target, or have an adapter of an alias' name, the alias
stands: its requests end with 404 until the target is back.
"""

from collections.abc import Iterable, Mapping

from jslora.aliases import Alias, AliasTable
from jslora.config import Key
from jslora.errors import InvalidRequest, UnknownModel
from jslora.logs import printable
from jslora.server.auth import may_use
from jslora.server.registry import Adapters


class Names:
    """What `model`, and the names in `adapters`, may be."""

    def __init__(self, base: str, adapters: Adapters) -> None:
        self.base = base
        self._adapters = adapters
        self._aliases = AliasTable()

    def visible(self, key: Key) -> list[str]:
        """What a key may use, the base first."""
        names = {*self._adapters.known, *self._aliases.names()}
        return [self.base, *sorted(name for name in names if may_use(key, name))]

    def resolve(self, model: str, key: Key, user: str = "", *, param: str = "model") -> str | None:
        """The adapter that answers a request for `model`; None for the base.

        Args:
            user: who asks; an alias leads one user to one adapter until it is changed.
            param: the field that names it.

        Raises:
            UnknownModel: nothing of this name is visible to the caller, or the adapter that an
                alias leads to is gone.
        """
        if model == self.base:
            return None
        is_alias = self._aliases.get(model) is not None
        if not may_use(key, model) or not (is_alias or model in self._adapters.known):
            raise UnknownModel(f"the model {printable(model)!r} does not exist", param=param)
        adapter = self._aliases.pick(model, user or None) if is_alias else model
        if adapter == self.base:
            return None
        if adapter not in self._adapters.known:
            raise UnknownModel(f"{adapter!r}, to which {model!r} leads, is gone", param=param)
        return adapter

    # Adapters -------------------------------------------------------------------------------------

    def check_load(self, name: str) -> None:
        """Raise InvalidRequest if `name` is not for adapters."""
        if name == self.base or self._aliases.get(name) is not None:
            raise InvalidRequest(f"the name {name!r} is taken", param="lora_name")

    def check_unload(self, name: str) -> None:
        """Raise InvalidRequest if an alias leads to `name`."""
        if aliases := self._aliases.targets_of(name):
            raise InvalidRequest(
                f"the alias {aliases[0]!r} leads to {name!r}; change or delete it first",
                param="lora_name",
            )

    # Aliases --------------------------------------------------------------------------------------

    def aliases(self, key: Key) -> dict[str, Alias]:
        """The aliases a key may use, by name."""
        names = sorted(name for name in self._aliases.names() if may_use(key, name))
        return {name: self.alias(name, key) for name in names}

    def alias(self, name: str, key: Key) -> Alias:
        """One alias.

        Raises:
            UnknownModel: none of this name is visible to the caller.
        """
        alias = self._aliases.get(name)
        if alias is None or not may_use(key, name):
            raise UnknownModel(f"the alias {printable(name)!r} does not exist", param="name")
        return alias

    def put_alias(self, name: str, targets: Mapping[str, float]) -> Alias:
        """Make or change an alias.

        Raises:
            InvalidRequest: the name is taken, a target does not exist, or as `AliasTable.put`.
        """
        if name == self.base or self._adapters.taken(name):
            raise InvalidRequest(f"the name {name!r} is taken", param="name")
        self._check_targets(targets)
        return self._aliases.put(name, targets)

    def roll_back_alias(self, name: str) -> Alias:
        """Let an alias lead to where it led before its last change.

        Raises:
            UnknownModel: it does not exist.
            InvalidRequest: it was never changed, or what it led to is gone.
        """
        alias = self._aliases.get(name)
        if alias is not None and alias.previous is not None:
            self._check_targets(alias.previous)
        return self._aliases.rollback(name)

    def remove_alias(self, name: str) -> None:
        """Raises UnknownModel if there is no such alias."""
        self._aliases.remove(name)

    def _check_targets(self, targets: Iterable[str]) -> None:
        for target in targets:
            if target != self.base and target not in self._adapters.known:
                raise InvalidRequest(
                    f"targets: no adapter {target!r} is registered; an alias leads to adapters or "
                    f"to the base, {self.base!r}",
                    param="targets",
                )
