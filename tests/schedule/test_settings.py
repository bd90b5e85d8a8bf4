"""The section `scheduler`: which policies may be combined; what none looks at is refused."""

import itertools
from typing import Any

import pytest

from jslora.config import SchedulerSection, parse
from jslora.errors import ConfigError, InvalidRequest
from jslora.schedule.stack import NAMES, problem

MINIMAL: dict[str, Any] = {"model": {"source": "m"}}


def refused(scheduler: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse(MINIMAL | {"scheduler": scheduler})
    return error.value.message


# Stacks -------------------------------------------------------------------------------------------

STACKS = [
    list(names) for count in range(len(NAMES) + 1) for names in itertools.permutations(NAMES, count)
]


def test_every_ordered_subset_of_policies_is_taken_or_refused_with_a_reason() -> None:
    """Refused are those with a policy that could never be looked at, and no others.

    Taken: an order of some of the four that leave ties, then one of three that do not or none,
    then slo or not.
    """
    taken = 0
    for policy in STACKS:
        total = [name for name in policy if name in ("fcfs", "newest", "shortest")]
        rest = policy[policy.index(total[0]) + 1 :] if total else []
        slo_inside = "slo" in policy[:-1]
        reason = problem(policy)
        assert (reason is None) == (not slo_inside and rest in ([], ["slo"])), policy
        if reason is None:
            assert SchedulerSection(policy=policy).policy == policy
            taken += 1
        else:
            named = [name for name in policy if repr(name) in reason]
            assert len(named) == 2, (policy, reason)
    assert len(STACKS) == 109_601 and taken == 65 * 4 * 2


@pytest.mark.parametrize("policy", [["cluster", "cluster"], ["slo", "fcfs"], ["newest", "fcfs"]])
def test_a_refused_stack_is_named(policy: list[str]) -> None:
    message = refused({"policy": policy})
    assert message.startswith("scheduler.policy: ") and message.endswith(f"(got {policy!r})")
    assert repr(policy[1]) in message


# Options ------------------------------------------------------------------------------------------

INEFFECTIVE = [
    ({"ageing_seconds": 10.0}, "ageing_seconds", {"priority"}),
    ({"starvation_seconds": 5}, "starvation_seconds", {"newest", "cluster", "shortest"}),
    ({"cluster_fraction": 0.5}, "cluster_fraction", {"cluster"}),
    ({"ttft_slo": 6.0}, "ttft_slo", {"slo"}),
    ({"tenants": {"a": {"share": 1}}}, "tenants.a.share", {"fair_tenants"}),
    ({"tenants": {"*": {"share": 2}}}, "tenants.*.share", {"fair_tenants"}),
    ({"tenants": {"a": {"priority": 0}}}, "tenants.a.priority", {"priority"}),
    ({"tenants": {"a": {"ttft_slo": 9}}}, "tenants.a.ttft_slo", {"slo"}),
    ({"adapters": {"sql": {"share": 2}}}, "adapters.sql.share", {"fair_adapters"}),
]


@pytest.mark.parametrize(("options", "name", "policies"), INEFFECTIVE, ids=str)
def test_an_option_that_no_policy_looks_at_is_refused(
    options: dict[str, Any], name: str, policies: set[str]
) -> None:
    """Even if it is given as its default: who wrote it believes that it does something."""
    for policy in NAMES:
        data = {"policy": [policy], **options}
        if policy in policies:
            parse(MINIMAL | {"scheduler": data})
            continue
        message = refused(data)
        assert f"scheduler.{name} has no effect unless scheduler.policy has" in message
        assert all(repr(policy) in message for policy in policies)
    others = sorted({*NAMES} - policies - {"slo", "fcfs", "newest", "shortest"})
    refused({"policy": others, **options})


def test_limits_that_are_nobodys_are_refused() -> None:
    def problem(name: str, **sections: Any) -> str:
        with pytest.raises(ConfigError) as error:
            parse(MINIMAL | {"scheduler": {name: {"base": {}, "team": {}, "*": {}}}} | sections)
        return error.value.message

    assert "scheduler.adapters.base: the base model is no adapter" in problem("adapters")
    keys = {"secret": {"tenant": "base"}, "other": {}}
    message = problem("tenants", auth={"keys": keys})
    assert message.endswith("scheduler.tenants.team: no key in auth.keys has this tenant")
    # Who calls `Engine` names tenants; keys need none.
    parse(MINIMAL | {"scheduler": {"tenants": {"team": {}}}})
    parse(MINIMAL | {"auth": {"keys": keys}})


def test_limits_and_keys_need_no_policy() -> None:
    limits = {"requests_per_minute": 5, "tokens_per_minute": 9.5, "max_outstanding": 2}
    keys = {"secret": {"tenant": "somebody"}}  # no tenant has to be named under scheduler
    scheduler = {
        "tenants": {"a": limits}, "adapters": {"*": limits}, "itl_target": 0.05, "reserve": 0.5,
    }  # fmt: skip
    parse(MINIMAL | {"auth": {"keys": keys}})
    config = parse(MINIMAL | {"scheduler": scheduler})
    assert config.scheduler.tenants["a"].max_outstanding == 2
    assert config.scheduler.adapters["*"].tokens_per_minute == 9.5


def test_what_has_no_effect_is_not_written() -> None:
    written = parse(MINIMAL | {"scheduler": {"tenants": {"a": {}}}}).model_dump()["scheduler"]
    assert written["policy"] == ["fcfs"] and "itl_target" in written
    assert not written.keys() & {
        "ageing_seconds", "starvation_seconds", "cluster_fraction", "ttft_slo"
    }  # fmt: skip
    assert "max_outstanding" in written["tenants"]["a"] and "share" not in written["tenants"]["a"]
    assert parse(MINIMAL | {"scheduler": written}).scheduler == SchedulerSection(tenants={"a": {}})


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"ageing_seconds": 0}, "scheduler.ageing_seconds: Input should be greater than 0"),
        ({"cluster_fraction": 1.5}, "scheduler.cluster_fraction: Input should be less than"),
        ({"ttft_slo": 3601}, "scheduler.ttft_slo: Input should be less than or equal to 3600"),
        ({"ttft_slo": float("nan")}, "scheduler.ttft_slo: Input should be"),
        ({"itl_target": float("inf")}, "scheduler.itl_target: Input should be a finite number"),
        ({"reserve": 1}, "scheduler.reserve"),
        ({"tenants": {"a b": {}}}, "scheduler.tenants.a b.[key]: String should match pattern"),
        ({"tenants": {"a": {"priority": 101}}}, "scheduler.tenants.a.priority: Input should be"),
        ({"tenants": {"a": {"share": 0}}}, "scheduler.tenants.a.share: Input should be greater"),
        ({"adapters": {"a": {"priority": 1}}}, "scheduler.adapters.a.priority: unknown key"),
        ({"adapters": {"a": 5}}, "scheduler.adapters.a: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_wrong_limits_are_named(scheduler: dict[str, Any], message: str) -> None:
    assert message in refused(scheduler)


# Requests -----------------------------------------------------------------------------------------


def check(policy: list[str], priority: Any = 0, ttft_slo: Any = None) -> None:
    SchedulerSection(policy=policy).check_wishes(priority, ttft_slo)


@pytest.mark.parametrize("policy", [[name] for name in NAMES] + [[]], ids=str)
def test_wishes_are_taken_where_a_policy_looks_at_them(policy: list[str]) -> None:
    check(policy)
    check(policy, priority=0)
    for name, wish in (("priority", {"priority": 1}), ("slo", {"ttft_slo": 0.5})):
        if name in policy:
            check(policy, **wish)
        else:
            with pytest.raises(InvalidRequest, match=f"policy of this server has no '{name}'") as e:
                check(policy, **wish)
            assert e.value.param in wish


@pytest.mark.parametrize("priority", [-1, 101, 2**70, True, 1.0, "1", None, float("nan")])
def test_a_priority_that_is_none_is_refused(priority: object) -> None:
    with pytest.raises(InvalidRequest, match="not a whole number from 0 to 100") as error:
        check(["priority"], priority=priority)
    assert error.value.param == "priority"


@pytest.mark.parametrize("slo", [0, -1.0, 3600.5, True, "1", float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(slo: object) -> None:
    with pytest.raises(InvalidRequest, match="not seconds above 0 and at most 3600") as error:
        check(["slo"], ttft_slo=slo)
    assert error.value.param == "ttft_slo"


def test_the_ends_of_the_ranges_are_allowed() -> None:
    check(["priority", "slo"], priority=100, ttft_slo=3600)
    check(["priority", "slo"], priority=1, ttft_slo=1e-9)
