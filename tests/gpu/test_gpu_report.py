"""The tables and the plot of made-up records; only a measured figure appears."""

import json
from pathlib import Path
from typing import Any

import pytest

from jslora.gpu.report import Findings, mix_ratio, render, table
from scripts import gpu_check

HEAD = {"schema": 1, "started": "2026-01-01T00:00:00Z", "tiny": False, "minutes": 8.0}
TIMES = {"host_bound": False, "samples": 7, "calls": 20}


def times(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, **TIMES}


def record(section: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"section": section, "kind": kind, **fields}


def step(name: str, seconds: float, adapters: int = 0, ranks: tuple[int, ...] = (0,)) -> dict:
    return record(
        "step:triton", "step", name=name, lora="triton", attention="triton", batch=64,
        context=1024, adapters=adapters, ranks=list(ranks), bytes=24 * 10**9, flops=10**12,
        base={"bytes": 20 * 10**9, "flops": 10**12}, off=0.008, **times(seconds),
    )  # fmt: skip


def checked(ok: bool, error: float | None = 1e-3, *faults: str) -> dict[str, Any]:
    return record(
        "correctness:triton", "correctness", operation="lora", implementation="triton",
        case="every row its own adapter", dtype="bfloat16", error=error, limit=1e-2,
        faults=list(faults), ok=ok,
    )  # fmt: skip


DEVICE = record(
    "device", "device", platform="cuda", kind_of_device="NVIDIA H100 80GB HBM3", memory=8 * 10**10,
    nvidia_smi={"driver_version": "580.1"}, packages={"jax": "0.11.2", "triton": None},
    jslora="0.1.0", python="3.12.3", cpus=16, lora="triton", attention="triton",
    target_config=None,
)  # fmt: skip
CEILINGS = [
    record("device", "ceiling", what="copy", bytes_per_second=3.0e12, **times(1e-3)),
    record("device", "ceiling", what="product", flops_per_second=7.0e14, **times(1e-3)),
]
STEPS = [
    step("off", 0.008), step("idle", 0.0081), step("8 x 16", 0.0086, 8, (16,)),
    step("32 x 16", 0.0105, 32, (16,)), step("2 x 8", 0.009, 2, (8,)),
    step("2 x 64", 0.013, 2, (64,)), step("2 x 8-64", 0.0125, 2, (8, 64)),
]  # fmt: skip
LORA = [
    record("lora:triton", "lora", implementation="triton", batch=64, mix=mix, adapters=8,
           ranks=[16], bytes=moved, flops=10**9, **times(seconds))
    for mix, moved, seconds in (("8 x 16", 24 * 10**6, 10e-6), ("1 x 16", 5 * 10**6, 8e-6))
]  # fmt: skip
ATTENTION = [
    record("attention:triton", "attention", implementation="triton", batch=64, context=1024,
           bytes=268 * 10**6, flops=10**9, **times(1e-4))
]  # fmt: skip
BASELINES = [
    record("baselines:triton", "baseline", name=name, implementation="triton", batch=64,
           mix="8 x 16", adapters=8, ranks=[16], bytes=24 * 10**6, flops=10**9, **times(seconds))
    for name, seconds in (("jslora", 12e-6), ("one-hot", 30e-6), ("gather", 60e-6),
                          ("merged", 150e-6))
]  # fmt: skip
GAPS = [
    record("step:triton", "gaps", name="off", readable=True, kernels=500.0, span=0.0079,
           busy=0.0075, idle=0.0004),
    record("uncaptured:triton", "gaps", name="off", readable=False),
]  # fmt: skip
EXECUTABLE = [
    record("executable", "executable", found=True, loaded=True, device="NVIDIA H100", jax="0.11.2"),
    record("executable", "executable", found=True, loaded=True, ran=True, error=1e-3, limit=2e-2,
           ok=True),
]  # fmt: skip
EVERYTHING = [
    DEVICE, *CEILINGS, checked(True), *STEPS, *LORA, *ATTENTION, *BASELINES, *GAPS, *EXECUTABLE
]  # fmt: skip


PLANNED = [
    record("correctness:triton", "planned", what="correctness", points=2),
    record("lora:triton", "planned", what="lora", points=40),
    record("baselines:triton", "planned", what="baseline", points=12),
]  # fmt: skip


