"""The floor model against figures worked out by hand; the sums stand beside the assertions."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.bench.floor import (
    H100,
    Adapter,
    Cost,
    Device,
    Row,
    adapter_numbers,
    attention_layer,
    lora_layer,
    step_floor,
    uniform,
)
from jslora.model.config import ModelConfig

LLAMA3_8B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden=4096, layers=32, heads=32,
    kv_heads=8, head_dim=128, feed_forward=14336, max_positions=8192, rope_theta=500000.0,
)  # fmt: skip
# q 8->8, k and v 8->4, o 8->8, gate and up 8->16, down 16->8; one layer has 640 linear weights.
TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=10, hidden=8, layers=2, heads=2, kv_heads=1,
    head_dim=4, feed_forward=16, max_positions=64,
)  # fmt: skip
SIXTEEN = [uniform(f"a{i}", 16) for i in range(64)]


def decode(rows: int, context: int, adapters: int, rank: int = 16) -> list[Row]:
    mix = [uniform(f"a{i}", rank) for i in range(adapters)]
    return [Row(context, adapter=mix[i % adapters] if adapters else None) for i in range(rows)]


def test_the_numbers_of_an_adapter_of_llama3_8b() -> None:
    # q 4096+4096, k and v 4096+1024 each, o 4096+4096, gate, up and down 4096+14336 each:
    # 8192 + 2 * 5120 + 8192 + 3 * 18432 = 81,920 a rank
    assert adapter_numbers(LLAMA3_8B, uniform("a", 1)) == 81_920
    assert adapter_numbers(LLAMA3_8B, uniform("a", 16)) == 1_310_720
    assert adapter_numbers(LLAMA3_8B, Adapter("q and v", (16, 0, 16, 0, 0, 0, 0))) == 16 * 13_312


def test_a_decode_step_of_llama3_8b() -> None:
    floor = step_floor(LLAMA3_8B, decode(64, 1024, 0), itemsize=2)
    # A layer: qkv 4096 * 6144 + o 4096 * 4096 + gate, up, down 3 * 4096 * 14336 = 218,103,808,
    # and two norms of 4096; 32 layers and the last norm: 6,979,588,096 numbers.
    assert floor.weights.bytes == 2 * 6_979_588_096
    # 2 FLOPs for each of 32 * 218,103,808 = 6,979,321,856 weights and 64 tokens
    assert floor.weights.flops == 2 * 64 * 6_979_321_856
    # 2 * 8 * 128 numbers a layer = 65,536 numbers = 131,072 bytes a token
    assert floor.kv_read.bytes == 64 * 1023 * 131_072
    assert floor.kv_write.bytes == 64 * 131_072
    # 64 rows, 32 layers, 32 heads of 128: a product with a key and one with a value per position
    assert floor.kv_read.flops == 64 * 1024 * 32 * 4 * 4096
    # 128,256 * 4096 = 525,336,576 numbers, read once, multiplied for 64 rows
    assert floor.head == Cost(2 * 525_336_576, 2 * 64 * 525_336_576)
    assert floor.embedding == Cost(2 * 64 * 4096)
    assert floor.lora == Cost()
    assert floor.ratio(H100) == 1
    # 13,959,176,192 + 8,581,545,984 + 8,388,608 + 1,050,673,152 + 524,288 = 23,600,308,224 bytes
    assert floor.total.bytes == 23_600_308_224
    assert floor.total.seconds(H100) == pytest.approx(7.0449e-3, rel=1e-4)


@pytest.mark.parametrize(
    ("adapters", "gigabytes", "ratio"),
    # rank 16: 1,310,720 numbers a layer, 32 layers, 2 bytes: 83,886,080 bytes an adapter.
    # 0.671 / 23.600 = 2.84 %; 2.684 / 23.600 = 11.37 %; 5.369 / 23.600 = 22.75 %
    [(1, 0.083886080, 1.0036), (8, 0.671088640, 1.0284), (32, 2.684354560, 1.1137),
     (64, 5.368709120, 1.2275)],
)  # fmt: skip
def test_what_adapters_add(adapters: int, gigabytes: float, ratio: float) -> None:
    floor = step_floor(LLAMA3_8B, decode(64, 1024, adapters), itemsize=2)
    assert floor.lora.bytes == round(gigabytes * 1e9)
    assert floor.lora.flops == 2 * 64 * 32 * 1_310_720, "follows tokens, not adapters"
    assert floor.ratio(H100) == pytest.approx(ratio, abs=5e-5)


def test_without_a_cache_the_ratios_are_those_of_the_weights() -> None:
    """4 % for 8 adapters of rank 16 and 17 % for 32, as counted against 16.06 GB of weights."""
    eight = step_floor(LLAMA3_8B, decode(64, 1, 8), itemsize=2)
    many = step_floor(LLAMA3_8B, decode(64, 1, 32), itemsize=2)
    assert eight.ratio(H100) == pytest.approx(1.0447, abs=1e-4)  # 0.671 / 15.019
    assert many.ratio(H100) == pytest.approx(1.1787, abs=1e-4)  # 2.684 / 15.019


def test_a_prompt_is_bound_by_arithmetic() -> None:
    floor = step_floor(LLAMA3_8B, [Row(4096, tokens=4096)], itemsize=2)
    # 4096 * 4097 / 2 positions are seen, by 32 heads of 128 in 32 layers
    assert floor.kv_read == Cost(0, 8_390_656 * 4 * 4096 * 32)
    assert floor.weights.flops == 2 * 4096 * 6_979_321_856  # 57.2 TFLOP, 57.8 ms
    assert floor.total.seconds(H100) == floor.total.flops / 989e12
    assert floor.total.seconds(H100) == pytest.approx(62.3e-3, rel=1e-2)


def test_a_tiny_mixed_step_in_full() -> None:
    """Weights: q 64, k 32, v 32, o 64, gate 128, up 128, down 128: 576 a layer and 16 of norms."""
    one, other = Adapter("one", (2, 0, 0, 0, 0, 0, 0)), Adapter("other", (0,) * 6 + (3,))
    rows = [Row(5, adapter=one), Row(9, tokens=4, adapter=other), Row(3), Row(2, adapter=one)]
    floor = step_floor(TINY, rows, itemsize=4)
    assert floor.weights == Cost(4 * (2 * 592 + 8), 2 * 7 * 2 * 576)
    assert floor.embedding == Cost(4 * 7 * 8)
    # before this step: 4 + 5 + 2 + 1 positions, of 2 layers * (4 keys + 4 values)
    # seen: 5; 6 + 7 + 8 + 9; 3; 2: 40 positions, 2 layers, 2 heads of 4, 4 FLOPs
    assert floor.kv_read == Cost(4 * 12 * 16, 40 * 2 * 8 * 4)
    assert floor.kv_write == Cost(4 * 7 * 16)
    assert floor.head == Cost(4 * 80, 2 * 4 * 80)
    # one: 2 * (8 + 8) = 32 numbers, for 2 tokens; other: 3 * (16 + 8) = 72, for 4; in 2 layers
    assert floor.lora == Cost(2 * 4 * (32 + 72), 2 * 2 * (2 * 32 + 4 * 72))
    assert floor.total == floor.base + floor.lora


def test_tied_embeddings_and_biases_are_counted_once() -> None:
    tied = replace(TINY, tie_embeddings=True, qkv_bias=True, qk_norm=True)
    floor = step_floor(tied, [Row(1)], itemsize=2)
    # 2 * (576 + 16 norms + 16 of q, k and v + 8 of two head norms) + 8
    assert floor.weights.bytes == 2 * (2 * 616 + 8)
    assert floor.head.bytes == 2 * 80


def test_the_kernels_of_one_layer() -> None:
    q, both = Adapter("q", (2, 0, 0, 0, 0, 0, 0)), Adapter("gate, up", (0, 0, 0, 0, 1, 1, 0))
    rows = [Row(5, adapter=q), Row(3, adapter=q), Row(4, adapter=both), Row(4)]
    # factors: q 2 * 16 = 32, gate and up 24 each; activations of a token: q reads 8 and reads and
    # writes 8 in float32; gate and up read 8 in common and read and write 32 in float32
    lora = lora_layer(TINY, rows, itemsize=2)
    assert lora.bytes == 2 * (32 + 48) + 2 * (16 + 64) + (16 + 256)
    assert lora.flops == 2 * (2 * 32 + 48)
    # keys and values of 16 positions (8 numbers each), 4 queries and results of 8
    assert attention_layer(TINY, rows, itemsize=2) == Cost(2 * (16 * 8 + 2 * 4 * 8), 4 * 8 * 16)


def test_a_device_is_bound_by_the_slower_of_memory_and_arithmetic() -> None:
    device = Device("toy", bandwidth=100, flops=1000)
    assert Cost(200, 1000).seconds(device) == 2
    assert Cost(200, 3000).seconds(device) == 3


def test_rows_that_cannot_be() -> None:
    with pytest.raises(AssertionError, match="3 tokens in a context of 2"):
        Row(2, tokens=3)
    with pytest.raises(AssertionError, match="1 ranks of a"):
        Adapter("a", (8,))


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=8))
def test_adding_a_row_never_makes_a_step_cheaper(drawn: list[tuple[int, int]]) -> None:
    rows = [Row(context, adapter=SIXTEEN[a] if a else None) for context, a in drawn]
    less, more = (step_floor(TINY, some, itemsize=2) for some in (rows[:-1], rows))
    for part in ("weights", "embedding", "kv_read", "kv_write", "head", "lora"):
        before, after = getattr(less, part), getattr(more, part)
        assert before.bytes <= after.bytes and before.flops <= after.flops
    shared = {row.adapter for row in rows[:-1]}
    if rows[-1].adapter in shared:
        assert less.lora.bytes == more.lora.bytes, "an adapter's weights are read once"
