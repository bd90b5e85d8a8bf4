"""The report's numbers against the standard library, brute force and a run computed by hand."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.bench import report
from jslora.bench.client import Record, Run
from jslora.bench.plot import draw

GOOD = Record(
    index=0, model="a", due=None, sent=1.0, arrivals=(1.5, 1.7, 2.0), end=2.25,
    asked_tokens=6, input_tokens=10, cached_tokens=4, output_tokens=6, counted=True,
    finish_reason="length", error=None, detail=None,
)  # fmt: skip
# Six tokens in three chunks; one token; a refusal; another.
RECORDS = (
    GOOD,
    dataclasses.replace(
        GOOD, index=1, model="b", sent=0.0, arrivals=(0.25,), end=0.5, output_tokens=1,
        cached_tokens=0, counted=False,
    ),
    dataclasses.replace(
        GOOD, index=2, sent=2.0, arrivals=(), end=4.0, output_tokens=0,
        error="HTTP 503", detail="full",
    ),
    dataclasses.replace(
        GOOD, index=3, sent=2.5, arrivals=(3.0,), end=3.5, output_tokens=1,
        error="HTTP 503", detail="fuller",
    ),
)  # fmt: skip
RUN = Run(started=1.7e9, duration=4.0, cpu_seconds=0.00035, records=RECORDS)


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=200))
def test_latencies_equal_the_standard_librarys(seconds: list[float]) -> None:
    got = report.latency(seconds)
    assert got is not None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    assert got.mean == pytest.approx(statistics.fmean(seconds) * 1e3, rel=1e-9, abs=1e-9)
    for value, percent in ((got.p50, 50), (got.p90, 90), (got.p99, 99)):
        assert value == pytest.approx(cuts[percent - 1] * 1e3, rel=1e-9, abs=1e-9)


def test_no_values_have_no_latency() -> None:
    assert report.latency([]) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12))
def test_peak_concurrency_equals_counting_at_every_moment(spans: list[tuple[int, int]]) -> None:
    records = [
        dataclasses.replace(GOOD, sent=float(begin), end=float(begin + length))
        for begin, length in spans
    ]
    most = max(sum(b <= moment < b + n for b, n in spans) for moment in range(40))
    assert report.peak_concurrency(records) == most


def test_a_run_computed_by_hand() -> None:
    summary = report.summarize(RUN)
    assert (summary.successful, summary.failed, summary.duration) == (2, 2, 4.0)
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (20, 4, 7)
    assert summary.request_throughput == 0.5
    assert summary.output_throughput == 1.75
    assert summary.total_throughput == 6.75
    assert summary.peak_concurrency == 2
    assert summary.tokens_per_chunk == 7 / 4
    assert summary.client_cpu_us == pytest.approx(50)
    assert summary.ttft is not None and summary.ttft.mean == pytest.approx(375)
    assert summary.itl is not None and summary.itl.mean == pytest.approx(250)
    assert summary.tpot is not None and summary.tpot.mean == pytest.approx(100)
    assert summary.e2e is not None and summary.e2e.mean == pytest.approx(875)
    assert summary.lag is None
    assert summary.errors == (report.ErrorGroup(kind="HTTP 503", count=2, example="full"),)
    assert len(summary.notes) == 2
    assert "1 requests got fewer tokens" in summary.notes[0]
    assert "1 requests came without usage" in summary.notes[1]


def test_each_models_share_adds_up_to_the_run() -> None:
    shares, whole = report.summarize_by(RUN, "model"), report.summarize(RUN)
    assert list(shares) == ["a", "b"]
    for name in ("successful", "failed", "output_tokens", "input_tokens", "output_throughput"):
        assert sum(getattr(own, name) for own in shares.values()) == getattr(whole, name)
    assert shares["b"].tpot is None and shares["b"].itl is None


def test_a_late_client_is_noted() -> None:
    late = dataclasses.replace(GOOD, due=0.5)
    summary = report.summarize(dataclasses.replace(RUN, records=(late,)))
    assert summary.lag is not None and summary.lag.mean == pytest.approx(500)
    assert "the client was late: requests left 500.0 ms" in summary.notes[-1]
    assert "LAG" in report.render([dataclasses.replace(RUN, records=(late,))])


def test_the_text_says_what_was_measured() -> None:
    text = report.render([RUN], ["model", "tenant"])
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "Successful requests: 2",
        "Failed requests: 2",
        "Benchmark duration (s): 4.00",
        "Total input tokens: 20 (4 cached)",
        "Total generated tokens: 7",
        "Request throughput (req/s): 0.50",
        "Output token throughput (tok/s): 1.75",
        "Total token throughput (tok/s): 6.75",
        "Peak concurrent requests: 2",
        "TTFT 375.00 375.00 475.00 497.50",
        "E2E 875.00 875.00 1175.00 1242.50",
        "Error: 2 x HTTP 503: full",
        "a 1 2 1.50 500.00 500.00 250.00 100.00 1250.00",
        "b 1 0 0.25 250.00 250.00 - - 500.00",
        "default 2 2 1.75 375.00 497.50 250.00 100.00 875.00",
    } <= lines


def test_a_run_without_success_has_no_numbers_but_its_errors() -> None:
    text = report.render([dataclasses.replace(RUN, records=RECORDS[2:])])
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"TTFT - - - -", "Successful requests: 0", "Error: 2 x HTTP 503: full"} <= lines


def test_of_several_runs_the_middle_one_is_shown_with_the_spread() -> None:
    runs = [dataclasses.replace(RUN, duration=d) for d in (1.0, 7.0, 3.5)]
    text = report.render(runs)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "Output token throughput (tok/s): 2.00",
        "Above: run 3 of 3. Over all runs:",
        "output tok/s 2.00 1.00 7.00",
        "req/s 0.57 0.29 2.00",
    } <= lines


def test_the_json_has_a_stable_form() -> None:
    document = json.loads(report.as_json([RUN, RUN], {"seed": 0}))
    assert set(document) == {"schema", "conditions", "client", "definitions", "spread", "runs"}
    assert document["schema"] == 1 and document["conditions"] == {"seed": 0}
    assert set(document["spread"]["output_throughput"]) == {"median", "min", "max"}
    run = document["runs"][1]
    assert set(run) == {"started", "summary", "models", "tenants", "requests"}
    assert set(run["summary"]) == {
        "successful", "failed", "duration", "input_tokens", "cached_tokens", "output_tokens",
        "request_throughput", "output_throughput", "total_throughput", "peak_concurrency",
        "tokens_per_chunk", "client_cpu_us", "ttft", "itl", "tpot", "e2e", "lag", "errors", "notes",
    }  # fmt: skip
    assert set(run["summary"]["ttft"]) == {"mean", "p50", "p90", "p99"}
    assert set(run["summary"]["errors"][0]) == {"kind", "count", "example"}
    assert set(run["models"]) == {"a", "b"} and set(run["models"]["a"]) == set(run["summary"])
    first = run["requests"][0]
    assert set(first) == {
        "index", "model", "due", "sent", "arrivals", "end", "asked_tokens", "input_tokens",
        "cached_tokens", "output_tokens", "counted", "finish_reason", "error", "detail",
        "tenant", "ttft", "tpot", "e2e",
    }  # fmt: skip
    assert run["tenants"] == {"default": run["summary"] | {"client_cpu_us": None}}
    assert first["arrivals"] == [1.5, 1.7, 2.0] and first["tpot"] == 0.1
    assert run["requests"][2]["ttft"] is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    report.save(tmp_path / "out.json", b"old")
    report.save(tmp_path / "out.json", b"new")
    assert (tmp_path / "out.json").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        report.save(tmp_path / "folder", b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "folder"}


@pytest.mark.parametrize("records", [RECORDS, ()])
def test_a_run_can_be_drawn(records: tuple[Record, ...]) -> None:
    assert draw(dataclasses.replace(RUN, records=records)).startswith(b"\x89PNG\r\n")
