"""The workload is a pure function of spec and run, and its random parts follow their laws."""

import dataclasses
import json
from itertools import islice, pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.bench.workload import Job, Prompt, Spec, generate, load_prompts
from jslora.errors import ConfigError

SPECS = st.builds(
    Spec,
    models=st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True).map(tuple),
    assignment=st.sampled_from(["round-robin", "random", "zipf"]),
    zipf_alpha=st.floats(0, 3),
    rate=st.none() | st.floats(0.1, 1000),
    burstiness=st.floats(0.1, 10),
    input_tokens=st.integers(1, 40),
    output_tokens=st.integers(1, 40),
    vocab=st.integers(1, 200_000),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None)
@given(SPECS, st.integers(0, 3), st.integers(1, 30))
def test_jobs_are_what_the_spec_says_however_many_are_taken(
    spec: Spec, run: int, taken: int
) -> None:
    jobs = list(islice(generate(spec, run), 30))
    assert list(islice(generate(spec, run), taken)) == jobs[:taken]
    assert [job.index for job in jobs] == list(range(30))
    for before, job in pairwise(jobs):
        assert before.arrival <= job.arrival
    for job in jobs:
        assert job.model in spec.models
        assert len(job.prompt) == spec.input_tokens
        assert all(isinstance(t, int) and 0 <= t < spec.vocab for t in job.prompt)
        assert job.output_tokens == spec.output_tokens
        assert spec.rate is not None or job.arrival == 0


@settings(deadline=None)
@given(SPECS)
def test_one_random_part_does_not_depend_on_another(spec: Spec) -> None:
    spec = dataclasses.replace(spec, rate=5.0, input_tokens=20, vocab=50_000)
    jobs = list(islice(generate(spec, 1), 20))
    faster = list(islice(generate(dataclasses.replace(spec, rate=10.0), 1), 20))
    again = list(islice(generate(spec, 2), 20))
    assert [job.prompt for job in faster] == [job.prompt for job in jobs]
    assert [job.model for job in faster] == [job.model for job in jobs]
    assert [job.arrival for job in faster] == pytest.approx([job.arrival / 2 for job in jobs])
    assert [(j.arrival, j.model) for j in again] == [(j.arrival, j.model) for j in jobs]
    assert not {job.prompt for job in again} & {job.prompt for job in jobs}


@settings(deadline=None, max_examples=25)
@given(
    rate=st.floats(0.1, 1000),
    burstiness=st.floats(0.25, 8),
    seed=st.integers(0, 2**32),
)
def test_gaps_have_the_mean_and_variation_of_the_gamma_law(
    rate: float, burstiness: float, seed: int
) -> None:
    count = 3000
    spec = Spec(models=("m",), rate=rate, burstiness=burstiness, input_tokens=1, seed=seed)
    arrivals = [0.0, *(job.arrival for job in islice(generate(spec, 1), count))]
    gaps = [after - before for before, after in pairwise(arrivals)]
    variation = 1 / sqrt(burstiness)
    # Seven standard errors: of the mean, and of the deviation of a gamma law (kurtosis 3 + 6/k).
    assert fmean(gaps) * rate == pytest.approx(1, abs=7 * variation / sqrt(count))
    allowed = 7 * sqrt((2 + 6 / burstiness) / count) / 2
    assert pstdev(gaps) * rate / variation == pytest.approx(1, abs=allowed)


@settings(deadline=None, max_examples=25)
@given(
    assignment=st.sampled_from(["random", "zipf"]),
    alpha=st.floats(0, 2),
    models=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_random_models_are_drawn_in_their_shares(
    assignment: str, alpha: float, models: int, seed: int
) -> None:
    count = 3000
    names = tuple(f"m{k}" for k in range(1, models + 1))
    spec = Spec(models=names, assignment=assignment, zipf_alpha=alpha, input_tokens=1, seed=seed)  # type: ignore[arg-type]
    drawn = [job.model for job in islice(generate(spec, 1), count)]
    exponent = alpha if assignment == "zipf" else 0
    total = sum(k**-exponent for k in range(1, models + 1))
    for k, name in enumerate(names, 1):
        share = k**-exponent / total
        error = sqrt(share * (1 - share) / count)
        assert drawn.count(name) / count == pytest.approx(share, abs=7 * error + 3 / count)


def test_round_robin_takes_models_in_turn() -> None:
    jobs = islice(generate(Spec(models=("a", "b", "c"), input_tokens=1), 1), 7)
    assert [job.model for job in jobs] == ["a", "b", "c", "a", "b", "c", "a"]


def test_a_trace_is_the_same_in_every_run_but_the_first() -> None:
    prompts: list[Prompt] = [tuple(range(30)), tuple(range(30)), "text"]
    trace = tuple(
        Job(index=i, arrival=float(i), model="m", prompt=prompt, output_tokens=1)
        for i, prompt in enumerate(prompts)
    )
    assert [job.input_tokens for job in trace] == [30, 30, 0]
    assert tuple(generate(trace, 1)) == tuple(generate(trace, 2)) == trace
    warm = list(generate(trace, 0))
    assert len({warm[0].prompt, warm[1].prompt, trace[0].prompt}) == 3
    assert all(isinstance(token, int) and 0 <= token < 30 for token in warm[0].prompt)
    assert [dataclasses.replace(job, prompt="") for job in warm] == [
        dataclasses.replace(job, prompt="") for job in trace
    ]
    assert warm[0].input_tokens == 30 and warm[2] == trace[2]


def test_prompts_of_a_file_are_taken_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file.write_text(json.dumps({"prompt": "één"}) + "\n\n" + json.dumps({"prompt": "two"}) + "\n")
    assert load_prompts(file, "completions") == ("één", "two")
    assert load_prompts(file, "chat")[1] == ({"role": "user", "content": "two"},)
    file.write_text(json.dumps({"messages": chat}))
    assert load_prompts(file, "chat") == (tuple(chat),)
    spec = Spec(models=("m",), prompts=("x", "y"))
    assert [job.prompt for job in islice(generate(spec, 1), 5)] == ["x", "y", "x", "y", "x"]


@pytest.mark.parametrize(
    ("line", "endpoint", "message"),
    [
        ("{", "completions", ":2: "),
        ("[1]", "completions", ":2: "),
        ('{"prompt": 3}', "completions", "prompt"),
        ('{"text": "a"}', "completions", "text"),
        ("{}", "completions", "either a prompt or messages"),
        ('{"prompt": "a", "messages": [{}]}', "chat", "either a prompt or messages"),
        ('{"messages": [{}]}', "completions", "chat endpoint"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, endpoint: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_prompts(file, endpoint)
    assert f"{file}:2" in error.value.message


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_prompts(tmp_path / "none", "chat")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        load_prompts(tmp_path / "empty", "chat")


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()},
        {"assignment": "shuffled"},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"burstiness": float("inf")},
        {"vocab": 0},
        {"output_tokens": -1},
        {"seed": -1},
        {"zipf_alpha": -0.5},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name.rstrip("s")):
        Spec(**{"models": ("m",), **wrong})  # type: ignore[arg-type]
