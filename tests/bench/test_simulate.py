"""The simulated engine: what its clock must show for known step times, and that it is exact."""

import importlib
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.bench import s_lora, trace_file
from jslora.bench import simulate as simulate_module
from jslora.bench.experiment import Task, deviation, mean, run_all
from jslora.bench.outcomes import summarize
from jslora.bench.simulate import Machine, Simulated, simulate
from jslora.bench.steptime import Work
from jslora.bench.synthetic_store import BASE, HostTier, SyntheticStore
from jslora.bench.traces import slora
from jslora.bench.virtual import Link, Timeline, Uploads
from jslora.bench.workload import Job
from jslora.calls import Chunk
from jslora.config import SchedulerSection
from jslora.errors import AdapterRejected, ConfigError
from jslora.model.config import ModelConfig
from scripts import simulate as script

TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=100, hidden=8, layers=2, heads=2, kv_heads=2,
    head_dim=4, feed_forward=16, max_positions=256,
)  # fmt: skip
# A page of 4 tokens has 2 * 4 * 2 * 4 = 64 numbers a layer; rank 4 on q, k, v and o takes
# 4 * 4 * (8 + 8) = 256 of them: 4 pages, 2 layers * 256 * 2 bytes = 1024 bytes.
RANK_4 = (4, 4, 4, 4, 0, 0, 0)
BYTES = 1024


@dataclass(frozen=True)
class Steady:
    """Every step takes as long."""

    each: float = 1.0

    def seconds(self, work: Work) -> float:
        return self.each


def machine(**options: object) -> Machine:
    base = Machine(
        model=TINY, step_time=Steady(), pages=65, page_size=4, transfer=1e12,
        adapters={f"a{i}": RANK_4 for i in range(6)},
    )  # fmt: skip
    return replace(base, **options)  # type: ignore[arg-type]


def section(**options: object) -> SchedulerSection:
    return SchedulerSection(**{"max_running": 8, "max_step_tokens": 32} | options)


def job(index: int, arrival: float = 0.0, model: str = BASE, prompt: int = 5, out: int = 3) -> Job:
    ids = tuple(1 + (index + i) % 90 for i in range(prompt))
    return Job(index=index, arrival=arrival, model=model, prompt=ids, output_tokens=out)


def times(run: Simulated) -> list[tuple[float, ...]]:
    return [outcome.times for outcome in run.outcomes]


def test_one_request_takes_its_steps() -> None:
    run = simulate([job(0, arrival=2.5)], machine(), section())
    assert times(run) == [(3.5, 4.5, 5.5)]
    assert (run.steps, run.seconds, run.outcomes[0].error) == (3, 5.5, None)
    assert (run.prompt_tokens, run.generated_tokens) == (5, 3)


def test_a_long_prompt_takes_several_steps() -> None:
    run = simulate([job(0, prompt=70, out=1)], machine(), section())
    assert times(run) == [(3.0,)]  # 32, 32 and 6 tokens
    assert run.samples.tokens.tolist() == [32, 32, 6]


def test_who_comes_during_a_step_joins_the_next_but_one() -> None:
    # At 0.5 the first step runs and the second is planned already: the third is the newcomer's.
    run = simulate([job(0, out=5), job(1, arrival=0.5, out=1)], machine(), section())
    assert times(run)[1] == (3.0,)
    alone = simulate(
        [job(0, out=5), job(1, arrival=0.5, out=1)], machine(), section(lookahead=False)
    )
    assert times(alone)[1] == (2.0,)


def test_an_end_token_ends_what_may_be_longer() -> None:
    run = simulate([job(0), job(1, out=50)], machine(declared=20), section())
    assert [len(found) for found in times(run)] == [3, 20]
    assert [outcome.error for outcome in run.outcomes] == [None, None]


def test_an_adapter_comes_before_its_first_step() -> None:
    run = simulate([job(0, model="a0")], machine(transfer=BYTES / 10), section())
    assert times(run)[0][0] == pytest.approx(11.0)
    assert (run.loads, run.samples.adapters.tolist()) == (1, [1, 1, 1])
    both = [job(0, model="a0"), job(1, model="a1")]
    first, second = times(simulate(both, machine(transfer=BYTES / 10), section()))
    assert first[0] == pytest.approx(11.0)
    assert second[0] >= 21.0, "transfers share one link"