def document(*records: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(HEAD | {"sections": sections, "records": records}))


def line(text: str, start: str) -> str:
    (found,) = (one for one in text.splitlines() if one.startswith(start))
    return " ".join(found.split())


def test_the_device_and_its_ceilings() -> None:
    text = render(document(*EVERYTHING))
    assert "NVIDIA H100 80GB HBM3 (cuda), driver 580.1" in text
    assert "jax 0.11.2" in text and "triton None" not in text
    assert "copy 3,000 GB/s, read plus written (90% of the data sheet)" in text
    assert "bf16 product 700 TFLOP/s (71% of the data sheet)" in text


def test_a_step_against_its_floor_and_the_step_without_lora() -> None:
    text = render(document(*EVERYTHING))
    # 24 GB at 3 TB/s are 8 ms; 20 GB are 6.667; 0.0086 / 0.008
    assert line(text, "8 x 16") == "8 x 16 8.6 (7.74..10.32) 8 93% 1.075 1.200"
    assert "holds: 8 adapters of rank 16: 1.075 of off (at most 1.10)" in text
    assert "MISSED: 32 adapters of rank 16: 1.312 of off (at most 1.25)" in text


def test_a_mix_against_its_true_ranks() -> None:
    """It adds 4.5 ms; rank 8 alone adds 1, rank 64 adds 5: 3 on average."""
    text = render(document(*EVERYTHING))
    assert "MISSED: 2 x 8-64: adds 1.50 of what its true ranks add alone (at most 1.15)" in text
    records = {one["name"]: one for one in STEPS}
    assert mix_ratio(records["8 x 16"], records) is None, "no mix"
    del records["2 x 64"]
    assert mix_ratio(records["2 x 8-64"], records) is None, "not all of its ranks were timed"


def test_kernels_and_baselines() -> None:
    text = render(document(*EVERYTHING))
    # 24 MB in 10 us: 2400 GB/s, of 3000
    assert line(text, "triton, batch 64, 8 x 16").endswith("24.0 2,400 80% 80%")
    assert line(text, "triton, batch 64, context 1024").endswith("268.0 2,680 89% 89%")
    # 30 over 12; 150 + 12 over 150
    assert line(text, "batch 64, 8 x 16") == "batch 64, 8 x 16 12 30 60 150 2.500 1.080"
    assert line(text, "step:triton, off") == "step:triton, off 8 500 7.9 7.5 0.4"
    assert line(text, "uncaptured:triton, off") == "uncaptured:triton, off - - - - -"
    assert "by jax 0.11.2 for NVIDIA H100: runs and computes the same" in text


def test_goals_of_kernels_and_baselines() -> None:
    text = render(document(*EVERYTHING, *PLANNED))
    assert (
        "holds: lora:triton: 0.80 of the copy at batch 64, 8 x 16, the least of the 1 that move "
        "20 MB; 2 of 40 points (at least 0.70)"
    ) in text
    assert (
        "holds: best other over ours 2.500 at batch 64, 8 x 16, the least; 1 of 12 points "
        "(at least 1.00)"
    ) in text
    slow, late = ([r | {"batch": 8, "seconds": 20e-6 if r["name"] == "jslora" else 19e-6}
                   for r in BASELINES], [LORA[0] | {"batch": 8, "seconds": 12e-6}])  # fmt: skip
    text = render(document(*EVERYTHING, *PLANNED, *slow, *late))
    assert "MISSED: best other over ours 0.950 at batch 8, 8 x 16, the least; 2 of 12" in text
    assert "MISSED: lora:triton: 0.67 of the copy at batch 8, 8 x 16, the least of the 2" in text


def test_a_point_that_was_cut_off_is_left_out() -> None:
    text = render(document(*EVERYTHING, *PLANNED, BASELINES[0] | {"batch": 8}))
    assert "batch 8" not in text and "1 of 12 points" in text


def test_work_that_products_bound_has_no_goal_of_bandwidth() -> None:
    heavy = [LORA[0] | {"flops": 10**12, "seconds": 1.0}]
    assert "of the copy at" not in render(document(DEVICE, *CEILINGS, *heavy))


