"""Every rule of the GPU build fires on a record that breaks it, and on no other."""

from dataclasses import replace
from typing import Any

import pytest

from jslora.aot import rules
from jslora.aot.record import Record

GOOD = Record(
    name="llama decode", what="step", phase="decode", rows=64, kernels="pallas",
    per_layer={"product gemm": 4.0, "kernel lora_expand": 3.5}, outside=9.0,
    temporaries=rules.DECODE_TEMPORARIES, aliased=1000, pool=1000,
    assembled={"lora_expand": [64, 0]}, most_registers=128,
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
        (dict(temporaries=rules.DECODE_TEMPORARIES + 1), "decode temporaries: 268435457 bytes"),
        (dict(assembled={"a": [64, 0], "b": [255, 8]}), "spills: b spills 8 bytes at 255"),
        (dict(loops=["while.2"]), "loops outside kernels: while.2"),
        (dict(aliased=999), "pool not aliased: 999 of its 1000 bytes"),
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
    for change in (dict(phase="mixed"), dict(rows=128)):
        large = replace(GOOD, temporaries=2**30, **change)
        assert rules.broken(large, ALLOWED) == []


def test_a_kernel_alone_has_no_layers_and_no_pool_to_return() -> None:
    kernel = replace(GOOD, what="kernel", name="lora q,k,v", aliased=0)
    assert rules.broken(kernel, {}) == []
    assert rules.broken(replace(kernel, assembled={"x": [9, 4]}), {}) != []
