"""The policies keep what they promise, in the real scheduler on the virtual clock."""

import numpy as np
import pytest

from jslora.bench.outcomes import Outcome
from jslora.bench.scenarios import SCENARIOS, Claim, a10g, balance, idle_return, in_flight
from jslora.bench.steptime import Roofline, Work
from jslora.bench.workload import Job
from jslora.schedule.shares import Shares
from scripts import check_policies


@pytest.mark.parametrize("name", SCENARIOS)
def test_claims_hold(name: str) -> None:
    """The first case of each; `scripts/check_policies.py` goes through all."""
    broken = [claim for claim in SCENARIOS[name][0]() if not claim.holds]
    assert not broken, "\n".join(["", *(" | ".join(check_policies.row(each)) for each in broken)])


def test_who_may_save_up_service_breaks_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    def queued(shares: Shares, group: int) -> None:
        shares._know(group)
        shares._waiting[group] += 1

    monkeypatch.setattr(Shares, "queued", queued)
    assert not any(claim.holds for claim in idle_return())


def test_a_claim_holds_at_its_bound_and_not_beyond() -> None:
    assert Claim(text="", figure=0.05, most=0.05).holds
    assert not Claim(text="", figure=0.0501, most=0.05).holds
    assert not Claim(text="", figure=0.89, least=0.9).holds
    assert not Claim(text="", figure=float("nan"), least=0.9).holds
    both = Claim(text="", figure=0.5, least=0.4, most=0.6)
    assert (both.holds, both.bounds) == (True, "0.4 to 0.6")


def test_what_is_in_flight_is_counted_from_the_first_token_to_the_last() -> None:
    job = Job(index=0, arrival=0.0, model="m", prompt=(1, 2), output_tokens=3)
    outcomes = [Outcome(job=job, times=(1.0, 2.0, 3.0)), Outcome(job=job, times=(2.0,))]
    moments = np.array([0.5, 1.0, 2.5, 3.0])
    assert in_flight(outcomes, moments).tolist() == [0, 4, 2, 0]


def test_the_balance_is_where_arithmetic_takes_as_long_as_the_weights() -> None:
    machine = a10g("S1", 0)
    model, tokens = machine.step_time, balance(machine)
    assert isinstance(model, Roofline)
    bandwidth = model.device.bandwidth * model.shares.memory
    flops = model.device.flops * model.shares.compute
    costs = [model.parts.linear(Work(tokens=n)) for n in (tokens - 16, tokens)]
    assert [cost.flops / flops > cost.bytes / bandwidth for cost in costs] == [False, True]


def test_the_command_prints_a_table_and_fails_where_a_claim_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Claim(text="something", figure=2.0, most=1.0)
    kept = Claim(text="other", figure=0.5, most=1.0)
    monkeypatch.setattr(
        check_policies, "SCENARIOS", {"a": (lambda: [broken],), "b": (lambda: [kept],)}
    )
    assert check_policies.main([]) == 1
    assert "| something | 2.000 | <= 1 | NO |" in capsys.readouterr().out
    assert check_policies.main(["b"]) == 0
    assert "| other | 0.500 | <= 1 | yes |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_policies.main(["c"])
