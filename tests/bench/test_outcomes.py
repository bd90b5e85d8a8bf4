"""Numbers of a run against a run computed by hand, brute force and the definitions' own sources."""

import json
import statistics
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from jslora.bench import outcomes as o
from jslora.bench import tables
from jslora.bench.outcomes import TOO_LATE, Outcome, Summary
from jslora.bench.policy_plot import draw
from jslora.bench.workload import Job


def outcome(
    arrival: float, times: tuple[float, ...] = (), *, prompt: int = 10, tenant: str = "a",
    error: str | None = None, ended: float | None = None, ttft_slo: float | None = None,
) -> Outcome:  # fmt: skip
    job = Job(
        index=0, arrival=arrival, model="m", prompt=(1,) * prompt, output_tokens=len(times) or 1,
        tenant=tenant, ttft_slo=ttft_slo,
    )  # fmt: skip
    return Outcome(job=job, times=times, error=error, ended=ended)


# Done, done late, aborted, broken off after its first token, done within its own longer SLO.
RUN = (
    outcome(0.0, (1.0, 1.5, 2.0)),
    outcome(1.0, (5.0, 6.0), tenant="b"),
    outcome(2.0, error=TOO_LATE, ended=3.5),
    outcome(2.0, (3.0,), error="internal_error", ended=10.0, tenant="b"),
    outcome(4.0, (8.0, 9.0), prompt=20, ttft_slo=8.0),
)


def test_a_run_computed_by_hand() -> None:
    got = o.summarize(RUN, slo=2.0, weights={"b": 2.0}, loads=7)
    assert (got.requests, got.completed, got.aborted, got.failed) == (5, 3, 1, 1)
    assert got.duration == 10.0
    assert got.throughput == pytest.approx(0.3)
    assert got.strip_throughput is None
    assert got.latency == pytest.approx((2 + 5 + 5) / 3)
    assert got.first_token == pytest.approx((1 + 4 + 1 + 4) / 4)
    assert got.attainment == pytest.approx(2 / 5)
    assert got.satisfaction == pytest.approx((0.75 + 0.75) / 5)
    assert got.output_tokens_per_s == pytest.approx(0.8)
    assert got.total_tokens_per_s == pytest.approx((8 + 50) / 10)
    assert got.itl is not None and got.itl.mean == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert got.most_waiting == 3  # from 2.0 to 3.0: the second, the aborted and the broken one
    assert got.longest_wait == 4.0
    assert got.counters == {"loads": 7}
    # Both wait from 2.0, when a's aborted one comes, to 3.5; b gets a prompt and a token.
    # From 4.0 to 5.0 a's last and b's first wait: a shorter time.
    assert got.interval == (2.0, 3.5)
    assert got.tenants["b"].contended == 12.0
    assert got.tenants["a"].contended == 0.0  # its token at 2.0 was there when the interval began


def test_strip_throughput_leaves_ten_seconds_out_at_either_end() -> None:
    run = [outcome(float(i), (i + 1.0,)) for i in range(100)]
    got = o.summarize(run, slo=2.0, rate=1.25)
    assert got.strip_throughput == pytest.approx((100 - 2 * 12) / (100 - 20))


@given(
    st.lists(
        st.tuples(
            st.floats(0, 50), st.none() | st.floats(0, 20), st.sampled_from([None, 1.0, 9.0])
        ),
        min_size=1,
    ),
    st.floats(0.1, 10),
)
def test_attainment_and_satisfaction_equal_their_definitions(
    rows: list[tuple[float, float | None, float | None]], slo: float
) -> None:
    run = [
        outcome(arrival, () if ttft is None else (arrival + ttft,), ttft_slo=own,
                error=TOO_LATE if ttft is None else None)
        for arrival, ttft, own in rows
    ]  # fmt: skip
    rewards = []
    for each, (_, _, own) in zip(run, rows, strict=True):
        late = each.first_token is None or each.first_token >= (own or slo)
        rewards.append(0 if late else 1 - (each.first_token / (own or slo)) ** 2)
    got = o.summarize(run, slo)
    assert got.satisfaction == pytest.approx(statistics.fmean(rewards), abs=1e-12)
    assert got.attainment == pytest.approx(np.mean([r > 0 for r in rewards]), abs=1e-12)
    assert got.satisfaction <= got.attainment + 1e-12
    assert got.aborted + got.completed == got.requests


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20), st.floats(0.1, 10))
def test_jains_index_is_that_of_its_paper(values: list[float], factor: float) -> None:
    got = o.jain(values)
    variation = np.std(values) / np.mean(values)
    assert got == pytest.approx(1 / (1 + variation**2))
    assert o.jain([value * factor for value in values]) == pytest.approx(got)
    assert o.jain([1.0] * len(values)) == pytest.approx(1)
    assert o.jain([1.0] + [0.0] * len(values)) == pytest.approx(1 / (len(values) + 1))


waits = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 6)),
    min_size=1,
    max_size=14,
)


