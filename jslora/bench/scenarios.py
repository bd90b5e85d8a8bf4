"""What the policies promise, each shown by the real scheduler on the virtual clock.

A scenario is a workload and what it is run under; what it yields are claims: a figure that was
measured, and the bound that it must keep. Some figures are those of a policy that does not promise
it: they show that the scenario would tell. S-LoRA's A10G serves nearly all of them, without a
prefix cache, as it ran. Everything is deterministic; no figure is an average over seeds.

Service is counted as by the virtual token counter, see `outcomes.service`. Host only: no jax.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jslora.bench import bound, s_lora
from jslora.bench.hardware import HARDWARE, LLAMA_7B
from jslora.bench.outcomes import Outcome, Summary, contention, service, summarize
from jslora.bench.s_lora import PAGE, SLO, Row
from jslora.bench.simulate import Machine, Simulated, simulate
from jslora.bench.steptime import Roofline
from jslora.bench.synthetic_store import HostTier
from jslora.bench.traces import Range, Source, mix, slora, steps
from jslora.bench.workload import Trace
from jslora.schedule.settings import SchedulerSection, Tenant
from jslora.schedule.shares import GENERATED

SETTLED = 20.0
"""Seconds after which the batch is full, with answers of all ages."""

COLD = 200
"""Adapters that one tenant goes through."""

_MIDDLE: Range = (64, 256)
_SLOTS = s_lora.SLOTS["a10g", "S1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A figure and its bound, the least it must be or the most."""

    text: str
    figure: float
    least: float = -np.inf
    most: float = np.inf

    @property
    def holds(self) -> bool:
        return self.least <= self.figure <= self.most

    @property
    def bounds(self) -> str:
        """For a table."""
        if self.least == -np.inf:
            return f"<= {self.most:g}"
        return f">= {self.least:g}" if self.most == np.inf else f"{self.least:g} to {self.most:g}"


def a10g(setting: str, adapters: int, **changes: Any) -> Machine:
    """S-LoRA's smallest machine."""
    hardware = HARDWARE["a10g"]
    machine = Machine(
        model=LLAMA_7B, step_time=hardware.step_time(LLAMA_7B), pages=_SLOTS // PAGE + 1,
        adapters=s_lora.ranks(setting, adapters), page_size=PAGE, transfer=hardware.transfer,
        prefix_cache=False,
    )  # fmt: skip
    return replace(machine, **changes)


# Fair shares -------------------------------------------------------------------------------------

Lengths = tuple[Range, Range]

_FAIR: Mapping[str, tuple[Lengths, Lengths]] = {
    "prompts against answers": (((512, 1024), (8, 32)), ((16, 64), (128, 256))),
    "short against long": (((16, 64), (16, 64)), ((256, 512), (128, 256))),
    "equal lengths": ((_MIDDLE, _MIDDLE), (_MIDDLE, _MIDDLE)),
}
"""Prompts and answers of who offers much, and of who offers little."""


def fair_shares(name: str, much: float, little: float) -> list[Claim]:
    """Two tenants of such shares offer 10:1, and each more than it can get.

    Who starts is charged for its answer as it comes, so what is received is off by as much as is in
    flight, whenever one looks (arXiv 2401.00588): only minutes bring it below 5 %.
    """
    off = _unfairness(_FAIR[name], {"much": much, "little": little})
    text = f"share received, off its weight, {name}, {much:g}:{little:g}"
    return [Claim(text=text, figure=off, most=0.05)]


def _unfairness(lengths: tuple[Lengths, Lengths], shares: Mapping[str, float]) -> float:
    """How far, relatively, a tenant's part of the service is from its share."""
    # Both begin with more than fits, and have so much waiting at most, or the run would not end.
    tenants = {name: Tenant(share=share, max_outstanding=300) for name, share in shares.items()}
    sources = [
        Source(models=(model,), rate=steps((4.0, 10 * rate), (296.0, rate)), tenant=tenant,
               input_range=inputs, output_range=outputs)
        for model, tenant, rate, (inputs, outputs) in zip(
            s_lora.names(2), shares, (40.0, 4.0), lengths, strict=True
        )
    ]  # fmt: skip
    section = s_lora.limits(_SLOTS, policy=["fair_tenants"], tenants=tenants)
    outcomes = simulate(mix(sources), a10g("S1", 2), section).outcomes
    between = contention(outcomes)
    assert between and between[1] - between[0] > 300.0, f"backlogged {between}"
    got = _received(outcomes, *between)
    parts = {name: got[name] / sum(got.values()) for name in got}
    return max(abs(parts[n] / (shares[n] / sum(shares.values())) - 1) for n in got)


