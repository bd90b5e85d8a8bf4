"""Weights bind strictly, land fused, and each device reads only its own part."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_gguf import random_weights

from jslora.errors import ModelError
from jslora.model.config import ModelConfig
from jslora.model.weights import dummy_weights, load_weights, shapes

V = 48
LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=V,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    feed_forward=96,
    max_positions=256,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(LLAMA, architecture="Qwen3ForCausalLM", qk_norm=True),
}


def on_one(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def save(folder: Path, arch: str = "llama") -> dict[str, np.ndarray]:
    tensors = random_weights(arch, V, tied=CONFIGS[arch].tie_embeddings)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("arch", CONFIGS)
def test_shapes_count_every_parameter(arch: str) -> None:
    config = CONFIGS[arch]
    assert sum(math.prod(shape) for shape in shapes(config).values()) == config.parameters


def test_shapes_follow_the_letters() -> None:
    found = shapes(CONFIGS["qwen3"])
    assert found["embed"] == found["head"] == (V, 64)
    layer = {k.removeprefix("layers.1."): s for k, s in found.items() if k.startswith("layers.1.")}
    assert layer == {
        "attn_norm": (64,),
        "qkv": ((4 + 2 * 2) * 32, 64),
        "q_norm": (32,),
        "k_norm": (32,),
        "o": (64, 4 * 32),
        "mlp_norm": (64,),
        "gate_up": (2 * 96, 64),
        "down": (64, 96),
    }
    assert "head" not in shapes(CONFIGS["qwen2"])
    assert shapes(CONFIGS["qwen2"])["layers.0.qkv_bias"] == (256,)


@pytest.mark.parametrize("arch", CONFIGS)
def test_leaves_are_the_files_fused(arch: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[arch], save(tmp_path, arch)
    seen = []
    weights = load_weights(
        tmp_path, config, jnp.float32, on_one, progress=lambda *args: seen.append(args)
    )
    assert {name: w.shape for name, w in weights.items()} == shapes(config)
    assert seen[-1][1] == seen[-1][2] == 4 * config.parameters

    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = [tensors[f"{attention}.{x}_proj.weight"] for x in "qkv"]
    expected = {
        "embed": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "layers.1.attn_norm": tensors["model.layers.1.input_layernorm.weight"],
        "layers.1.mlp_norm": tensors["model.layers.1.post_attention_layernorm.weight"],
        "layers.1.qkv": np.concatenate(qkv),
        "layers.1.o": tensors[f"{attention}.o_proj.weight"],
        "layers.1.gate_up": np.concatenate(
            [tensors[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")]
        ),
        "layers.1.down": tensors[f"{mlp}.down_proj.weight"],
    }
    if config.qkv_bias:
        biases = [tensors[f"{attention}.{x}_proj.bias"] for x in "qkv"]
        expected["layers.1.qkv_bias"] = np.concatenate(biases)
    if config.qk_norm:
        expected["layers.1.k_norm"] = tensors[f"{attention}.k_norm.weight"]
    if not config.tie_embeddings:
        expected["head"] = tensors["lm_head.weight"]
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)


def test_fused_rows_are_ordered_by_shard(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    fused = load_weights(tmp_path, LLAMA, jnp.float32, on_one, shards=2)["layers.0.qkv"]
    q, k, v = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    halves = [(q[:64], k[:32], v[:32]), (q[64:], k[32:], v[32:])]
    expected = np.concatenate([part for half in halves for part in half])
    np.testing.assert_array_equal(fused, expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_float_file_loads_as_either_dtype(kind: type, dtype: type, tmp_path: Path) -> None:
    tensors = {name: t.astype(kind) for name, t in save(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, LLAMA, dtype, on_one)
    assert {w.dtype for w in weights.values()} == {jnp.dtype(dtype)}
    expected = tensors["model.layers.0.mlp.down_proj.weight"].astype(dtype)
    np.testing.assert_array_equal(weights["layers.0.down"], expected)


def split(folder: Path, edit: dict[str, str] | None = None) -> None:
    """Rewrite a single file as two with an index, some of its entries replaced."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"part{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in tensors if places[n] == file}, folder / file)
    index = {"weight_map": places | (edit or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_indexed_files_equal_a_single_one(tmp_path: Path) -> None:
    save(tmp_path)
    single = load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)
    split(tmp_path)
    indexed = load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)
    for name in shapes(LLAMA):
        np.testing.assert_array_equal(single[name], indexed[name])


@pytest.mark.parametrize(
    "place, message",
    [
        ("../secret.safetensors", "not a file name"),
        ("absent.safetensors", "cannot read absent"),
        ("part0.safetensors", "lacks the tensor"),
    ],
)
def test_wrong_indices_are_refused(place: str, message: str, tmp_path: Path) -> None:
    save(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    split(tmp_path, {name: place})
    found = [file for file in tmp_path.glob("part*") if name in load_file(file)]
    if place.startswith("part"):
        other = {"part0.safetensors", "part1.safetensors"} - {found[0].name}
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = other.pop()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack.*layers\.1\.mlp\.up_proj\.weight.*\[96, 64\]"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    tensors = save(tmp_path) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(128, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj\.bias has no place in LlamaForCausalLM"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    tensors = save(tmp_path) | {"model.norm.weight": np.ones(63, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[63\]; expected \[64\]"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_integers_are_refused(tmp_path: Path) -> None:
    tensors = save(tmp_path) | {"model.norm.weight": np.ones(64, np.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has type I8"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_harmless_tensors_are_left_out(tmp_path: Path) -> None:
    tensors = save(tmp_path, "qwen2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, CONFIGS["qwen2"], jnp.bfloat16, on_one)
    assert weights.keys() == shapes(CONFIGS["qwen2"]).keys()


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected model\.safetensors"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)
    save(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one)


def test_heads_that_do_not_split_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ModelError, match="2 kv heads cannot be split over 4 devices"):
        load_weights(tmp_path, LLAMA, jnp.bfloat16, on_one, shards=4)


def test_dummy_weights_have_the_shapes_and_a_seed() -> None:
    config = CONFIGS["qwen3"]
    first, again, other = (dummy_weights(config, jnp.bfloat16, on_one, seed) for seed in (0, 0, 1))
    assert {name: w.shape for name, w in first.items()} == shapes(config)
    assert {w.dtype for w in first.values()} == {jnp.dtype(jnp.bfloat16)}
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, again[name])
        norm = name.endswith("norm")
        assert bool((weight == 1).all()) == norm, name
        assert bool((weight == other[name]).all()) == norm, name
    assert not bool((first["layers.0.qkv"] == first["layers.1.qkv"]).all())
    spread = float(jnp.std(first["layers.0.down"].astype(jnp.float32)))
    assert spread == pytest.approx(96**-0.5, rel=0.05)


def test_each_of_four_devices_reads_only_its_part(tmp_path: Path) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    script = Path(__file__).parent / "four_devices.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every part read once by its own device\n"
