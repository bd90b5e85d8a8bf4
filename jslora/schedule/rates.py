"""What tenants and adapters may use at most: requests and tokens a minute, sequences at once.

Rates are token buckets: a bucket holds one minute's worth, fills evenly, and what a request needs
is taken when it is admitted. Tokens of answers are taken as they come, whether or not there are
any left, so a bucket can be in debt; it admits again when it holds what is asked for. A request
that is larger than the whole bucket is admitted when the bucket is full, and leaves a debt.

Invariants: a request is taken from all buckets it is under or from none; over any window, no more
is admitted than one bucket and what flows into it; nothing is remembered of who has full buckets
and nothing outstanding, and nothing at all of who has no limit. Host only: no jax.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from jslora.errors import RateLimited
from jslora.schedule.settings import Quota, Tenant

LONGEST_RETRY = 3600.0
"""Seconds that nobody is told to wait longer than."""

_UNKNOWN_RETRY = 1.0  # seconds; nobody knows when an answer under way will end
_SLACK = 1e-6  # seconds that a bucket may lack: a clock's rounding must refuse nobody
_FEW = 64  # groups that are not worth looking through for idle ones


@dataclass(slots=True)
class _Bucket:
    """Holds at most `size`, which flows in within a minute; `level` is as of `at`, in seconds."""

    size: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        if now > self.at:
            self.level = min(self.size, self.level + (now - self.at) * self.size / 60)
            self.at = now

    def wait(self, amount: float) -> float:
        """Seconds from the last filling until so much may be taken."""
        seconds = (min(amount, self.size) - self.level) * 60 / self.size
        return seconds if seconds > _SLACK else 0.0


class _Group:
    """The buckets and the outstanding sequences of one tenant or adapter."""

    def __init__(self, title: str, quota: Quota, now: float) -> None:
        self.title, self.quota, self.outstanding = title, quota, 0
        per_minute = quota.requests_per_minute, quota.tokens_per_minute
        self.requests, self.tokens = (_Bucket(n, n, now) if n else None for n in per_minute)

    def fill(self, now: float) -> None:
        for bucket in (self.requests, self.tokens):
            if bucket:
                bucket.fill(now)

    @property
    def idle(self) -> bool:
        full = all(b is None or b.level >= b.size for b in (self.requests, self.tokens))
        return full and not self.outstanding

    def take(self, requests: int, tokens: int) -> None:
        if self.requests:
            self.requests.level -= requests
        if self.tokens:
            self.tokens.level -= tokens

    def refusals(self, prompt_tokens: int) -> Iterator[tuple[float, str]]:
        """Why a request cannot come in, and for how many seconds."""
        quota = self.quota
        if quota.max_outstanding is not None and self.outstanding >= quota.max_outstanding:
            yield (
                _UNKNOWN_RETRY,
                (
                    f"{self.title} has {self.outstanding} requests running or waiting; "
                    f"max_outstanding is {quota.max_outstanding}"
                ),
            )
        if self.requests and (seconds := self.requests.wait(1)):
            yield (
                seconds,
                (
                    f"{self.title} has {self.requests.level:.2f} requests left; "
                    f"requests_per_minute is {quota.requests_per_minute:g}"
                ),
            )
        if self.tokens and (seconds := self.tokens.wait(prompt_tokens)):
            yield (
                seconds,
                (
                    f"{self.title} has {math.floor(self.tokens.level)} tokens left for a prompt of "
                    f"{prompt_tokens}; tokens_per_minute is {quota.tokens_per_minute:g}"
                ),
            )


class _Side:
    """All tenants, or all adapters: which of them have limits, and those in use."""

    def __init__(self, word: str, quotas: Mapping[str, Quota]) -> None:
        limited = {name: quota if _limits(quota) else None for name, quota in quotas.items()}
        self._word, self._others = word, limited.pop("*", None)
        self._listed = limited
        self._groups: dict[str, _Group] = {}
        self._many = _FEW

    @property
    def limits(self) -> bool:
        """Whether any of them has a limit."""
        return self._others is not None or any(self._listed.values())

    def filled(self, name: str, now: float) -> _Group | None:
        """The group as of now, new if it is not known; None without limits."""
        quota = self._listed.get(name, self._others)
        if quota is None:
            return None
        group = self._groups.get(name) or _Group(f"{self._word} {name!r}", quota, now)
        group.fill(now)
        return group

    def keep(self, name: str, group: _Group, now: float) -> None:
        """Remember a group; at times, forget those that are as if they had never been."""
        if len(self._groups) >= self._many:
            for other in self._groups.values():
                other.fill(now)
            self._groups = {n: g for n, g in self._groups.items() if not g.idle}
            self._many = max(_FEW, 2 * len(self._groups))
        self._groups[name] = group

    def known(self, name: str) -> _Group | None:
        """The group of who has something outstanding; None without limits."""
        if self._listed.get(name, self._others) is None:
            return None
        group = self._groups.get(name)
        assert group and group.outstanding > 0, f"{self._word} {name!r} has nothing outstanding"
        return group


class Rates:
    """Limits by name, where "*" is the setting of every name not listed, each counted by itself."""

    def __init__(self, tenants: Mapping[str, Tenant], adapters: Mapping[str, Quota]) -> None:
        self._tenants, self._adapters = _Side("tenant", tenants), _Side("adapter", adapters)

    def admit(self, tenant: str, adapters: Iterable[str], prompt_tokens: int, now: float) -> None:
        """Take one request and its prompt from every bucket it is under; it is outstanding then.

        Args:
            adapters: names, none for the base model.
            now: seconds on a clock that does not go back.

        Raises:
            RateLimited: a limit of the tenant or the adapter is reached, and nothing was taken;
                `retry_after` is when it could be admitted if nothing else came.
        """
        found = [
            (side, name, group, param)
            for side, name, param in self._sides(tenant, adapters)
            if (group := side.filled(name, now))
        ]
        refusals = [
            (seconds, message, param)
            for _, _, group, param in found
            for seconds, message in group.refusals(prompt_tokens)
        ]
        if refusals:
            seconds, message, param = max(refusals, key=lambda refusal: refusal[0])
            raise RateLimited(message, param=param, retry_after=min(seconds, LONGEST_RETRY))
        for side, name, group, _ in found:
            side.keep(name, group, now)
            group.take(1, prompt_tokens)
            group.outstanding += 1

    def generated(self, tenant: str, adapters: Iterable[str], tokens: int, now: float) -> None:
        """Charge tokens of an answer under way."""
        for side, name, _ in self._sides(tenant, adapters):
            if group := side.known(name):
                group.fill(now)
                group.take(0, tokens)

    @property
    def limits(self) -> bool:
        """Whether anybody has a limit."""
        return self._tenants.limits or self._adapters.limits

    def ended(self, tenant: str, adapters: Iterable[str]) -> None:
        """An admitted request is no longer outstanding, however it ended."""
        for side, name, _ in self._sides(tenant, adapters):
            if group := side.known(name):
                group.outstanding -= 1

    def _sides(self, tenant: str, adapters: Iterable[str]) -> list[tuple[_Side, str, str | None]]:
        """Tables and names a request is under, and the parameter that chose the name."""
        named = [(self._adapters, adapter, "model") for adapter in adapters]
        return [(self._tenants, tenant, None), *named]


def _limits(quota: Quota) -> bool:
    limits = quota.requests_per_minute, quota.tokens_per_minute, quota.max_outstanding
    return any(limit is not None for limit in limits)