def test_an_adapter_comes_from_disk_when_host_memory_has_it_no_more() -> None:
    host = HostTier(bytes=BYTES, latency=1.0, bandwidth=BYTES / 4)
    jobs = [job(i, arrival=100.0 * i, model=f"a{i % 2}", out=1) for i in range(4)]
    small = machine(host=host, pages=9, declared=4)
    waits = [outcome.waited for outcome in simulate(jobs, small, section()).outcomes]
    assert waits == pytest.approx([6.0] * 4, abs=0.01)  # 1 + 4 to read, a step
    roomy = replace(small, host=replace(host, bytes=2 * BYTES))
    waits = [outcome.waited for outcome in simulate(jobs, roomy, section()).outcomes]
    assert waits == pytest.approx([6.0, 6.0, 1.0, 1.0], abs=0.01)


def test_what_cannot_be_served_ends_with_its_error() -> None:
    jobs = [job(0, model="no-such"), job(1, prompt=300), job(2)]
    outcomes = simulate(jobs, machine(), section()).outcomes
    assert [o.error for o in outcomes] == ["not_found_error", "invalid_request_error", None]
    with pytest.raises(ConfigError, match="token ids"):
        simulate(
            [Job(index=0, arrival=0, model=BASE, prompt="hi", output_tokens=1)],
            machine(),
            section(),
        )
    with pytest.raises(AdapterRejected, match="pages"):
        simulate([], machine(adapters={"big": (99, 0, 0, 0, 0, 0, 0)}, pages=9), section())


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(-1, 5), st.integers(1, 40), st.integers(1, 30)),
        min_size=1, max_size=25,
    ),
    st.sampled_from([["fcfs"], ["newest"], ["fair_adapters"], ["cluster", "shortest"], ["slo"]]),
    st.booleans(), st.booleans(), st.sampled_from(["declared", 0.5]),
)  # fmt: skip
def test_every_request_ends_and_every_page_is_accounted_for(
    found: list[tuple[float, int, int, int]], policy: list[str], cached: bool, tight: bool,
    reserve: str | float,
) -> None:  # fmt: skip
    found = sorted(found)
    jobs = [
        job(i, at, BASE if a < 0 else f"a{a}", prompt, out)
        for i, (at, a, prompt, out) in enumerate(found)
    ]
    small = machine(pages=26 if tight else 65, prefix_cache=cached, declared=40)
    run = simulate(jobs, small, section(policy=policy, reserve=reserve), check=True)
    again = simulate(jobs, small, section(policy=policy, reserve=reserve))
    assert times(run) == times(again) and run.seconds == again.seconds
    for outcome, made in zip(run.outcomes, jobs, strict=True):
        assert outcome.job is made
        assert outcome.error is None or (outcome.error == "too_late_error" and policy == ["slo"])
        if outcome.error is None:
            assert len(outcome.times) == made.output_tokens
            assert made.arrival < outcome.times[0]
            assert (np.diff(outcome.times) > 0).all()


def test_equal_runs_are_equal_to_the_bit() -> None:
    row = replace(s_lora.load()[0], duration=20.0, adapters=30, setting="S2")
    first, second = (
        simulate(s_lora.trace(row), s_lora.machine(row), s_lora.section(row)) for _ in range(2)
    )
    assert first.outcomes == second.outcomes
    for name in ("ended", "seconds", "tokens", "rows", "adapters", "pages_free", "waiting"):
        assert np.array_equal(getattr(first.samples, name), getattr(second.samples, name))


def test_steps_leave_no_gap_while_there_is_work() -> None:
    run = simulate([job(i, arrival=0.3 * i, out=10) for i in range(6)], machine(), section())
    assert np.diff(run.samples.ended).tolist() == [1.0] * (run.steps - 1)


def test_a_split_pool_keeps_its_sides_apart() -> None:
    jobs = [job(i, model=f"a{i % 6}", prompt=20, out=20) for i in range(12)]
    run = simulate(jobs, machine(pages=65, adapter_pages=24), section())
    assert [outcome.error for outcome in run.outcomes] == [None] * 12
    assert run.samples.pages_free.max() <= 65 - 24 - 1
    assert run.evictions == 0, "there is room for all six"
    narrow = simulate(jobs, machine(pages=65, adapter_pages=8), section())
    assert narrow.samples.adapters.max() <= 2 and narrow.evictions > 0
    assert [outcome.error for outcome in narrow.outcomes] == [None] * 12


