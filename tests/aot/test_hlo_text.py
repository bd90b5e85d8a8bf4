"""Reading optimized HLO: text of our own making, and what XLA prints for programs on this CPU."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jslora.aot import hlo, launches
from jslora.aot.hlo import Shape

POOL = 1024 * 16

# ruff: noqa: E501  as XLA prints it
TEXT = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_scatter (p0: bf16[1024,16], p1: bf16[8,16], p2: s32[8]) -> bf16[1024,16] {
  %p0 = bf16[1024,16]{1,0} parameter(0)
  %p1 = bf16[8,16]{1,0} parameter(1)
  %p2 = s32[8]{0} parameter(2)
  ROOT %scatter.1 = bf16[1024,16]{1,0} scatter(%p0, %p2, %p1), to_apply=%second
}

%fused_gather (p0.1: bf16[1024,16], p1.1: s32[8]) -> bf16[8,16] {
  %p0.1 = bf16[1024,16]{1,0} parameter(0)
  %p1.1 = s32[8]{0} parameter(1)
  %bitcast.9 = bf16[1024,16]{1,0} bitcast(%p0.1)
  ROOT %gather.1 = bf16[8,16]{1,0} gather(%bitcast.9, %p1.1), slice_sizes={1,16}
}

%second (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  ROOT %b = bf16[] parameter(1)
}

%fused_dot (p0.2: bf16[8,16], p1.2: bf16[16,32]) -> f32[8,32] {
  %p0.2 = bf16[8,16]{1,0} parameter(0)
  %p1.2 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,32]{1,0} dot(%p0.2, %p1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sum (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%c, %d)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8]{0} get-tuple-element(%t), index=1
  %negate.4 = f32[8]{0} negate(%v)
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%i, %negate.4)
}

%condition (u: (s32[], f32[8])) -> pred[] {
  %u = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(false)
}

%captured (q0: f32[8,32]) -> f32[8,32] {
  %q0 = f32[8,32]{1,0} parameter(0)
  ROOT %copy.7 = f32[8,32]{1,0} copy(%q0)
}

ENTRY %main (pool: bf16[1024,16], w: bf16[16,32], ids: s32[8], s: s32[]) -> (bf16[1024,16], f32[8]) {
  %pool = bf16[1024,16]{1,0} parameter(0), metadata={op_name="pages"}
  %w = bf16[16,32]{1,0} parameter(1)
  %ids = s32[8]{0} parameter(2)
  %s = s32[] parameter(3)
  %constant_1 = f32[8]{0} constant({1, 2, 3, (4), 5, 6, 7, 8})
  %loop_gather_fusion.1 = bf16[8,16]{1,0} fusion(%pool, %ids), kind=kLoop, calls=%fused_gather
  %input_scatter_fusion = bf16[1024,16]{1,0} fusion(%pool, %loop_gather_fusion.1, /*index=2*/%ids), kind=kInput, calls=%fused_scatter
  %gemm_fusion_dot.2.remat = f32[8,32]{1,0} fusion(%loop_gather_fusion.1, %w), kind=kCustom, calls=%fused_dot
  %all-reduce-start.1 = f32[8,32]{1,0} all-reduce-start(%gemm_fusion_dot.2.remat), replica_groups={{0,1}}, to_apply=%sum
  %all-reduce-done.1 = f32[8,32]{1,0} all-reduce-done(%all-reduce-start.1)
  %call.1 = f32[8,32]{1,0} call(%all-reduce-done.1), to_apply=%captured
  %kernel.3 = (f32[8,32]{1,0}, f32[8]{0}) custom-call(%call.1, %input_scatter_fusion), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (0, {})}, backend_config={ir = "ML\\EFR while(", name = "lora_expand", num_warps = 4 : i32}
  %product = f32[8,32]{1,0} custom-call(%loop_gather_fusion.1, %w), custom_call_target="__cublas$gemm"
  %get = f32[8]{0} get-tuple-element(%kernel.3), index=1
  %start = (s32[], f32[8]{0}) tuple(%s, %get)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %end = f32[8]{0} get-tuple-element(%while.1), index=1
  ROOT %tuple.1 = (bf16[1024,16]{1,0}, f32[8]{0}) tuple(%input_scatter_fusion, %end)
}
"""


def found_in(text: str, pool: int = POOL) -> list[launches.Launch]:
    return launches.find(hlo.parse(text), pool)


def test_launches_are_what_a_device_does_in_order() -> None:
    assert [(launch.kind, launch.label) for launch in found_in(TEXT)] == [
        ("fusion", "loop_gather_fusion"),
        ("fusion", "input_scatter_fusion"),
        ("product", "gemm_fusion_dot"),
        ("collective", "all-reduce"),
        ("copy", "copy"),
        ("kernel", "lora_expand"),
        ("product", "__cublas$gemm"),
        ("loop", "while"),
        ("other", "negate"),
    ]


def test_bytes_are_what_shapes_tell() -> None:
    row, weights, out = 8 * 16 * 2, 16 * 32 * 2, 8 * 32 * 4
    assert [launch.bytes for launch in found_in(TEXT)[:7]] == [
        row + 8 * 4 + row,  # gathered rows, not the pool; ids; output
        row + 8 * 4 + row,  # update and ids; the update again, not the pool
        row + weights + out,
        out + out,
        out + out,
        out + out + 8 * 4,  # the pool is not counted for a kernel of ours
        row + weights + out,
    ]


