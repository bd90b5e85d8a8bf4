"""Every rule of the GPU build fires on a record that breaks it, and on no other."""

from dataclasses import replace
from typing import Any

import pytest

from jslora.aot import adapter_bytes, rules
from jslora.aot.cases import Case
from jslora.aot.record import Record

GOOD = Record(
    name="llama decode", what="step", phase="decode", rows=64, kernels="pallas",
    per_layer={"product gemm": 4.0, "kernel lora_expand": 3.5}, outside=9.0,
    tokens=2048, temporaries=rules.TEMPORARIES, aliased=1000, donated=1000,
    launched=["lora_expand"], assembled={"lora_expand": [64, 0]}, most_registers=128,
)  # fmt: skip
ALLOWED = {"llama decode": 8}
CASE = Case(
    what="step", model="llama3-8b", phase="decode", kernels="pallas", rows=64, tokens=2048,
    positions=64, max_rank=6, page_size=16,
)  # fmt: skip
SPLIT, FULLY = replace(CASE, devices=4), replace(CASE, devices=4, fully=True)
SUM, SMALL, QKV, GATE_UP = (
    f"{name} {64 * width * 4}"
    for name, width in (
        ("all-reduce", 4096), ("all-reduce", 8), ("all-gather", 3 * 8), ("all-gather", 2 * 8),
    )
)  # fmt: skip
OUTSIDE = {f"all-reduce {64 * 4096 * 2}": 1.0}


def test_a_record_that_holds_to_all_rules() -> None:
    assert rules.broken(GOOD, ALLOWED, CASE) == []
    split = replace(GOOD, collectives={SUM: 2}, collectives_outside=OUTSIDE)
    assert rules.broken(split, ALLOWED, SPLIT) == []
    fully = replace(split, collectives={SUM: 2, SMALL: 2, QKV: 1, GATE_UP: 1})
    assert rules.broken(fully, ALLOWED, FULLY) == []


def test_a_step_of_many_tokens_sends_so_many_times_more() -> None:
    decode, _ = rules.collectives(FULLY)
    mixed, _ = rules.collectives(replace(FULLY, phase="mixed"))
    sizes = [sorted(int(name.split()[1]) for name in found) for found in (decode, mixed)]
    assert [32 * size for size in sizes[0]] == sizes[1]


def test_ranks_of_composed_adapters_are_each_rounded_up_to_the_devices() -> None:
    """Of 6 ranks in 3 adapters on 4 devices, 2 + 2 + 2 take 4 + 4 + 4."""
    inside, _ = rules.collectives(replace(FULLY, max_composed=3))
    assert inside == {
        SUM: 2.0, f"all-gather {3 * 64 * 12 * 4}": 1.0, f"all-gather {2 * 64 * 12 * 4}": 1.0,
        f"all-reduce {64 * 12 * 4}": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(error="exit code 1: no"), "does not compile: exit code 1: no"),
        (dict(pool_copies=["copy.3 bf16[9,2]"]), "pool copied: copy.3 bf16[9,2]"),
        (dict(weight_copies=["transpose.1 bf16[4,8]"]), "weights copied: transpose.1"),
        (dict(temporaries=rules.TEMPORARIES + 1), "temporaries: 268435457 bytes; allowed are 268"),
        (dict(phase="mixed", temporaries=2**30 + 1), "temporaries: 1073741825 bytes; allowed are"),
        (dict(assembled={"lora_expand": [9, 0], "b": [255, 8]}), "spills: b spills 8 bytes at 255"),
        (dict(assembled={}), "registers not read: lora_expand"),
        (dict(launched=["lora_expand", "attend"]), "registers not read: attend"),
        (dict(loops=["while.2"]), "loops outside kernels: while.2"),
        (dict(aliased=999), "not aliased: of 1000 bytes donated 999 are"),
        (dict(per_layer={"fusion x": 8.5}), "launches: 8.5 a layer; launches.yaml allows 8"),
        (dict(name="new"), "launches: 7.5 a layer; launches.yaml has no 'new'"),
        (dict(collectives={"all-gather": 1}), "collectives: {'all-gather': 1} a layer; expected {"),
    ],
)  # fmt: skip
def test_a_rule_fires_alone(change: dict[str, Any], text: str) -> None:
    (found,) = rules.broken(replace(GOOD, **change), ALLOWED, CASE)
    assert found.startswith(text)