def test_thousands_of_adapters_take_no_memory() -> None:
    ranks = {f"a{i}": (64,) * 7 for i in range(2000)}
    store = SyntheticStore(ranks, s_lora.MODELS["S2"], 131072, 900, Timeline())
    registration = store.bind("a1234")
    assert registration.version is not None
    blob = store.blob(registration.version)
    assert blob is not None and blob.nbytes == registration.version.packed_bytes > 2e8
    assert set(blob.strides) == {0}


# Time ---------------------------------------------------------------------------------------------


def test_events_happen_in_order_each_at_its_time() -> None:
    timeline, seen = Timeline(), []
    for when, name in ((2.0, "b"), (1.0, "a"), (2.0, "c"), (5.0, "d")):
        timeline.at(when, lambda name=name: seen.append((timeline(), name)))
    timeline.at(1.0, lambda: timeline.at(0.0, lambda: seen.append((timeline(), "at once"))))
    timeline.advance(3.0)
    assert seen == [(1.0, "a"), (1.0, "at once"), (2.0, "b"), (2.0, "c")]
    assert (timeline.now, timeline.next) == (3.0, 5.0)
    timeline.advance(math.inf)
    assert timeline.next == math.inf


def test_a_link_takes_one_thing_after_the_other() -> None:
    timeline = Timeline()
    link = Link(timeline, bandwidth=10.0, latency=0.5)
    assert [link.send(20), link.send(10)] == [2.5, 4.0]
    timeline.advance(10.0)
    uploads = Uploads(timeline, link)
    data = np.zeros((1, 1, 5), np.float32)
    future = uploads(Chunk("", 0, 1, (1,), np.zeros(1, np.int32), data))
    assert (list(uploads.open), future.done()) == ([12.5], False)
    timeline.advance(12.5)
    assert (list(uploads.open), uploads.done, future.result()) == ([], 1, 20)


def test_the_turn_is_bounded_as_the_engines() -> None:
    core = importlib.import_module("jslora.core")
    programs = importlib.import_module("jslora.programs")
    for module, name in (
        (core, "PATIENCE"), (programs, "UPLOAD_BYTES")
    ):  # fmt: skip
        assert getattr(simulate_module, name) == getattr(module, name)


# S-LoRA -------------------------------------------------------------------------------------------


def test_every_published_row_is_a_setting() -> None:
    rows = s_lora.load()
    assert len(rows) == 196
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    for row in rows:
        assert 0 < row.figures.throughput <= 10 and row.figures.ttft < row.figures.latency
        assert s_lora.section(row).reserve == "declared"
    for row in {(row.group, row.variant): row for row in rows}.values():
        found = s_lora.machine(row)
        simulate([], found, s_lora.section(row))  # all of its adapters can be loaded
        assert found.pages == row.slots // 16 + 1
        assert len(found.adapters) == row.adapters
    (row,) = (
        r for r in rows if r.group == "adapters/a10g/S2" and r.name.startswith("split, n=20 ")
    )
    assert s_lora.machine(row).adapter_pages == (14500 - 10000) // 16


def attainment(variant: str) -> float:
    """Of S2 on an A10G at two requests a second, a quarter more than it can bear."""
    group = [row for row in s_lora.load() if row.group == "cv/a10g/S2"]
    row = next(row for row in group if row.variant == variant)
    row = replace(row, duration=150.0)
    run = simulate(s_lora.trace(row), s_lora.machine(row), s_lora.section(row))
    return summarize(run.outcomes, s_lora.SLO).attainment


def test_giving_up_beats_the_newest_first_beats_the_oldest_first() -> None:
    first, newest, abort = (attainment(name) for name in ("s-lora", "lifo", "abort"))
    assert abort > newest > first


def test_one_pool_beats_two() -> None:
    rows = {
        r.variant: r for r in s_lora.load() if r.group == "adapters/a10g/S2" and r.adapters == 50
    }
    run = {
        variant: simulate(
            slora(models=s_lora.names(50), rate=2.0, duration=90.0),
            s_lora.machine(row), s_lora.section(row),
        )
        for variant, row in rows.items()
    }  # fmt: skip
    assert run["s-lora"].seconds < 0.95 * run["split"].seconds