def test_a_collective_puts_out_its_results_alone() -> None:
    before = "all-reduce-start.1 = f32[8,32]{1,0} all-reduce-start("
    (plain,) = [i for i in found_in(TEXT) if i.kind == "collective"]
    assert before in TEXT and launches.put_out(plain) == 8 * 32 * 4
    for shape, size in (
        ("((f32[8,32]{1,0}), f32[8,32]{1,0})", 8 * 32 * 4),
        ("((f32[8,32]{1,0}), f32[4,8,32]{2,1,0})", 4 * 8 * 32 * 4),
    ):
        text = TEXT.replace(before, before.replace("f32[8,32]{1,0}", shape))
        (started,) = [i for i in found_in(text) if i.kind == "collective"]
        assert launches.put_out(started) == size


def test_arrays_updated_in_place_are_no_new_memory() -> None:
    names = [launch.instruction.name for launch, _ in launches.arrays(found_in(TEXT))]
    assert "input_scatter_fusion" not in names and "kernel.3" not in names
    assert {"gemm_fusion_dot.2.remat", "copy.7"} <= {*names}
    made = TEXT.replace("scatter(%p0, %p2", "scatter(%zero, %p2").replace(
        "  %p1 = bf16[8,16]", "  %zero = bf16[1024,16]{1,0} broadcast(%p2)\n  %p1 = bf16[8,16]"
    )
    names = [launch.instruction.name for launch, _ in launches.arrays(found_in(made))]
    assert "input_scatter_fusion" in names


def test_a_kernel_and_the_slices_it_reads_may_be_one_fusion() -> None:
    text = TEXT.replace(
        "  ROOT %gather.1 = bf16[8,16]{1,0} gather(%bitcast.9, %p1.1), slice_sizes={1,16}",
        "  ROOT %attend = bf16[8,16]{1,0} custom-call(%bitcast.9, %p1.1), "
        'custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "attend"}',
    )
    first = found_in(text)[0]
    assert (first.kind, first.label) == ("kernel", "attend")
    assert first.bytes == 8 * 4 + 8 * 16 * 2


def test_the_name_of_a_triton_kernel_is_in_its_packed_code() -> None:
    packed = zlib.compress(b"\x08\x01 // PTX\n.visible .entry shrink(\n.param .u64 x)")
    escaped = "".join(
        chr(byte) if 32 < byte < 127 and byte not in b'"\\' else f"\\{byte:02X}" for byte in packed
    )
    text = TEXT.replace('ir = "ML\\EFR while(", name = "lora_expand"', f'opaque = "{escaped}"')
    text = text.replace("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    assert [launch.label for launch in found_in(text) if launch.kind == "kernel"] == ["shrink"]


def test_shapes() -> None:
    (kernel,) = [i.instruction for i in found_in(TEXT) if i.kind == "kernel"]
    assert kernel.shapes == (Shape("f32", (8, 32)), Shape("f32", (8,)))
    assert [str(shape) for shape in kernel.shapes] == ["f32[8,32]", "f32[8]"]
    sizes = {"pred": 1, "bf16": 2, "s32": 4, "f64": 8, "f8e4m3fn": 1, "c64": 8}
    for dtype, size in sizes.items():
        assert Shape(dtype, (3, 2)).bytes == 6 * size
    assert Shape("u4", (6,)).bytes == 3 and Shape("f32", ()).bytes == 4


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule empty")


# What XLA itself prints ----------------------------------------------------------------------


def compiled(function: Any, *arguments: Any, donate: int = 0) -> str:
    jitted = jax.jit(function, donate_argnums=donate)
    return jitted.lower(*arguments).compile().as_text()


def test_a_loop_of_a_compiled_program_is_found() -> None:
    def loop(x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.fori_loop(0, n, lambda _, y: jnp.sin(y) @ y, x)

    x = jnp.ones((8, 8))
    assert "loop" in {launch.kind for launch in found_in(compiled(loop, x, 3, donate=()))}
    assert "loop" not in {i.kind for i in found_in(compiled(lambda x: jnp.sin(x) @ x, x))}


def test_a_branch_of_a_compiled_program_is_found() -> None:
    def branch(x: jax.Array, up: jax.Array) -> jax.Array:
        return lax.cond(up, lambda y: y @ y, lambda y: jnp.sort(y, axis=0), x)

    launches_of = found_in(compiled(branch, jnp.ones((8, 8)), True))
    assert "conditional" in [launch.label for launch in launches_of]
    assert {"product", "loop"} <= {launch.kind for launch in launches_of}


def test_a_pool_that_is_not_donated_is_copied() -> None:
    def write(pool: jax.Array, row: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(pool, row, (3, 0))

    pool, row = jnp.zeros((1024, 16)), jnp.ones((1, 16))

    def copies(text: str) -> list[Shape]:
        found = launches.arrays(found_in(text))
        return [shape for launch, shape in found if shape.size == POOL]

    assert copies(compiled(write, pool, row, donate=())) != []
    assert copies(compiled(write, pool, row, donate=0)) == []