@pytest.mark.parametrize(
    ("case", "inside", "outside"),
    [
        (SPLIT, {}, OUTSIDE), (SPLIT, {SUM: 3}, OUTSIDE), (SPLIT, {SUM: 2, QKV: 1}, OUTSIDE),
        (SPLIT, {SUM: 2}, {}), (SPLIT, {SUM: 2}, OUTSIDE | {QKV: 1}),
        (FULLY, {SUM: 2}, OUTSIDE), (FULLY, {SUM: 2, SMALL: 2, QKV: 1}, OUTSIDE),
        (FULLY, {SUM: 2, SMALL: 2, QKV: 2, GATE_UP: 1}, OUTSIDE),
        (FULLY, {SUM: 2, SMALL: 2, "all-gather 1": 1, GATE_UP: 1}, OUTSIDE),
        (FULLY, {SUM: 4, QKV: 1, GATE_UP: 1}, OUTSIDE),
    ],
)  # fmt: skip
def test_over_devices_a_layer_sends_what_it_must_and_nothing_else(
    case: Case, inside: dict[str, float], outside: dict[str, float]
) -> None:
    record = replace(GOOD, collectives=inside, collectives_outside=outside)
    (found,) = rules.broken(record, ALLOWED, case)
    assert found.startswith("collectives: ")


@pytest.mark.parametrize(
    ("program", "rows"),
    [("sample greedy", 64), ("sample filter", 64), ("score", 32), ("write", 0), ("admit", 0)],
)
def test_over_devices_logits_are_gathered_once_and_nothing_else_is(program: str, rows: int) -> None:
    case = replace(CASE, what="programs", phase="", devices=4)
    record = replace(GOOD, name=f"{case.name} {program}", what="program", phase="", per_layer={})
    gathered = {f"all-gather {rows * 128256 * 4}": 1.0} if rows else {}
    assert rules.broken(replace(record, collectives_outside=gathered), {}, case) == []
    missing = {} if rows else OUTSIDE
    for sent in (gathered | {"all-reduce 4": 1.0}, {"all-gather 128256": 1.0}, missing):
        (line,) = rules.broken(replace(record, collectives_outside=sent), {}, case)
        assert line.startswith(f"collectives: {sent} a program; expected {gathered}")


def test_adapter_bytes_are_what_the_design_says() -> None:
    found = adapter_bytes.measure()
    assert adapter_bytes.broken(found) == []
    shares = {(one.split.devices, one.split.fully): one.share for one in found}
    assert all(shares[n, True] == 1 / n for n in (1, 2, 4, 8))
    assert shares[1, False] == 1 and shares[8, False] < shares[4, False] < shares[2, False] < 1
    for change in (replace(found[0], share=1.01), replace(found[-1], share=0.126)):
        (line,) = adapter_bytes.broken([change])
        assert line.startswith(f"adapter bytes: {change.share:.3f} of one device's on each of")


def test_launches_are_counted_in_halves() -> None:
    many = replace(GOOD, per_layer={"fusion x": 8 + 1 / 30})
    assert rules.broken(many, ALLOWED, CASE) == []
    assert rules.broken(replace(many, per_layer={"fusion x": 8.5}), ALLOWED, CASE) != []


def test_prefill_and_larger_batches_may_take_more_memory() -> None:
    for change in (
        dict(phase="mixed", temporaries=2**30), dict(rows=128, temporaries=2**30),
        dict(phase="mixed", tokens=2049, temporaries=2**31),
    ):  # fmt: skip
        assert rules.broken(replace(GOOD, **change), ALLOWED, CASE) == []


def test_a_kernel_alone_has_no_layers_and_no_pool_to_return() -> None:
    kernel = replace(GOOD, what="kernel", name="lora q,k,v", aliased=0)
    assert rules.broken(kernel, {}, CASE) == []
    assert rules.broken(replace(kernel, launched=[], assembled={"x": [9, 4]}), {}, CASE) != []


def test_a_program_has_no_layers_but_returns_what_it_was_given() -> None:
    program = replace(
        GOOD, what="program", phase="", name="write", per_layer={}, launched=[], assembled={}
    )
    assert rules.broken(program, {}, CASE) == []
    for change, text in (
        (dict(aliased=999), "not aliased: of 1000 bytes donated 999 are"),
        (dict(pool_copies=["copy.3 bf16[9,2]"]), "pool copied: "),
        (dict(loops=["while.2"]), "loops outside kernels: while.2"),
        (dict(temporaries=rules.TEMPORARIES + 1), "temporaries: "),
    ):
        (found,) = rules.broken(replace(program, **change), {}, CASE)
        assert found.startswith(text)
