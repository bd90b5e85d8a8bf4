"""Synthetic traces against the published figures of S-LoRA's generator, and against their laws."""

import dataclasses
import importlib.util
from collections import Counter
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, pstdev, stdev
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.bench import trace_file
from jslora.bench.traces import RANKS, Source, merge, mix, ramp, scale, slora, split, steps
from jslora.bench.workload import Job, Trace
from jslora.errors import ConfigError

ADAPTERS = tuple(f"adapter-{i:03d}" for i in range(200))
SHORT: Any = {"input_range": (1, 3), "output_range": (1, 3)}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_trace.py"
    spec = importlib.util.spec_from_file_location("make_trace", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("alpha", "top", "ten", "touched"),
    [(0.1, 57, 74, 107), (0.3, 23, 42, 163), (0.6, 5, 20, 188), (1.0, 1.3, 12, 187)],
)
def test_sloras_adapters_are_as_popular_as_published(
    alpha: float, top: float, ten: float, touched: int
) -> None:
    trace = slora(models=ADAPTERS, rate=2, duration=300, alpha=alpha)
    counts = [count for _, count in Counter(job.model for job in trace).most_common()]
    assert len(trace) == 600 and len(counts) == touched
    assert counts[0] / 6 == pytest.approx(top, abs=0.51)
    assert sum(counts[:10]) / 6 == pytest.approx(ten, abs=0.51)
    if alpha < 0.5:
        assert Counter(job.model for job in trace).most_common(1)[0][0] == "adapter-000"


@pytest.mark.parametrize(
    ("rate", "spans"), [(2, (301, 285, 354, 343, 433)), (6, (294, 296, 285, 323, 291))]
)
def test_sloras_traces_last_as_long_as_published(rate: float, spans: tuple[int, ...]) -> None:
    for cv, span in zip((1, 2, 4, 6, 8), spans, strict=True):
        trace = slora(models=ADAPTERS, rate=rate, duration=300, cv=cv)
        assert trace[-1].arrival == pytest.approx(span, abs=0.51)


@pytest.mark.parametrize(
    ("rate", "duration", "inputs", "outputs"),
    [(2, 300, 255.7, 259.1), (6, 300, 259, 261), (10, 300, 265, 253), (10, 120, 262, 263)],
)
def test_sloras_lengths_are_as_published(
    rate: float, duration: float, inputs: float, outputs: float
) -> None:
    trace = slora(models=ADAPTERS, rate=rate, duration=duration)
    assert fmean(job.input_tokens for job in trace) == pytest.approx(inputs, abs=0.6)
    assert fmean(job.output_tokens for job in trace) == pytest.approx(outputs, abs=0.4)


def test_the_base_model_alone_is_asked_what_the_adapters_would_be() -> None:
    base = slora(models=("base",), rate=1.5, duration=3.9)
    adapters = slora(models=ADAPTERS, rate=1.5, duration=3.9)
    assert len(base) == 5 and {job.model for job in base} == {"base"}
    assert [dataclasses.replace(job, model="base") for job in adapters] == list(base)
    assert RANKS["S2"][5 % len(RANKS["S2"])] == 32


def test_sloras_prompts_are_no_beginnings_of_one_another() -> None:
    trace = slora(models=ADAPTERS, rate=2, duration=100)
    assert len({job.prompt[:8] for job in trace}) == len(trace) == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()}, {"rate": 0}, {"rate": float("inf")}, {"duration": 0.1}, {"alpha": 0},
        {"cv": float("nan")}, {"seed": -1}, {"seed": 2**32}, {"vocab": 0}, {"rate": 1e9},
        {"input_range": (0, 4)}, {"output_range": (4, 4)}, {"input_range": (1, 2**21)},
    ],
)  # fmt: skip
def test_sloras_parameters_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        slora(**{"models": ADAPTERS, "rate": 2, "duration": 10, **wrong})


PROFILES = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 20)), min_size=1, max_size=5
).map(lambda parts: steps(*parts))  # fmt: skip
RAMPS = st.lists(
    st.tuples(st.floats(0.001, 20), st.floats(0, 20)), min_size=1, max_size=5
).map(lambda gaps: ((0.0, 3.0), *zip(np.cumsum([g for g, _ in gaps]).tolist(),
                                     [rate for _, rate in gaps], strict=True)))  # fmt: skip


