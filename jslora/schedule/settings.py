"""How the scheduler is set: the section `scheduler` of the configuration, and what it refuses.

An option that only some policies look at is refused where it is given without any of them, in the
configuration as in a request: nobody should believe that it does something. Where it was not given
it has no effect and is left out when a configuration is written, so that what was written can be
read again. Host only: no jax.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field, StringConstraints

from jslora.errors import InvalidRequest
from jslora.request import MAX_PRIORITY, MAX_SLO_SECONDS
from jslora.schedule import stack
from jslora.section import NAME, STRICT, Positive

Slo = Annotated[float, Field(gt=0, le=MAX_SLO_SECONDS)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PerMinute = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Group = Annotated[str, StringConstraints(pattern=rf"^({NAME}|\*)$")]

Needs = dict[str, tuple[stack.Name, ...]]
Place = tuple[str, ...]

NEEDS: Needs = {
    "ageing_seconds": ("priority",),
    "starvation_seconds": ("newest", "cluster", "shortest"),
    "cluster_fraction": ("cluster",),
    "ttft_slo": ("slo",),
}
"""Options that have an effect only with one of these policies."""

TENANT_NEEDS: Needs = {"share": ("fair_tenants",), "priority": ("priority",), "ttft_slo": ("slo",)}
ADAPTER_NEEDS: Needs = {"share": ("fair_adapters",)}


class _Section(BaseModel):
    model_config = STRICT


class Quota(_Section):
    """What a tenant, or an adapter, may use at most: None is without limit.

    `share`: of what is contended for, against the shares of others. `max_outstanding`: sequences
    that run or wait. Tokens are those of prompts and answers.
    """

    share: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    max_outstanding: Positive | None = None


class Tenant(Quota):
    """`priority`: levels after the most urgent. `ttft_slo`: its own, if not the server's."""

    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0
    ttft_slo: Slo | None = None


PLACES_PER_FREE = 4
"""Places of a queue that one tenant may take for each that is free, where tenants are served
fairly (dynamic thresholds, Choudhury and Hahne 1998): alone it gets four fifths of them, and
whoever comes after it finds some."""


class SchedulerSection(_Section):
    """`policy`: who goes first, see `jslora.schedule.stack`.

    `ageing_seconds`: waiting so long makes up for one level of priority. `starvation_seconds`: who
    waited longer is passed over no more for the sake of an order. `cluster_fraction`: share of the
    pool that the adapters of one batch may take before others are put off. `ttft_slo`: seconds to
    the first token, with the policy "slo". `itl_target`: seconds between two tokens that prefills
    must leave to decoding rows. `reserve`: the answer that a request is given room for, as long as
    `max_tokens`, or as its adapter's answers were so far at this quantile. `tenants`, `adapters`:
    by name, aliases aside; "*" is for every other one, each counted by itself.
    """

    max_running: Positive = 64
    max_step_tokens: Annotated[int, Field(ge=8)] = 512
    max_queued: Positive = 512
    max_queued_tokens: Positive = 262144
    policy: list[stack.Name] = ["fcfs"]
    ageing_seconds: Seconds = 10.0
    starvation_seconds: Seconds = 60.0
    cluster_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    ttft_slo: Slo = 6.0
    itl_target: Seconds | None = None
    reserve: Literal["declared"] | Annotated[float, Field(gt=0, lt=1)] = 0.9
    tenants: dict[Group, Tenant] = {}
    adapters: dict[Group, Quota] = {}
    lookahead: bool = True

    @pydantic.field_validator("policy")
    @classmethod
    def _check_policy(cls, policy: list[stack.Name]) -> list[stack.Name]:
        if problem := stack.problem(policy):
            raise ValueError(problem)
        return policy

    @pydantic.model_serializer(mode="wrap")
    def _write(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for path, _, _ in self._ineffective():
            part = data
            for name in path[:-1]:
                part = part.get(name, {})
            part.pop(path[-1], None)
        return data

    def _ineffective(self) -> Iterator[tuple[Place, bool, tuple[stack.Name, ...]]]:
        """Options that this policy does not look at: where, whether given, and what would look."""
        parts: list[tuple[Place, BaseModel, Needs]] = [((), self, NEEDS)]
        parts += [(("tenants", name), part, TENANT_NEEDS) for name, part in self.tenants.items()]
        parts += [(("adapters", name), part, ADAPTER_NEEDS) for name, part in self.adapters.items()]
        for path, part, needs in parts:
            for option, policies in needs.items():
                if not {*policies} & {*self.policy}:
                    yield (*path, option), option in part.model_fields_set, policies

    def problem(self) -> str | None:
        """Which given options this policy does not look at; None if there are none."""
        found = [
            f"{'.'.join(path)} has no effect unless scheduler.policy has {_either(policies)}"
            for path, given, policies in self._ineffective()
            if given
        ]
        return "; ".join(f"scheduler.{problem}" for problem in found) or None

    def crowded(self, own: int, taken: int, places: int) -> bool:
        """Whether a tenant with `own` of the `taken` places of a queue gets no more of them."""
        fair = "fair_tenants" in self.policy
        return taken >= places or (fair and own >= PLACES_PER_FREE * (places - taken))

    def check_wishes(self, priority: int, ttft_slo: float | None) -> None:
        """Refuse what a request wishes for if it would not be heeded.

        Raises:
            InvalidRequest: the priority or the time to the first token is out of range, or this
                policy does not look at it; a priority of 0 is always allowed.
        """
        if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
            allowed = f"a whole number from 0 to {MAX_PRIORITY}"
            raise InvalidRequest(f"priority is {priority!r}, not {allowed}", param="priority")
        seconds = 1.0 if ttft_slo is None else ttft_slo
        if type(seconds) not in (int, float) or not 0 < seconds <= MAX_SLO_SECONDS:
            allowed = f"seconds above 0 and at most {MAX_SLO_SECONDS:g}"
            raise InvalidRequest(f"ttft_slo is {ttft_slo!r}, not {allowed}", param="ttft_slo")
        if priority and "priority" not in self.policy:
            raise _unheeded("priority", priority, "priority")
        if ttft_slo is not None and "slo" not in self.policy:
            raise _unheeded("ttft_slo", ttft_slo, "slo")


def _either(policies: tuple[stack.Name, ...]) -> str:
    return " or ".join(map(repr, policies))


def _unheeded(name: str, wish: float, policy: stack.Name) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is {wish}, but the policy of this server has no {policy!r}", param=name
    )