def _received(outcomes: Iterable[Outcome], begin: float, end: float) -> dict[str, float]:
    return {name: float(np.diff(got)[0]) for name, got in service(outcomes, (begin, end)).items()}


# An idle tenant returns --------------------------------------------------------------------------

_AWAY, _BACK, _OVER = 30.0, 90.0, 150.0


def idle_return() -> list[Claim]:
    """A tenant is idle for a minute while another has more than it can get.

    Who was let in can still get what was in flight then, its own and what the other is behind by;
    half of that is over an equal share.
    """
    stays, returns = (
        Source(models=(model,), rate=rate, tenant=tenant, input_range=_MIDDLE, output_range=_MIDDLE)
        for model, rate, tenant in zip(
            s_lora.names(2),
            (steps((_OVER, 8.0)), steps((_AWAY, 1.0), (_BACK - _AWAY, 0.0), (_OVER - _BACK, 8.0))),
            ("stays", "returns"),
            strict=True,
        )
    )
    section = s_lora.limits(_SLOTS, policy=["fair_tenants"])
    outcomes = simulate(mix([stays, returns]), a10g("S1", 2), section).outcomes
    moments = np.arange(_BACK, _OVER + 1)
    got = service(outcomes, moments.tolist())
    all_got = got["stays"] + got["returns"]
    flying = in_flight(outcomes, moments)
    over = max(
        (got["returns"][j] - got["returns"][i] - (all_got[j] - all_got[i]) / 2)
        / (flying[i : j + 1].max() / 2)
        for i in range(len(moments))
        for j in range(i + 5, len(moments))
    )
    since = (got["returns"] - got["returns"][0])[1:] / (all_got - all_got[0])[1:]
    return [
        Claim(text="over its share in any 5 s or more after its return, of half that is in flight",
              figure=float(over), most=1.0),
        Claim(text="part of the service in the minute after its return, of two equal shares",
              figure=float(since[-1]), least=0.475, most=0.525),
    ]  # fmt: skip


def in_flight(outcomes: Iterable[Outcome], moments: np.ndarray) -> np.ndarray:
    """Service that those who got a first token at each moment, and not yet the last, will get."""
    left = np.zeros(len(moments))
    for outcome in outcomes:
        done = np.searchsorted(outcome.times, moments, "right")
        left += GENERATED * np.where(done > 0, len(outcome.times) - done, 0)
    return left


# Cold adapters -----------------------------------------------------------------------------------

_DISK = HostTier(bytes=40 * 34_000_000, latency=0.05, bandwidth=1e9)


def cold_adapters(name: str, machine: Machine, policy: list[str]) -> list[Claim]:
    """One of four tenants goes through many adapters in turn; the others have one each.

    What the others get is compared with what they get beside one who has one adapter, and with
    their three quarters of what they get alone. First come, first served promises nothing.
    """
    cold, one, alone = (_others(machine, policy, adapters) for adapters in (COLD, 1, 0))
    against_nobody = f"cost of {COLD} adapters to others, against nobody, {name}"
    cost = 1 - cold / (0.75 * alone)
    if "fair_tenants" not in policy:
        return [Claim(text=against_nobody, figure=cost, least=0.1)]
    against_one = f"cost of {COLD} adapters to others, against one, {name}"
    return [
        Claim(text=against_one, figure=1 - cold / one, most=0.1),
        Claim(text=against_nobody, figure=cost, most=0.1),
    ]


def _others(machine: Machine, policy: list[str], adapters: int) -> float:
    """What three tenants get in 40 s beside one with so many adapters, or none at all."""
    seconds, names = SETTLED + 40.0, tuple(machine.adapters)
    of = [*((f"other {i}", names[COLD + i : COLD + i + 1], 3.0) for i in range(3)),
          ("cold", names[:adapters], 10.0)]  # fmt: skip
    sources = [
        Source(models=models, choice="round-robin", rate=steps((seconds, rate)), tenant=tenant,
               input_range=_MIDDLE, output_range=_MIDDLE)
        for tenant, models, rate in (of if adapters else of[:3])
    ]  # fmt: skip
    outcomes = simulate(
        mix(sources, seed=1), machine, s_lora.limits(_SLOTS, policy=policy)
    ).outcomes
    got = _received(outcomes, SETTLED, seconds)
    return sum(received for tenant, received in got.items() if tenant != "cold")