@given(waits)
def test_the_contended_interval_is_the_longest_in_which_all_wait(
    rows: list[tuple[str, int, int]],
) -> None:
    run = [outcome(float(a), (float(a + n),), tenant=tenant) for tenant, a, n in rows]
    tenants = {tenant for tenant, _, _ in rows}
    full = [
        all(any(t == tenant and a <= second < a + n for t, a, n in rows) for tenant in tenants)
        for second in range(30)
    ]
    runs = "".join("x" if each else " " for each in full).split(" ")
    most = max(map(len, runs)) if len(tenants) > 1 else 0
    got = o.contention(run)
    assert (got is None) == (most == 0)
    if got is not None:
        begin, end = got
        assert end - begin == most
        assert all(full[int(begin) : int(end)])


def test_only_what_came_while_all_waited_counts_for_fairness() -> None:
    busy = [outcome(0.0, (float(i),), prompt=1, tenant="a") for i in range(1, 31)]
    other = [outcome(0.0, (i + 0.5,), prompt=1, tenant="b") for i in range(3, 11)]
    late = outcome(50.0, (60.0,) * 100, tenant="a")
    got = o.summarize([*busy, *other, late], slo=6.0, weights={"b": 1.0})
    assert got.interval == (0.0, 10.5)
    a, b = got.tenants["a"], got.tenants["b"]
    assert (a.contended, b.contended) == (30.0, 24.0)
    assert a.service == 30 * 3 + 10 + 200
    assert got.fairness == pytest.approx(54**2 / (2 * (30**2 + 24**2)))
    fair = o.summarize([*busy, *other, late], slo=6.0, weights={"*": 1.25, "b": 1.0})
    assert fair.fairness == pytest.approx(1)
    assert o.summarize(busy, slo=6.0).fairness is None


@given(waits, st.lists(st.integers(0, 30), max_size=5))
def test_service_counts_what_was_there(
    rows: list[tuple[str, int, int]], moments: list[int]
) -> None:
    run = [outcome(float(a), (a + n, a + n + 1.0), tenant=tenant) for tenant, a, n in rows]
    got = o.service(run, moments)
    for tenant, counted in got.items():
        for moment, value in zip(moments, counted, strict=True):
            prompts = sum(10 for t, a, n in rows if t == tenant and a + n <= moment)
            tokens = sum(
                (a + n <= moment) + (a + n + 1 <= moment) for t, a, n in rows if t == tenant
            )
            assert value == prompts + 2 * tokens


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert set(lines[1]) <= set("|-: ")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def summaries() -> dict[str, Summary]:
    nothing = [outcome(0.0, error=TOO_LATE, ended=6.0)]
    return {
        "fcfs": o.summarize(RUN, slo=2.0, loads=7),
        "slo+fair_tenants": o.summarize(nothing, slo=2.0, evictions=3),
    }


def test_the_table_has_a_column_for_each_stack() -> None:
    got = cells(tables.table(summaries()))
    assert got[0] == ["", "fcfs", "slo+fair_tenants"]
    rows = {line[0]: line[1:] for line in got[2:]}
    assert rows["requests"] == ["5", "1"]
    assert rows["attainment"] == ["0.400", "0.000"]
    assert rows["TTFT p50, s"] == ["2.500", "-"]
    assert rows["loads"] == ["7", "-"] and rows["evictions"] == ["-", "3"]
    assert rows["service, a"] == ["40", "0"] and rows["service, b"] == ["26", "-"]


def test_figures_stand_beside_published_ones() -> None:
    simulated = {name: tables.figures(summary) for name, summary in summaries().items()}
    published = {
        "fcfs": {"throughput": 0.25, "attainment": 0.5, "aborted": 0.0},
        "slo+fair_tenants": {"latency": 3.0},
        "not simulated": {"ttft": 1.0},
    }
    assert cells(tables.compare(simulated, published)) == [
        ["", "throughput", "attainment", "aborted", "latency"],
        ["-" * 16, *("-" * n + ":" for n in (16, 15, 6, 6))],
        ["fcfs", "0.3 / 0.25 (+20%)", "0.4 / 0.5 (-20%)", "1 / 0", "4 / -"],
        ["slo+fair_tenants", "0 / -", "0 / -", "1 / -", "- / 3"],
    ]


def test_json_holds_every_number() -> None:
    got = json.loads(o.as_json(summaries(), {"rate": 2}))
    assert got["conditions"] == {"rate": 2}
    assert got["runs"]["fcfs"]["tenants"]["b"]["contended"] == 12.0
    assert got["runs"]["fcfs"] == json.loads(json.dumps(asdict(summaries()["fcfs"])))
    assert set(got["definitions"]) - {"service", "fairness"} <= set(got["runs"]["fcfs"])


def test_everything_can_be_drawn() -> None:
    found = summaries()
    sweep = {name: {2.0: summary, 4.0: summary} for name, summary in found.items()}
    runs = {"fcfs": RUN, "slo+fair_tenants": RUN[:3]}
    bare = imread(BytesIO(draw(sweep, "requests/s", {})))
    full = imread(BytesIO(draw(sweep, "requests/s", runs, bound={2.0: 0.9, 4.0: 0.5})))
    assert full.shape[0] > bare.shape[0] and full.shape[1] == bare.shape[1]
