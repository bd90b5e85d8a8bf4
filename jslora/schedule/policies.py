"""The stack of policies of one scheduler: what they are told, and whom they let go first.

The scheduler says here what happens to a sequence: it waits, starts, is served, stops. Each part
keeps only what it needs of that. Host only: no jax.
"""

import zlib
from collections.abc import Callable
from itertools import takewhile

import numpy as np

from jslora.request import Request
from jslora.schedule.deadlines import Deadlines
from jslora.schedule.order import Cluster, NewestFirst, Priority, ShortestFirst
from jslora.schedule.queue import Policy, Waiting
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import Quota, SchedulerSection, Tenant
from jslora.schedule.shares import GENERATED, PROMPT, Shares
from jslora.schedule.stack import Name

COMPOSITIONS = 4096
"""Groups of requests that name several adapters, of which clients can make up any number."""


class Names:
    """Numbers for names, in order of appearance."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a name, new or not."""
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]


class Policies:
    """Who waits, and the stack that orders them.

    Args:
        pages: of the pool.
    """

    def __init__(self, section: SchedulerSection, pages: int) -> None:
        self.waiting = Waiting()
        self._section = section
        self._tenants, self._adapters = Names(), Names()
        self._by_tenant = Shares("tenant", lambda group: self._tenant(group).share)
        self._by_adapter = Shares("adapter", lambda group: self._quota(group).share)
        self._cluster = Cluster(int(section.cluster_fraction * pages), section.starvation_seconds)
        self._deadlines = Deadlines(section.ttft_slo)
        self._aborts, self._fair_adapters = (
            name in section.policy for name in ("slo", "fair_adapters")
        )
        # Only "slo" may follow "fcfs"; it then orders nobody and only gives up.
        before = takewhile(lambda name: name != "fcfs", section.policy)
        self._stack = [self._policy(name) for name in before]
        self.settles = not {"fair_tenants", "fair_adapters", "cluster", "slo"} & {*section.policy}
        """Whether a start leaves the order of the others as it was."""

    def _policy(self, name: Name) -> Policy:
        section = self._section
        make: dict[Name, Callable[[], Policy]] = {
            "newest": lambda: NewestFirst(section.starvation_seconds),
            "priority": lambda: Priority(section.ageing_seconds),
            "fair_tenants": lambda: self._by_tenant,
            "fair_adapters": lambda: self._by_adapter,
            "cluster": lambda: self._cluster,
            "shortest": lambda: ShortestFirst(section.starvation_seconds),
            "slo": lambda: self._deadlines,
        }
        return make[name]()

    def _tenant(self, group: int) -> Tenant:
        tenants = self._section.tenants
        return tenants.get(self._tenants.names[group]) or tenants.get("*") or Tenant()

    def _quota(self, group: int) -> Quota:
        adapters = self._section.adapters
        return adapters.get(self._adapters.names[group]) or adapters.get("*") or Quota()

    # What happens to a sequence ------------------------------------------------------------------

    def queue(self, sequence: Sequence, expected: int, now: float) -> None:
        """A request arrives, whose answer is expected to have so many tokens."""
        request = sequence.request
        sequence.tenant = self._tenants.number(request.tenant)
        sequence.adapter = self._adapters.number(_group(request))
        tenant = self._tenant(sequence.tenant)
        sequence.since, sequence.expected = now, expected
        sequence.level = tenant.priority + request.priority
        sequence.work = PROMPT * sequence.prompt_length + GENERATED * expected
        if self._aborts:
            usual = tenant.ttft_slo or self._section.ttft_slo
            sequence.deadline = now + (request.ttft_slo or usual)
            # Who asks for what cannot be had must not make it look like too much load.
            sequence.watched = (request.ttft_slo or usual) >= usual
            if sequence.watched:
                self._deadlines.arrived(now)
        self._enter(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """It was preempted and goes on waiting."""
        self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self._by_tenant.queued(sequence.tenant)
        self._by_adapter.queued(sequence.adapter)
        self._cluster.queued(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """It waits no more."""
        self.waiting.remove(sequence)
        self.charge(sequence, sequence.owed)
        sequence.owed = 0.0
        self._by_tenant.left(sequence.tenant)
        self._by_adapter.left(sequence.adapter)

    def start(self, sequence: Sequence, computed: int, now: float) -> None:
        """It begins to run, or to run again, with so many tokens computed already."""
        self.withdraw(sequence)
        self._by_tenant.started(sequence.tenant)
        self._by_adapter.started(sequence.adapter)
        self._cluster.started(sequence)
        sequence.started = now
        if sequence.life == 0:
            self.charge(sequence, PROMPT * (len(sequence.tokens) - computed))
            if self._aborts and sequence.watched:
                self._deadlines.started(now)

    def stop(self, sequence: Sequence) -> None:
        """It does not run any more."""
        self._cluster.stopped(sequence)

    def generated(self, tenants: np.ndarray, adapters: np.ndarray) -> None:
        """A token of each of these, by number, was read."""
        self._by_tenant.charge_all(tenants, GENERATED)
        if self._fair_adapters:
            self._by_adapter.charge_all(adapters, GENERATED)

    def answered(self, sequence: Sequence, now: float) -> None:
        """Its first token was read."""
        if self._aborts:
            self._deadlines.answered(now - sequence.started)

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """Its tenant and its adapter were served so many weighted tokens."""
        self._by_tenant.charge(sequence.tenant, tokens)
        self._by_adapter.charge(sequence.adapter, tokens)

    # What they say -------------------------------------------------------------------------------

    def waits(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        return self._by_tenant.waiting(self._tenants.number(tenant))

    def front(self, k: int, now: float) -> list[Sequence]:
        """The `k` that go first."""
        return self.waiting.front(k, self._stack, now)

    def late(self, now: float) -> list[Sequence]:
        """Who cannot be answered in time any more."""
        return self._deadlines.late(self.waiting, now) if self._aborts else []

    def service(self) -> dict[str, float]:
        """Weighted tokens that each tenant was served."""
        return dict(zip(list(self._tenants.names), self._by_tenant.service(), strict=False))

    def retry_after(self, now: float) -> float:
        """Seconds after which it may be worth asking again."""
        return self._deadlines.retry_after(self.waiting, now)


def _group(request: Request) -> str:
    """Whom it shares with: who asks for its adapter, or for its adapters, all of them."""
    if len(request.adapters) < 2:
        return request.label
    return f"+{zlib.crc32(request.label.encode()) % COMPOSITIONS}"