# Overload ----------------------------------------------------------------------------------------


TWICE = {0: 4.0, 200: 3.6}
"""Adapters, and twice the requests/s that are completed first come, first served."""


def overload(adapters: int) -> list[Claim]:
    """Twice the load that can be served, against what no schedule can exceed.

    Requests declare how long their answers are, as S-LoRA's do: who does not know cannot tell which
    are short, and the bound knows. The reward r(t) falls with every second, the bound's hardly.
    """
    rate = TWICE[adapters]
    row = replace(_published("a10g", "S1"), adapters=adapters, rate=rate, duration=1200.0)
    machine, trace = s_lora.machine(row), s_lora.trace(row)
    stack = {"policy": ["shortest", "slo"], "ttft_slo": SLO, "max_step_tokens": balance(machine)}
    found = _summary(trace, machine, _changed(row, stack))
    best = bound.clairvoyant(trace, bounds(machine, adapters), SLO)
    assert found.ttft, "nobody was answered"
    name = f"{adapters} adapters"
    return [
        Claim(text=f"attainment at overload, of the best possible, {name}",
              figure=found.attainment / best.attainment, least=0.9),
        Claim(text=f"satisfaction at overload, of the best possible, {name}",
              figure=found.satisfaction / best.satisfaction, least=0.8),
        Claim(text=f"TTFT p99 of the accepted at overload, s, {name}",
              figure=found.ttft.p99, most=SLO),
    ]  # fmt: skip


def balance(machine: Machine) -> int:
    """Tokens of a step, in sixteens, up to which the weights are read longer than they are used.

    So many cost little more than one; beyond, a prompt's tokens delay all others in the step.
    """
    model = machine.step_time
    assert isinstance(model, Roofline), f"no roofline: {model}"
    reading = model.parts.itemsize / (model.device.bandwidth * model.shares.memory)
    using = 2 / (model.device.flops * model.shares.compute)
    return 16 * int(np.ceil(reading / using / 16))


def bounds(machine: Machine, adapters: int) -> tuple[bound.Machine, ...]:
    """A machine no slower whose linear layers are bound by arithmetic: at overload the tightest."""
    model, numbers = machine.step_time, 0
    assert isinstance(model, Roofline), f"no roofline: {model}"
    if adapters:
        widths = [sum(machine.model.widths(module)) for module in ("q_proj", "k_proj", "v_proj")]
        widths.append(sum(machine.model.widths("o_proj")))
        numbers = min(map(min, (r[:4] for r in machine.adapters.values()))) * sum(widths)
        numbers *= machine.model.layers
    return bound.mixtures(model.below(numbers)[1:], machine.pages - 1, PAGE)


# S-LoRA's own workloads --------------------------------------------------------------------------

SINGLE = ("s-lora", "lifo", "abort", "cluster 32")
"""S-LoRA's policies, one at a time."""


def composed(device: str, setting: str, cv: float) -> list[Claim]:
    """A stack of several policies against each of S-LoRA's, on its workloads.

    With steps of our size and, so that only the order of requests differs, with S-LoRA's. Bursts
    leave room to answer all in the end, so there who gives nobody up completes more.
    """
    row = replace(_published(device, setting), cv=cv)
    machine, trace = s_lora.machine(row), s_lora.trace(row)
    sections = [s_lora.section(replace(row, variant=variant)) for variant in SINGLE]
    singles = [_summary(trace, machine, section) for section in sections]
    best = max(singles, key=lambda s: s.attainment)
    most = best.throughput if cv > 1 else max(s.throughput for s in singles)
    whose = "the most attaining" if cv > 1 else "any"
    stack = {"policy": ["cluster", "shortest", "slo"], "ttft_slo": SLO}
    name = f"{setting} on {machine.step_time.device.name}, cv {cv:g}"  # type: ignore[attr-defined]
    claims = []
    for whose_steps, more in (
        ("", {"max_step_tokens": balance(machine)}),
        (", S-LoRA's steps", {}),
    ):
        ours = _summary(trace, machine, _changed(row, stack | more))
        claims += [
            Claim(text=f"attainment over the best single policy's, {name}{whose_steps}",
                  figure=ours.attainment / best.attainment, least=1.0),
            Claim(text=f"throughput over {whose} single policy's, {name}{whose_steps}",
                  figure=ours.throughput / most, least=1.0),
        ]  # fmt: skip
    return claims