@settings(deadline=None)
@given(PROFILES | RAMPS, st.integers(0, 2**32))
def test_requests_come_as_the_rate_has_it(
    profile: tuple[tuple[float, float], ...], seed: int
) -> None:
    trace = mix([Source(models=("m",), rate=profile, cv=0.01, **SHORT)], seed=seed)
    arrivals = np.array([job.arrival for job in trace])
    expected = 0.0
    for (begin, first), (end, last) in pairwise(profile):
        middle = (begin + end) / 2
        half = expected + (first + (first + last) / 2) / 2 * (middle - begin)
        expected += (first + last) / 2 * (end - begin)
        # With gaps this even the count is off by a part of one request and little more.
        for moment, count in ((middle, half), (end, expected)):
            assert (arrivals <= moment).sum() == pytest.approx(count, abs=1.01 + 0.07 * sqrt(count))
        if first == last == 0:
            assert not ((begin < arrivals) & (arrivals < end)).any()


@settings(deadline=None, max_examples=20)
@given(cv=st.floats(0.3, 3), seed=st.integers(0, 2**32))
def test_gaps_vary_as_asked(cv: float, seed: int) -> None:
    trace = mix([Source(models=("m",), rate=steps((4000, 1)), cv=cv, **SHORT)], seed=seed)
    gaps = [after.arrival - before.arrival for before, after in pairwise(trace)]
    # Seven standard errors of the deviation of a gamma law, whose kurtosis is 3 + 6 cv^2.
    allowed = 7 * sqrt((2 + 6 * cv**2) / len(gaps)) / 2
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=allowed)


@pytest.mark.parametrize("cv", [0.25, 1, 4])
def test_a_bursty_adapter_brings_no_more_than_its_rate(cv: float) -> None:
    names = tuple(f"m{i}" for i in range(2000))
    source = Source(models=names, rate=steps((100, 10)), cv=cv, alpha=0, **SHORT)
    counts = Counter(job.model for job in mix(split(source), seed=3))
    each = [counts[name] for name in names]
    # Half a request each: an ordinary renewal process of cv 4 would bring thrice as many.
    assert fmean(each) == pytest.approx(0.5, abs=5 * stdev(each) / sqrt(len(each)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("choice", "alpha", "shares"),
    [
        ("zipf", 1.0, (12 / 25, 6 / 25, 4 / 25, 3 / 25)),
        ("zipf", 0.0, (1 / 4, 1 / 4, 1 / 4, 1 / 4)),
        ("power", 2.0, (1 / 16, 3 / 16, 5 / 16, 7 / 16)),
        ("power", 0.5, (0.5, sqrt(0.5) - 0.5, sqrt(0.75) - sqrt(0.5), 1 - sqrt(0.75))),
        ("round-robin", 1.0, (1 / 4, 1 / 4, 1 / 4, 1 / 4)),
    ],
)
def test_models_are_asked_in_their_shares(
    own: bool, choice: Any, alpha: float, shares: tuple[float, ...]
) -> None:
    source = Source(
        models=tuple("abcd"), rate=steps((100, 40)), choice=choice, alpha=alpha, **SHORT
    )
    counts = Counter(job.model for job in mix(split(source) if own else [source], seed=5))
    for model, share in zip("abcd", shares, strict=True):
        assert counts[model] == pytest.approx(4000 * share, abs=5 * sqrt(4000 * share))


def test_a_tenant_can_cycle_through_its_adapters() -> None:
    source = Source(models=ADAPTERS, rate=steps((100, 5)), choice="round-robin", **SHORT)
    trace = mix([source])
    assert [job.model for job in trace] == [ADAPTERS[i % 200] for i in range(len(trace))]


BUSY = Source(models=("x", "y"), rate=ramp(1, 9, 10), tenant="busy", priority=2, ttft_slo=1.5)
QUIET = Source(models=("z",), rate=steps((3, 4), (4, 0), (3, 4)), tenant="quiet", cv=2)


def of(trace: Trace, tenant: str) -> list[Job]:
    return [dataclasses.replace(job, index=0) for job in trace if job.tenant == tenant]


def test_a_mix_is_pure_and_its_sources_do_not_touch_each_other() -> None:
    both = mix([BUSY, QUIET], seed=1)
    assert both == mix([BUSY, QUIET], seed=1)
    assert [job.index for job in both] == list(range(len(both)))
    assert all(before.arrival <= job.arrival for before, job in pairwise(both))
    assert of(both, "busy") == of(mix([BUSY], seed=1), "busy")
    slower = msgspec.structs.replace(BUSY, rate=ramp(1, 2, 10))
    assert of(both, "quiet") == of(mix([slower, QUIET], seed=1), "quiet") != []
    assert {(job.priority, job.ttft_slo) for job in of(both, "busy")} == {(2, 1.5)}
    assert not [job for job in of(both, "quiet") if 3 < job.arrival < 7]


def test_no_two_sources_nor_seeds_send_the_same_prompts() -> None:
    traces = [mix([QUIET, QUIET, QUIET], seed=seed) for seed in range(3)]
    prompts = [job.prompt for trace in traces for job in trace]
    assert len(set(prompts)) == len(prompts) > 50


JOBS = st.builds(
    Job, index=st.integers(0, 9), arrival=st.integers(0, 9).map(float), model=st.sampled_from("ab"),
    prompt=st.just((1,)), output_tokens=st.integers(1, 9), tenant=st.sampled_from(["a", "b"]),
)  # fmt: skip
TRACES = st.lists(JOBS, max_size=9).map(lambda jobs: tuple(sorted(jobs, key=lambda j: j.arrival)))


@given(st.lists(TRACES, max_size=4))
def test_a_merge_keeps_every_job_and_every_order(traces: list[Trace]) -> None:
    merged = merge(*traces)
    assert [job.index for job in merged] == list(range(len(merged)))
    every = [dataclasses.replace(job, index=0) for trace in traces for job in trace]
    got = [dataclasses.replace(job, index=0) for job in merged]
    # Python's own sort is stable: of equal arrivals, those given first lead.
    assert got == sorted(every, key=lambda job: job.arrival)
    faster = scale(merged, 4)
    assert [job.arrival * 4 for job in faster] == [job.arrival for job in merged]
    assert [dataclasses.replace(job, arrival=0) for job in faster] == [
        dataclasses.replace(job, arrival=0) for job in merged
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()}, {"choice": "best"}, {"alpha": -1}, {"cv": 0}, {"cv": float("nan")},
        {"tenant": ""}, {"priority": -1}, {"priority": 101}, {"ttft_slo": 0},
        {"ttft_slo": float("inf")}, {"input_range": (5, 5)}, {"output_range": (0, 2)},
        {"rate": ((0, 1),)}, {"rate": ((1, 1), (2, 1))}, {"rate": ((0, 1), (2, 1), (1, 1))},
        {"rate": ((0, -1), (1, 1))}, {"rate": ((0, 1), (float("nan"), 1))},
    ],
)  # fmt: skip
def test_a_source_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Source(**{"models": ("m",), "rate": ((0, 1), (1, 1)), **wrong})


