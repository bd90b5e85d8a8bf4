"""Weights of 8 bits: products near the exact ones, row by row; leaves, bytes, and what is kept."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_helpers import LLAMA3, PROMPT, greedy, small_engine
from hypothesis import given, settings
from hypothesis import strategies as some
from test_weights import CONFIGS, LLAMA, on_one, save

from jslora import build
from jslora.config import parse
from jslora.engine import Engine
from jslora.errors import ConfigError
from jslora.memory.budget import plan_memory
from jslora.model.config import ModelConfig
from jslora.model.quantize import (
    BLOCK,
    FORMATS,
    SCALE,
    is_linear,
    product,
    quantized,
    to_rows,
    turn,
)
from jslora.model.transformer import Block, Layout
from jslora.model.weights import abstract_weights, dummy_weights, load_weights
from jslora.programs import Catalog, Sizes
from jslora.split import Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import work_shape
from pallas_kernels.lora.finish import Finish
from pallas_kernels.paged_attention.cut import Cut

WAYS = tuple(FORMATS)
CPU = Kernels("reference", "reference", "cpu")
ERROR = {"int8": 0.03, "fp8": 0.1}
"""Of a product of normal numbers, relative; rounding both sides is 0.011 and 0.037 on average."""


def leaf(weight: np.ndarray, way: str) -> tuple[jax.Array, jax.Array]:
    """A weight as `dummy_weights` and `load_weights` keep it."""
    made = dict(quantized([("layers.0.o", jnp.asarray(weight))], way, on_one))
    return made["layers.0.o"], made["layers.0.o" + SCALE]


def off(found: jax.Array, exact: np.ndarray) -> float:
    """Relative error of a product as a whole."""
    return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))


# Products -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(some.integers(0, 2**32 - 1), some.sampled_from([64, 96, 192, 576]), some.sampled_from(WAYS))
def test_products_are_near_the_exact_ones(seed: int, inputs: int, way: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(9, inputs)) * rng.lognormal(size=(9, 1))
    weight = rng.normal(size=(40, inputs)) * rng.lognormal(size=(40, 1))
    found = product(jnp.asarray(x, jnp.float32), *leaf(weight.astype(np.float32), way), way)
    assert off(found, x @ weight.T) < ERROR[way]


def test_a_loud_channel_does_not_drown_the_others() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(8, 256)), rng.normal(size=(32, 256)).astype(np.float32)
    x[:, 17] = 300  # what rounds to steps of 300/127 loses the rest
    weight[:, 17] = 0
    exact = x @ weight.T
    plain, scale = to_rows(jnp.asarray(x, jnp.float32), "int8")
    assert off(plain * scale[:, None] @ weight.T, exact) > 0.5
    assert off(product(jnp.asarray(x, jnp.float32), *leaf(weight, "int8"), "int8"), exact) < 0.25


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [1, 8, BLOCK])
def test_turning_twice_multiplies(block: int, dtype: Any) -> None:
    x = np.random.default_rng(1).integers(-3, 4, (5, 3 * BLOCK))
    once = turn(jnp.asarray(x, dtype), block)
    np.testing.assert_array_equal(turn(once, block), block * x)
    np.testing.assert_array_equal(jnp.sum(once * once, 1), block * (x * x).sum(1))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_nobody_elses_business(way: str) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(16, 128)), jnp.bfloat16)
    rows, scale = leaf(rng.normal(size=(24, 128)).astype(np.float32), way)
    run = jax.jit(lambda x: product(x, rows, scale, way))
    right = np.asarray(run(x))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        found = np.asarray(run(x.at[3, 70].set(bad)))
        assert not np.isfinite(found[3]).any(), "a number that is not finite was hidden"
        np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(right, 3, 0))
    assert not np.asarray(run(jnp.zeros_like(x))).any()


def lora_inputs(config: ModelConfig, way: str) -> list[jax.Array]:
    """What a block of random weights gives adapters to read, group by group."""
    T, N, D = 8, config.heads, config.head_dim
    layout = Layout(0, True, work_shape(8, 1, CPU, prefill=True), Cut(1, 0, 1), CPU, quantize=way)
    block = Block(config, jnp.dtype("float32"), layout)
    for name, weight in dummy_weights(config, jnp.float32, on_one, quantize=way).items():
        if name.startswith("layers.0."):
            getattr(block, name.removeprefix("layers.0."))[...] = weight

    @jax.jit
    def run(x: jax.Array) -> list[jax.Array]:
        inputs = []

        def lora(y: jax.Array, x: jax.Array, finish: Finish = Finish.SUM, **_: Any) -> jax.Array:
            inputs.append(x)
            return y[:, : config.feed_forward] if finish is Finish.GATED else y

        turns = jnp.ones((T, 1, D)), jnp.zeros((T, 1, D))
        block.forward(x, *turns, lora, lambda q, k, v: 0.1 + jnp.zeros((T, N, D)))
        return inputs

    return run(jnp.asarray(np.random.default_rng(3).normal(size=(T, config.hidden)), jnp.float32))


def test_adapters_see_activations_as_they_are() -> None:
    exact, found = (lora_inputs(LLAMA, way) for way in ("none", "int8"))
    np.testing.assert_array_equal(exact[0], found[0], "what the norm made of x, not rounded")
    np.testing.assert_array_equal(exact[1], found[1], "what attention gave")
    assert 0 < off(found[3], np.asarray(exact[3])) < 0.05


# Leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_linear_layers_alone_are_quantised(arch: str, way: str, tmp_path: Path) -> None:
    config, dtype = CONFIGS[arch], jnp.bfloat16
    save(tmp_path, arch)
    full = load_weights(tmp_path, config, dtype, on_one)
    found = load_weights(tmp_path, config, dtype, on_one, quantize=way)
    abstract = abstract_weights(config, dtype, way)
    assert list(found) == list(abstract) and set(full) <= set(found)
    for name, weight in found.items():
        assert (weight.shape, weight.dtype) == (abstract[name].shape, abstract[name].dtype), name
        if name.endswith(SCALE):
            continue
        if not is_linear(name):
            np.testing.assert_array_equal(weight, full[name])
            continue
        block = np.gcd(weight.shape[1], BLOCK) if FORMATS[way].turned else 1
        back = turn(weight.astype(jnp.float32), int(block)) * found[name + SCALE][:, None]
        assert off(back, np.asarray(full[name], np.float32)) < 0.03, name


def test_a_device_has_the_bytes_that_the_plan_says() -> None:
    model = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=512, hidden=256, layers=3, heads=8, kv_heads=4,
        head_dim=32, feed_forward=640, max_positions=256,
    )  # fmt: skip
    for devices in (1, 4):
        for way in ("none", *WAYS):
            config = parse({"model": {"source": "m", "quantize": way}, "mesh": {"model": devices}})
            sizes = Sizes(
                pages=8, page_size=16, max_running=8, max_step_tokens=8, max_model_len=64,
                max_rank=8, dtype=jnp.dtype("bfloat16"), quantize=way,
            )  # fmt: skip
            weights = Catalog(model, sizes, CPU, Split(devices)).weights()
            bytes_ = {id(x): x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)}
            assert plan_memory(config, model, 2**30).weights == sum(bytes_.values())


# Engines ------------------------------------------------------------------------------------------


def ask(engine: Engine) -> tuple[tuple[int, ...], np.ndarray]:
    (answer,) = engine.generate([PROMPT], greedy(8, prompt_logprobs=0, logprobs=0))
    told = [*(answer.prompt_logprobs or ())[1:], *answer.logprobs]
    return answer.tokens, np.array([token.logprob for token in told if token])


def test_an_engine_converts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, way = tmp_path / "model", {"quantize": "int8"}
    shutil.copytree(LLAMA3 / "model", model)  # whose conversion nothing has kept yet
    with small_engine(tmp_path, model) as engine:
        _, exact = ask(engine)
    with small_engine(tmp_path, model, model=way) as engine:
        tokens, first = ask(engine)
    scored = np.abs(first - exact)[: len(PROMPT) - 1]
    assert 0 < scored.mean() < 0.15, "logprobs of a random model, whose numbers are large"

    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model's files are read again")

    monkeypatch.setattr(build, "load_weights", read)
    with small_engine(tmp_path, model, model=way) as engine:
        again, second = ask(engine)
    assert again == tokens
    np.testing.assert_array_equal(first, second)


def test_float8_is_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize: fp8 needs a GPU; .* int8"):
        small_engine(tmp_path, LLAMA3 / "model", model={"quantize": "fp8"})