def test_clustering_helps_where_all_adapters_are_as_popular() -> None:
    """Four of 32 adapters at a time, against as many as come."""
    four, all_of_them = (
        summarize(
            simulate(s_lora.trace(row), s_lora.machine(row), s_lora.section(row)).outcomes,
            s_lora.SLO,
        )
        for variant in ("cluster 4", "cluster 32")
        for row in s_lora.load()
        if row.group == "cluster/a100-40/S4" and (row.variant, row.alpha) == (variant, 1.0)
    )
    assert four.attainment > 1.2 * all_of_them.attainment
    assert four.throughput > all_of_them.throughput


# Side by side -------------------------------------------------------------------------------------


def tasks() -> dict[str, Task]:
    return {
        policy: Task(
            trace=partial(make_jobs, 6), machine=machine(), section=section(policy=[policy]),
            slo=3.0, rate=1.0,
        )
        for policy in ("fcfs", "newest")
    }  # fmt: skip


def make_jobs(count: int) -> tuple[Job, ...]:
    return tuple(job(i, arrival=0.1 * i, model=f"a{i % 6}", out=4 + i) for i in range(count))


def test_processes_change_nothing() -> None:
    alone, spread = run_all(tasks()), run_all(tasks(), processes=2)
    assert list(alone) == list(spread) == ["fcfs", "newest"]
    assert [run.outcomes for run in alone.values()] == [run.outcomes for run in spread.values()]


def test_means_and_deviations_of_every_number() -> None:
    task = tasks()["fcfs"]
    two = [task.summarize(simulate(make_jobs(n), task.machine, task.section)) for n in (4, 6)]
    average, spread = mean(two), deviation(two)
    assert (average.requests, spread.requests) == (5, pytest.approx(2**0.5))
    assert average.throughput == pytest.approx((two[0].throughput + two[1].throughput) / 2)
    assert average.ttft is not None and two[0].ttft is not None and two[1].ttft is not None
    assert average.ttft.p99 == pytest.approx((two[0].ttft.p99 + two[1].ttft.p99) / 2)
    assert average.tenants["default"].requests == 5
    assert average.counters["loads"] == 5 and average.fairness is None


SHORT = ["--duration", "10", "--adapters", "5", "--rate", "1"]


def test_the_script_compares_stacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--policy", "fcfs", "--policy", "cluster,shortest,slo", "--seeds", "1,2"]
    arguments += ["--sweep", "rate=0.5,1", "--json", str(out), "--plot", str(plot)]
    assert script.main([*SHORT, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "rate = 0.5" in printed and "cluster,shortest,slo" in printed
    runs = json.loads(out.read_bytes())["runs"]
    assert len(runs) == 8 and runs["fcfs 0.5 seed 2"]["requests"] == 5
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_script_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, out = tmp_path / "steps.json", tmp_path / "out.json"
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(trace_file.encode(make_jobs(6)))
    step = {"tokens": 1, "rows": 1, "kv": 0, "seconds": 0.5}
    steps.write_text(json.dumps([step, step, step, step]))
    arguments = ["--trace", str(trace), "--steps", str(steps), "--model", "llama3-8b"]
    arguments += ["--device", "h100", "--set", "max_running=3", "--json", str(out)]
    assert script.main(arguments) == 0
    (run,) = json.loads(out.read_bytes())["runs"].values()
    assert (run["completed"], run["counters"]["loads"]) == (6, 6)


def test_the_script_compares_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--tables", "no-such"]) == 2
    assert "adapters/a10g/S2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "slo,fcfs"], "slo"),
        (["--set", "reserve=2"], "reserve"),
        (["--set", "no_such=2"], "no_such"),
        (["--device", "h100"], "floor factor"),
        (["--json", "/no/such/folder/x.json"], "folder"),
        (["--trace", "/no/such.jsonl"], "such.jsonl"),
        (["--pages", "10"], "pages"),
    ],
)
def test_the_script_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*SHORT, *arguments]) == 2
    assert message in capsys.readouterr().err