def _published(device: str, setting: str) -> Row:
    """The run that S-LoRA's experiments vary: 200 adapters, two requests a second."""
    found = [
        r for r in s_lora.load() if (r.device, r.setting, r.adapters) == (device, setting, 200)
    ]
    return next(r for r in found if (r.variant, r.rate, r.cv, r.alpha) == ("s-lora", 2, 1, 1))


def _changed(row: Row, options: Mapping[str, Any]) -> SchedulerSection:
    return SchedulerSection(**s_lora.limits(row.slots).model_dump() | dict(options))


def _summary(trace: Trace, machine: Machine, section: SchedulerSection) -> Summary:
    return summarize(simulate(trace, machine, section).outcomes, SLO)


# Lengths that are learned, and steps that are kept short -----------------------------------------


def learned_lengths() -> list[Claim]:
    """All declare answers of 512 tokens, and end after 32 to 128."""
    trace = slora(models=s_lora.names(20), rate=16.0, duration=60.0, input_range=(8, 65),
                  output_range=(32, 129))  # fmt: skip
    machine = a10g("S1", 20, declared=512)
    runs = {r: simulate(trace, machine, _changed(_published("a10g", "S1"), {"reserve": r}))
            for r in ("declared", 0.9)}  # fmt: skip
    declared, learned = (summarize(run.outcomes, SLO) for run in runs.values())
    return [
        Claim(text="throughput with learned lengths, over declared",
              figure=learned.throughput / declared.throughput, least=1.5),
        Claim(text="preemptions with learned lengths, of all requests",
              figure=runs[0.9].preemptions / len(trace), most=0.01),
    ]  # fmt: skip


ITL = 0.08


def short_steps() -> list[Claim]:
    """Prompts of up to 2,048 tokens come while others read their answers."""
    trace = slora(models=s_lora.names(20), rate=0.6, duration=300.0, input_range=(512, 2048),
                  output_range=(32, 256))  # fmt: skip
    found: list[Summary] = []
    for options in ({}, {"itl_target": ITL}):
        run: Simulated = simulate(trace, a10g("S1", 20), s_lora.limits(_SLOTS, **options))
        found.append(summarize(run.outcomes, SLO))
    free, kept = found
    assert free.itl and kept.itl and free.ttft and kept.ttft, "nobody was answered"
    return [
        Claim(text=f"ITL p99 with a target of {ITL:g} s, over the target",
              figure=kept.itl.p99 / ITL, most=1.05),
        Claim(text="ITL p99 without a target, over the same", figure=free.itl.p99 / ITL, least=2.0),
        Claim(text="TTFT p50 with the target, over that without",
              figure=kept.ttft.p50 / free.ttft.p50, most=1.5),
        Claim(text="TTFT p99 with the target, over that without",
              figure=kept.ttft.p99 / free.ttft.p99, most=1.5),
    ]  # fmt: skip


Case = Callable[[], list[Claim]]

SCENARIOS: Mapping[str, tuple[Case, ...]] = {
    "fair shares": tuple(
        partial(fair_shares, name, much, 1.0) for much in (3.0, 1.0) for name in _FAIR
    ),
    "idle return": (idle_return,),
    "cold adapters": (
        partial(cold_adapters, "rank 64", a10g("S6", COLD + 3), ["fair_tenants", "cluster"]),
        partial(cold_adapters, "rank 8", a10g("S1", COLD + 3), ["fair_tenants"]),
        partial(cold_adapters, "rank 8, disk", a10g("S1", COLD + 3, host=_DISK), ["fair_tenants"]),
        partial(cold_adapters, "rank 8, first come", a10g("S1", COLD + 3), ["fcfs"]),
    ),
    "overload": tuple(partial(overload, adapters) for adapters in TWICE),
    "composed": tuple(
        partial(composed, device, setting, cv)
        for device, setting in (("a10g", "S2"), ("a100-40", "S4"))
        for cv in (1.0, 4.0)
    ),
    "learned lengths": (learned_lengths,),
    "short steps": (short_steps,),
}
"""Cases of each, the most telling first."""
