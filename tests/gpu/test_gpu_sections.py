"""What sections record, at tiny shapes on a CPU: the plumbing, no figure."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.bench import floor
from jslora.gpu import decode, executable, kernels, sections
from jslora.gpu.cases import FULL, TINY, TINY_MODEL, Mix, decode_bucket
from jslora.gpu.session import Session
from jslora.gpu.timing import measure
from jslora.programs import Catalog, Sizes
from pallas_kernels import launch
from pallas_kernels.launch import Kernels

ROOT = Path(__file__).parents[2]
REFERENCE = Kernels("reference", "reference", "cpu")


def recorded(section: str, **options: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    plan = replace(TINY, **options)
    sections.run(Session(section, records.append, 120), plan, None, None)
    assert not [record for record in records if record["kind"] == "failed"], records
    json.dumps(records)
    return records


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def test_the_device_and_its_ceilings() -> None:
    (device,) = of(recorded("device"), "device")
    assert device["platform"] == "cpu" and device["packages"]["jax"] == jax.__version__
    assert device["lora"] == device["attention"] == "reference"
    copy, product = of(recorded("ceilings"), "ceiling")
    assert copy["bytes_per_second"] == pytest.approx(2 * TINY.copy_bytes / copy["seconds"])
    assert product["flops_per_second"] == pytest.approx(2 * 64**3 / product["seconds"])


def test_a_step_with_adapters_and_without() -> None:
    mixes = (Mix(2, (4,)), Mix(4, (2, 8)))
    records = recorded("step:reference", step_mixes=mixes)
    steps = of(records, "step")
    assert [step["name"] for step in steps] == ["off", "2 x 4", "4 x 2-8", "idle"]
    assert len({step["off"] for step in steps[:3]}) == 1 and steps[0]["off"] == steps[0]["seconds"]
    assert of(records, "finite")[0]["rows"] == TINY.step_rows
    rows = mixes[1].rows(TINY.step_rows, TINY.step_context)
    least = floor.step_floor(TINY_MODEL, rows, itemsize=4)
    assert steps[2]["bytes"] == least.total.bytes and steps[2]["base"]["bytes"] < steps[2]["bytes"]
    assert [gap["readable"] for gap in of(records, "gaps")] == [False, False]


def test_a_step_is_recorded_turn_by_turn_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, records = [0.0], list[dict[str, Any]]()

    def slow(calls: dict[str, Any], *sizes: Any) -> Any:
        assert len(of(records, "step")) == [0, 3, 4][int(now[0]) // 4], "recorded at once"
        now[0] += 4
        return measure(calls, *sizes)

    monkeypatch.setattr(decode, "measure", slow)
    session = Session("s", records.append, 10, clock=lambda: now[0])
    decode.run(session, TINY, REFERENCE)
    assert [r["name"] for r in of(records, "step")] == ["off", "2 x 4", "2 x 2-8", "idle"]
    assert of(records, "skipped")[0]["points"] == ["2 x 2", "2 x 8"]


def test_what_is_most_important_is_timed_first() -> None:
    first, *others = decode.turns(FULL)
    assert first == ("off", "8 x 16", "32 x 16")
    assert others[0] == ("idle",) and len(others) == len(FULL.step_mixes) - 1


def test_points_are_counted_beforehand() -> None:
    """Also where there is no time for any."""

    def planned(section: str) -> list[tuple[str, int]]:
        records: list[dict[str, Any]] = []
        sections.run(Session(section, records.append, -1), TINY, None, None)
        return [(r["what"], r["points"]) for r in of(records, "planned")]

    assert planned("lora:reference") == [("lora", 4)]
    assert planned("baselines:reference") == [("baseline", 2)]
    assert planned("correctness:reference") == [("correctness", 28)]


def test_without_lora_no_lora_is_in_the_step() -> None:
    catalog = Catalog(TINY_MODEL, TINY.sizes(64, 8), replace(REFERENCE, platform="cuda"))

    def loops(catalog: Catalog) -> int:
        (job,) = catalog.step_jobs(decode_bucket(catalog, 8)).values()
        return decode.lower_job(job).as_text().count("stablehlo.while")

    # One loop over chunks of the context, and behind the inner jit five of LoRA, once for all
    # layers: q, k and v of two widths, o, gate and up, down.
    assert (loops(decode.without_lora(catalog)), loops(catalog)) == (1, 6)


def test_kernels_over_batches() -> None:
    records = recorded("lora:reference")
    found = {(record["batch"], record["mix"]) for record in of(records, "lora")}
    assert found == {(8, "2 x 4"), (8, "1 x 4"), (8, "2 x 2-8"), (1, "1 x 4")}
    (one,) = [r for r in of(records, "lora") if r["batch"] == 1]
    row = [floor.Row(1, adapter=floor.uniform("a", 4))]
    assert one["bytes"] == floor.lora_layer(TINY_MODEL, row, itemsize=4).bytes
    records = recorded("attention:reference", batches=(2,))
    assert [record["context"] for record in of(records, "attention")] == list(TINY.contexts)


def test_a_chain_walks_all_its_layers() -> None:
    """As much is added as by so many single layers."""
    plan = replace(TINY, chain=3)
    catalog = kernels.one_layer(plan, 64, 8, REFERENCE)
    bucket = decode_bucket(catalog, 8)
    placed = kernels.place_mix(catalog.config, Mix(2, (4,)), plan.page_numbers, 0.5)
    work = kernels.pack_work(kernels.share_out(placed, 8), bucket, catalog)
    pages = kernels.random_pool(200, catalog)
    xs, ys = kernels.inputs(plan, bucket), kernels.outputs(plan, bucket)
    firsts = jnp.array([0, 50, 120], jnp.int32)
    found = kernels.chained_lora(catalog, bucket, ys, xs, pages, firsts, work)
    wanted = ys
    for first in (0, 50, 120):
        one = jnp.array([first], jnp.int32)
        wanted = kernels.chained_lora(catalog, bucket, wanted, xs, pages, one, work)
    for before, after, right in zip(ys, found, wanted, strict=True):
        assert float(jnp.abs(after - before).max()) > 0.1
        np.testing.assert_allclose(after, right, atol=1e-4)


def test_an_implementation_that_cannot_be_had_is_said() -> None:
    (record,) = recorded("lora:triton")
    assert record["kind"] == "unavailable" and "NVIDIA GPUs only" in record["reason"]


def test_what_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(sections.OF_KERNELS, "lora", fail)
    records: list[dict[str, Any]] = []
    sections.run(Session("lora:reference", records.append, 9), TINY, None, None)
    assert records[0]["kind"] == "failed" and "illegal memory access" in records[0]["error"]


def test_a_sections_process_prints_records_only() -> None:
    command = [sys.executable, "-m", "jslora.gpu.sections", "executable", "--seconds", "30"]
    done = subprocess.run(
        [*command, "--tiny", "--executable", "nowhere"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    (record,) = map(json.loads, done.stdout.splitlines())
    assert record == {
        "section": "executable", "kind": "executable", "found": False, "path": "nowhere"
    }  # fmt: skip


# Executables -------------------------------------------------------------------------------------


@pytest.fixture
def saved_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny step compiled for this CPU, in a file as the build check writes it."""
    monkeypatch.setattr(executable, "LLAMA3_8B", TINY_MODEL)
    monkeypatch.setattr(executable, "CONTEXT", 20)
    monkeypatch.setattr(executable, "MIX", Mix(2, (4,)))
    monkeypatch.setattr(launch, "platform", lambda: "cuda")
    return tmp_path / "step.xla"