def test_a_mix_is_bounded() -> None:
    with pytest.raises(ConfigError, match="requests expected"):
        mix([Source(models=("m",), rate=steps((1e6, 1e6)))])
    with pytest.raises(ConfigError, match="vocab"):
        mix([QUIET], vocab=0)
    with pytest.raises(ConfigError, match="seed"):
        mix([QUIET], seed=-1)
    with pytest.raises(ConfigError, match="speed"):
        scale(mix([QUIET]), 0)


def test_the_script_writes_sloras_trace(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slora.jsonl"
    flags = ["--rate", "2", "--duration", "30", "--alpha", "0.3", "--input-range", "4,9"]
    code = script.main(["slora", "--models", "adapter-{000..199}", *flags, "--out", str(out)])
    wanted = slora(models=ADAPTERS, rate=2, duration=30, alpha=0.3, input_range=(4, 9))
    assert code == 0 and trace_file.load(out) == wanted
    assert capsys.readouterr().out.startswith("60 requests in ")


def test_the_script_writes_a_mix(script: ModuleType, tmp_path: Path) -> None:
    file, out = tmp_path / "mix.yaml", tmp_path / "mix.jsonl"
    file.write_text(
        "seed: 4\nvocab: 100\nsources:\n"
        "- {tenant: a, models: ['m-{8..10}', base], rate: [[0, 2], [9, 5]], own_process: true}\n"
        "- {tenant: b, models: [base], rate: [[0, 2], [9, 2]], cv: 3, ttft_slo: 2}\n"
    )
    assert script.main(["mix", str(file), "--out", str(out)]) == 0
    own = Source(tenant="a", models=("m-8", "m-9", "m-10", "base"), rate=ramp(2, 5, 9))
    other = Source(tenant="b", models=("base",), rate=steps((9, 2)), cv=3, ttft_slo=2)
    assert trace_file.load(out) == mix([*split(own), other], seed=4, vocab=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "mix.yaml: while parsing"),
        ("sources: [{models: [a], rate: [[0, 1], [1, 1]], cvs: 2}]", "unknown field `cvs`"),
        ("sources: [{models: [a], rate: [[0, 1]]}]", "rate is"),
        ("sources: [{models: ['{9..1}'], rate: [[0, 1], [1, 1]]}]", "0 names"),
        ("sources: [{models: [a], rate: [[0, 0], [1, 0]]}]", "no request"),
    ],
)
def test_the_script_says_what_is_wrong_with_a_mix(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file, out = tmp_path / "mix.yaml", tmp_path / "mix.jsonl"
    file.write_text(text)
    assert script.main(["mix", str(file), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()
    assert script.main(["mix", "/none", "--out", str(out)]) == 2
