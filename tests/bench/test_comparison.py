"""Ratios, tables and JSON of slices whose numbers are known beforehand."""

import dataclasses
import json
from math import isnan

import pytest

from jslora.bench import comparison
from jslora.bench.adapters import Slice
from jslora.bench.client import Record, Run
from jslora.bench.comparison import Question
from jslora.bench.plot import draw_adapters


def record(ttft: float, gap: float = 0.1, error: str | None = None) -> Record:
    return Record(
        index=0, model="a", due=None, sent=1.0,
        arrivals=(1 + ttft, 1 + ttft + gap, 1 + ttft + 2 * gap), end=9.0, asked_tokens=3,
        input_tokens=4, cached_tokens=0, output_tokens=3, counted=True, finish_reason="length",
        error=error, detail=error and "full",
    )  # fmt: skip


def piece(
    experiment: str, block: int, condition: str, duration: float, *records: Record, **more: object
) -> Slice:
    run = Run(started=1.7e9, duration=duration, cpu_seconds=0.1, records=records)
    values: dict[str, object] = {
        "experiment": experiment, "block": block, "condition": condition, "adapters": 1, "room": 1,
        "run": run, "probes": (), "failures": (), "loads": 0, "evictions": 0, "preemptions": 0,
    }  # fmt: skip
    return Slice(**(values | more))  # type: ignore[arg-type]


def ask(metric: str, wanted: float | None = None, condition: str = "all") -> Question:
    return Question(
        experiment="room", metric=metric, condition=condition, against="fits", wanted=wanted
    )


# Throughput: 1 against 2, 1 against 1, 0.5 against 2 (a failed request brings nothing).
SLICES = [
    piece("room", 0, "fits", 3.0, record(0.1), record(0.1)),
    piece("room", 0, "all", 6.0, record(0.1), record(0.3), loads=2),
    piece("room", 1, "all", 6.0, record(0.2), record(0.2), loads=1),
    piece("room", 1, "fits", 6.0, record(0.1), record(0.1)),
    piece("room", 2, "fits", 3.0, record(0.1), record(0.1)),
    piece("room", 2, "all", 6.0, record(1.1), record(9, error="HTTP 503"), loads=2),
    piece("room", 3, "fits", 1.0, record(0.1)),
]


def test_a_ratio_is_the_median_over_the_blocks_that_have_both() -> None:
    found = comparison.answer(ask("output tok/s", 0.4), SLICES)
    assert found is not None
    assert found.ratios == pytest.approx((0.5, 1.0, 0.25))
    assert found.ratio == pytest.approx(0.5) and found.holds is True


def test_ttft_p99_is_of_all_blocks_together() -> None:
    found = comparison.answer(ask("TTFT p99", 2.0), SLICES)
    assert found is not None
    assert found.ratios == pytest.approx((2.98, 2.0, 11.0))
    # Five of 0.1, 0.3, 0.2, 0.2, 1.1: 96 % of the way from 0.3 to 1.1; the failed one has none.
    assert found.ratio == pytest.approx((0.3 + 0.96 * 0.8) / 0.1) and found.holds is False


@pytest.mark.parametrize(
    ("metric", "wanted", "holds"),
    [("output tok/s", 0.51, False), ("output tok/s", None, None),
     ("TTFT p50", 2.01, True), ("TTFT p50", 1.99, False), ("ITL p90", 1.01, True)],
)  # fmt: skip
def test_throughput_should_be_high_and_latency_low(
    metric: str, wanted: float | None, holds: bool | None
) -> None:
    found = comparison.answer(ask(metric, wanted), SLICES)
    assert found is not None and found.holds is holds


def test_what_was_not_measured_has_no_answer() -> None:
    assert comparison.answer(ask("TTFT p50", condition="twice"), SLICES) is None
    assert comparison.answer(ask("TTFT p50"), SLICES[:1] + SLICES[2:3]) is None
    assert {a.question.condition for a in comparison.answers(SLICES)} == {"all"}


def test_a_slice_without_success_has_no_ratio() -> None:
    none = [SLICES[0], piece("room", 0, "all", 1.0, record(1, error="timeout"))]
    latency = comparison.answer(ask("TTFT p50", 1.5), none)
    assert latency is not None and isnan(latency.ratio) and latency.holds is False
    back = comparison.answer(dataclasses.replace(ask("output tok/s", 0.95), condition="fits",
                                                 against="all"), none)  # fmt: skip
    assert back is not None and isnan(back.ratio) and back.holds is False


def test_the_step_is_between_the_last_that_fits_and_the_first_that_does_not() -> None:
    sweep = [
        piece("sweep", 0, str(n), 6.0 / n, record(0.1), adapters=n, room=100)
        for n in (110, 90, 1, 200, 100)
    ]
    found = comparison.answers(sweep)
    assert {(a.question.condition, a.question.against) for a in found} == {("110", "100")}
    assert found[0].question.metric == "output tok/s" and found[0].ratio == pytest.approx(1.1)
    assert not comparison.answers(sweep[1:3])


def test_a_row_is_one_condition_over_its_blocks() -> None:
    probes = (record(0.5), record(0.7), record(9, error="HTTP 503"))
    slices = [*SLICES, piece("loads", 0, "called", 4.0, record(0.1), loads=8, probes=probes,
                             failures=("/v1/unload_lora_adapter: HTTP 503",))]  # fmt: skip
    fits, every, called = comparison.rows(slices)
    assert (fits.condition, fits.blocks, every.blocks) == ("fits", 4, 3)
    assert every.metrics["output tok/s"] == pytest.approx((1.0, 0.5, 1.0))
    assert every.metrics["TTFT p50"] == pytest.approx((200.0, 200.0, 1100.0))
    assert (every.loads, every.load_rate, every.failed) == (5 / 6, 5 / 18, 1)
    assert (called.load_rate, called.failed) == (2.0, 2) and called.probe == pytest.approx(600)


def test_the_text_tells_numbers_verdicts_and_failures() -> None:
    lines = {" ".join(line.split()) for line in comparison.render(SLICES).splitlines()}
    assert "room: output tok/s all / fits 0.500 [0.250 … 1.000] wanted ≥ 0.95: FAILS" in lines
    assert "room all 1 3 1.0 200.0 1068.0 100.0 100.0 100.0 0.83 0.28 - 0 1" in lines
    assert "Failed in room 3, all: 1, the first: a: HTTP 503: full" in lines
    assert comparison.render([]) == "Nothing was measured."


def test_the_json_holds_every_slice() -> None:
    document = json.loads(comparison.as_json(SLICES, {"seed": 0}))
    assert set(document) == {"schema", "conditions", "client", "answers", "rows", "slices"}
    assert [each["block"] for each in document["slices"]] == [0, 0, 1, 1, 2, 2, 3]
    assert document["slices"][1]["ttft_seconds"] == [0.1, 0.3]
    assert document["slices"][1]["summary"]["output_throughput"] == 1.0
    assert document["answers"][0]["question"]["metric"] == "output tok/s"
    assert document["answers"][0]["ratios"] == [0.5, 1.0, 0.25]


@pytest.mark.parametrize("experiment", ["room", "loads", "sweep"])
def test_each_experiment_can_be_drawn(experiment: str) -> None:
    slices = [dataclasses.replace(each, experiment=experiment) for each in SLICES]  # type: ignore[arg-type]
    assert draw_adapters(slices).startswith(b"\x89PNG\r\n")
    assert draw_adapters([*SLICES, *slices]).startswith(b"\x89PNG\r\n")