def test_nothing_measured_says_nothing() -> None:
    text = render(document())
    assert text == "Device: unknown; its section failed"
    assert "-" in line(render(document(*STEPS)), "off"), "no floor without ceilings"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (checked(False, 0.3), "WRONG: lora, triton, bfloat16, every row its own adapter"),
        (checked(False, None), "error no number"),
        (checked(False, 1e-3, "3 rows without an adapter changed"), "3 rows without an adapter"),
        (record("step:triton", "finite", rows=3, of=64), "logits of 3 of 64 rows finite"),
        (record("lora:triton", "failed", what="lora, batch 8", error="XlaError: bad\nmore"),
         "FAILED: lora:triton: lora, batch 8: XlaError: bad"),
        (EXECUTABLE[1] | {"ok": False, "error": 1.0}, "computes SOMETHING ELSE"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_and_fails(wrong: dict[str, Any], says: str) -> None:
    assert Findings(document(*EVERYTHING)).sound
    found = document(*EVERYTHING, wrong)
    assert not Findings(found).sound
    assert says in render(found)


def test_what_was_left_out_is_told() -> None:
    found = document(
        *EVERYTHING, record("lora:triton", "skipped", points=["128", "256"]),
        record("correctness:triton", "unavailable", implementation="triton", reason="no triton"),
        device={"seconds": 9.0, "code": 0, "killed": False},
        baselines={"skipped": True}, executable={"seconds": 70.1, "code": -9, "killed": True},
    )  # fmt: skip
    text = render(found)
    assert "lora:triton: no time for 128; 256" in text
    assert "baselines: skipped, too little time left" in text
    assert "executable: out of time, killed after 70.1 s" in text
    assert "not available: correctness:triton: no triton" in text
    assert Findings(found).sound, "being late is not being wrong"


@pytest.mark.parametrize("code", [1, -6, -9, -11])
def test_a_section_that_crashed_fails(code: int) -> None:
    ended = {"seconds": 9.0, "code": code, "killed": False}
    found = document(*EVERYTHING, **{"lora:triton": ended})
    assert not Findings(found).sound
    assert f"lora:triton: ended with code {code}; see the log" in render(found)


@pytest.mark.parametrize(
    ("records", "how"),
    [
        ([], {"skipped": True}),
        ([], {"seconds": 9.0, "code": -9, "killed": True}),
        (PLANNED[:1], {"seconds": 9.0, "code": 0, "killed": False}),
    ],
)
def test_chosen_kernels_that_were_not_checked_to_the_end_fail(
    records: list[dict], how: dict[str, Any]
) -> None:
    name = "correctness:triton"
    found = document(*EVERYTHING, *records, **{name: how})
    assert not Findings(found).sound
    assert f"NOT CHECKED: {name}" in render(found)
    assert not records or f"{name}: 1 of 2 cases checked" in render(found)
    done = document(*EVERYTHING, checked(True), *PLANNED, **{name: how})
    assert Findings(done).sound and "2 of 2 cases checked" in render(done)
    other = document(*EVERYTHING, **{"correctness:pallas": how})
    assert Findings(other).sound, "only the chosen kernels must be checked"


def test_tiny_shapes_claim_nothing() -> None:
    found = document(*EVERYTHING) | {"tiny": True}
    assert render(found).startswith("Tiny shapes")


def test_columns() -> None:
    assert table(("a", "bb"), [("x", "1"), ("longer", "100")]) == [
        "a        bb", "x         1", "longer  100"
    ]  # fmt: skip


@pytest.mark.parametrize("records", [EVERYTHING, STEPS, [*CEILINGS, *LORA]])
def test_a_file_of_a_run_is_drawn_later(records: list[dict], tmp_path: Path) -> None:
    file = tmp_path / "gpu_check.json"
    file.write_text(json.dumps(document(*records)))
    assert gpu_check.main(["--plot", str(file)]) == 0
    assert (tmp_path / "gpu_check.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_times_is_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu_check.json"
    file.write_text(json.dumps(document(checked(True))))
    assert gpu_check.main(["--plot", str(file)]) == 2
    assert "nothing was timed" in capsys.readouterr().out
