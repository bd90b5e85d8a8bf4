"""Recording what a compiler says, with this CPU in the GPU's place and the reference operations."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jslora.aot import build, cases, hlo, launches
from jslora.aot.build import Workshop, compile_case, make_catalog, weight_dims
from jslora.aot.cases import Case
from jslora.aot.ptxas import Assembled
from jslora.aot.record import Record
from jslora.model.config import from_hf
from jslora.sharding import AXIS
from jslora.split import Split

TINY = dict(
    architectures=["Qwen2ForCausalLM"], vocab_size=96, hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
CASE = Case(
    what="step", model="tiny", phase="decode", kernels="reference", layers=3, rows=8, tokens=32,
    positions=64, max_rank=8, page_size=8,
)  # fmt: skip
POOL_BYTES = 2**20
WORDS = "Compiling entry function 'attend' for\n 0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n Used 40 registers"  # noqa: E501


@pytest.fixture(autouse=True)
def cpu_in_place_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.MODELS, "tiny", TINY)  # type: ignore[arg-type]
    monkeypatch.setitem(cases.POOL_BYTES, "tiny", POOL_BYTES)
    monkeypatch.setattr(build, "device_mesh", lambda n: Mesh(np.array(jax.devices()[:n]), (AXIS,)))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("shop")
    for name in ("words", "ptx"):
        (folder / name).mkdir()
    return Workshop(folder / "words", folder / "ptx", folder)


def records(case: Case, shop: Workshop) -> Iterator[Record]:
    for record, _ in compile_case(case, shop):
        yield record


def test_a_step_is_recorded(shop: Workshop) -> None:
    (shop.words / "1.txt").write_text(WORDS)
    (found,) = records(CASE, shop)
    assert (found.name, found.what, found.rows) == ("tiny decode reference lora", "step", 8)
    assert 0.9 * POOL_BYTES < found.donated < 1.1 * POOL_BYTES
    assert found.aliased >= found.donated and found.pool_copies == []
    assert found.loops, "the reference loops over its work lists"
    assert found.assembled == {"attend": [40, 4]}, "whatever spills is told"
    config = from_hf(TINY)
    matrices = sum(int(np.prod(dims)) for dims in [(32, 64), (32, 32), (32, 96), (48, 32)])
    vectors = 2 * 32 + 64
    pages_written = 8 * 2 * config.kv_heads * config.head_dim
    assert found.floor_per_layer == 2 * (matrices + vectors + pages_written)
    (without,) = records(replace(CASE, lora=False), shop)
    assert len(without.loops) < len(found.loops)
    assert sum(without.per_layer.values()) < sum(found.per_layer.values())


def test_kernels_are_recorded_alone(shop: Workshop) -> None:
    found = list(records(replace(CASE, what="kernels", phase="mixed"), shop))
    assert [record.name.removeprefix("tiny mixed reference kernels ") for record in found] == [
        "lora q,k,v", "lora o", "lora gate,up", "lora down", "attention",
    ]  # fmt: skip
    assert all(record.what == "kernel" and record.temporaries > 0 for record in found)


def test_all_programs_but_steps_are_recorded(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = 2**24  # more in each layer than one upload
    monkeypatch.setitem(cases.POOL_BYTES, "tiny", pool)
    case = replace(CASE, what="programs", phase="")
    start = "tiny reference programs "
    found = {record.name.removeprefix(start): record for record in records(case, shop)}
    assert found.keys() == {
        "write", "admit", "score", "sample greedy", "sample draw", "sample filter",
    }  # fmt: skip
    assert {record.what for record in found.values()} == {"program"}
    assert all(record.outside > 0 for record in found.values())
    assert not any(record.collectives_outside for record in found.values())
    write, slots = found["write"], make_catalog(case, case.layers).slots()
    assert 0.9 * pool < write.donated == write.aliased < 1.1 * pool
    assert write.pool_copies == []
    for name in ("admit", "sample greedy", "sample draw", "sample filter"):
        assert found[name].donated == sum(leaf.size * leaf.dtype.itemsize for leaf in slots)
    assert found["score"].donated == 0


def figures(function: Callable[[Any], Any], donated: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of a program that is given the pool."""
    catalog, mesh = make_catalog(CASE, 3), build.device_mesh(1)
    arguments = build._everywhere((catalog.pool(),), mesh)
    program = build.Program("program", function, donated, arguments, {})
    compiled = build._compile(program, mesh, catalog.pool().size)
    kernel = replace(compiled.launches[0], kind="kernel", label="attend")
    compiled = replace(compiled, launches=[*compiled.launches, kernel])
    return build._figures(compiled, catalog, [Assembled("other", 32, 0)])


