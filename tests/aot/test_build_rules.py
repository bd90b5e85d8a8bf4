"""Every rule of the GPU build fires on a record that breaks it, and on no other."""

from dataclasses import replace
from typing import Any

import pytest

from jslora.aot import rules
from jslora.aot.record import Record

GOOD = Record(
    name="llama decode", what="step", phase="decode", rows=64, kernels="pallas",
    per_layer={"product gemm": 4.0, "kernel lora_expand": 3.5}, outside=9.0,
    tokens=2048, temporaries=rules.TEMPORARIES, aliased=1000, donated=1000,
    launched=["lora_expand"], assembled={"lora_expand": [64, 0]}, most_registers=128,
)  # fmt: skip
ALLOWED = {"llama decode": 8}


def test_a_record_that_holds_to_all_rules() -> None:
    assert rules.broken(GOOD, ALLOWED) == []
    split = replace(GOOD, collectives={"all-reduce": 2})
    assert rules.broken(split, ALLOWED, devices=4) == []


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
    (found,) = rules.broken(replace(GOOD, **change), ALLOWED)
    assert found.startswith(text)


@pytest.mark.parametrize(
    "collectives",
    [{}, {"all-reduce": 3}, {"all-reduce": 2, "all-gather": 1}, {"all-reduce": 2, "outside": 1}],
)
def test_over_devices_a_layer_has_two_sums_and_nothing_else(collectives: dict[str, float]) -> None:
    (found,) = rules.broken(replace(GOOD, collectives=collectives), ALLOWED, devices=4)
    assert found.startswith("collectives: ")


def test_launches_are_counted_in_halves() -> None:
    many = replace(GOOD, per_layer={"fusion x": 8 + 1 / 30})
    assert rules.broken(many, ALLOWED) == []
    assert rules.broken(replace(many, per_layer={"fusion x": 8.5}), ALLOWED) != []


def test_prefill_and_larger_batches_may_take_more_memory() -> None:
    for change in (
        dict(phase="mixed", temporaries=2**30), dict(rows=128, temporaries=2**30),
        dict(phase="mixed", tokens=2049, temporaries=2**31),
    ):  # fmt: skip
        assert rules.broken(replace(GOOD, **change), ALLOWED) == []


def test_a_kernel_alone_has_no_layers_and_no_pool_to_return() -> None:
    kernel = replace(GOOD, what="kernel", name="lora q,k,v", aliased=0)
    assert rules.broken(kernel, {}) == []
    assert rules.broken(replace(kernel, launched=[], assembled={"x": [9, 4]}), {}) != []


def test_a_program_has_no_layers_but_returns_what_it_was_given() -> None:
    program = replace(
        GOOD, what="program", phase="", name="write", per_layer={}, launched=[], assembled={}
    )
    assert rules.broken(program, {}) == []
    for change, text in (
        (dict(aliased=999), "not aliased: of 1000 bytes donated 999 are"),
        (dict(pool_copies=["copy.3 bf16[9,2]"]), "pool copied: "),
        (dict(loops=["while.2"]), "loops outside kernels: while.2"),
        (dict(temporaries=rules.TEMPORARIES + 1), "temporaries: "),
    ):
        (found,) = rules.broken(replace(program, **change), {})
        assert found.startswith(text)