def write(path: Path, case: dict[str, Any], scale: float = 1.0) -> None:
    from jslora.aot import saved

    sizes = Sizes(
        pages=64, page_size=8, max_running=8, max_step_tokens=8, max_model_len=64, max_rank=8,
        max_composed=case["max_composed"], dtype=jnp.dtype("float32"),
    )  # fmt: skip
    catalog = Catalog(
        replace(TINY_MODEL, layers=case["layers"]), sizes, Kernels("reference", "reference", "cuda")
    )
    (job,) = catalog.step_jobs(decode_bucket(catalog, 8)).values()
    step, donated, arguments = job.function, job.donated, job.arguments

    def scaled(weights: Any, *rest: Any) -> Any:
        return step(weights._replace(norm=scale * weights.norm), *rest)

    lowered = jax.jit(scaled, donate_argnums=donated, keep_unused=True).lower(*arguments)
    saved.save(path, lowered.compile(), case)


CASE = {
    "what": "step", "model": "llama3-8b", "phase": "decode", "kernels": "reference", "lora": True,
    "devices": 1, "layers": 2, "rows": 8, "tokens": 8, "positions": 64, "max_rank": 8,
    "max_composed": 2, "page_size": 8,
}  # fmt: skip


def run_executable(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    sections.run(Session("executable", records.append, 60), TINY, None, path)
    return records


def test_an_executable_that_computes_the_same(saved_step: Path) -> None:
    write(saved_step, CASE)
    *_, last = run_executable(saved_step)
    assert last["ran"] and last["ok"] and last["error"] < 1e-5, last


def test_an_executable_that_computes_something_else(saved_step: Path) -> None:
    write(saved_step, CASE, scale=1.1)
    *_, last = run_executable(saved_step)
    assert last["ran"] and not last["ok"]


def test_an_executable_of_another_kind(saved_step: Path) -> None:
    write(saved_step, CASE | {"devices": 4})
    *_, last = run_executable(saved_step)
    assert last["kind"] == "failed" and "only Llama-3-8B's decode step is judged" in last["error"]


def test_no_executable(tmp_path: Path) -> None:
    (record,) = run_executable(tmp_path / "step.xla")
    assert record["found"] is False