def test_one_layer_of_the_pool_in_new_memory_is_a_copy() -> None:
    pages = make_catalog(CASE, 3).geometry.pages
    assert figures(lambda pool: pool[pages : 2 * pages] + 1)["pool_copies"] != []
    assert figures(lambda pool: pool[pages : 2 * pages - 1] + 1)["pool_copies"] == []
    assert figures(lambda pool: pool * 2)["pool_copies"] != []


def test_kernels_whose_registers_were_not_read_are_known() -> None:
    found = figures(lambda pool: pool[:1] + 1)
    assert (found["launched"], found["assembled"]) == (["attend"], {})


def test_a_layer_is_the_difference_of_two_programs() -> None:
    def compiled(*names: str) -> build.Compiled:
        shape = hlo.Shape("f32", (4,))
        instruction = hlo.Instruction("x", "fusion", (shape,), (), "", False)
        made = [
            launches.Launch(*name.split(), instruction, bytes=0, rewrites=False)  # type: ignore[misc]
            for name in names
        ]
        return build.Compiled(None, made, donated=0, seconds=0.0)

    embed, gemm, add, late = "fusion gather", "product gemm", "fusion add", "collective all-reduce"
    small = compiled(embed, *[gemm] * 8, *[add] * 2)
    large = compiled(embed, *[gemm] * 16, *[add] * 5, late)
    layer, outside = build._difference(small, large, lambda launch: True, apart=2)
    sent = f"{late} 16"
    assert layer == {gemm: 4.0, add: 1.5, sent: 0.5}
    assert outside == {embed: 1.0, add: -1.0, sent: -1.0}
    layer, outside = build._difference(small, large, lambda i: i.kind == "fusion", apart=2)
    assert layer == {add: 1.5} and outside == {embed: 1.0, add: -1.0}
    assert build._collectives(large, large, 1) == ({}, {"all-reduce 16": 1.0})


def test_kernels_are_known_by_name_and_others_only_when_they_spill() -> None:
    assembled = [
        Assembled("lora_expand", 64, 0), Assembled("lora_expand_2", 96, 0),
        Assembled("lora_expand_wide", 255, 0), Assembled("loop_add_fusion", 32, 0),
        Assembled("gemm_fusion", 255, 16),
    ]  # fmt: skip
    found = build._ours(assembled, {"lora_expand", "lora_shrink"})
    assert found == {"lora_expand": [96, 0], "gemm_fusion": [255, 16]}


def test_weights_are_known_by_their_dimensions_in_any_order() -> None:
    fused, parts = {(32, 64), (32, 96)}, {(16, 32), (32, 48)}
    assert weight_dims(from_hf(TINY)) >= fused | parts | {(32, 32), (32, 96)}
    assert all(list(dims) == sorted(dims) for dims in weight_dims(from_hf(TINY)))


@pytest.mark.parametrize("devices", [1, 2])
def test_every_device_has_a_pool_of_production_size(devices: int) -> None:
    catalog = make_catalog(replace(CASE, devices=devices), 3)
    pool: Any = catalog.pool()
    assert pool.shape[3] == 2 // devices
    assert 0.9 * POOL_BYTES < pool.size * 2 < 1.1 * POOL_BYTES
    assert catalog.split == Split(devices)
