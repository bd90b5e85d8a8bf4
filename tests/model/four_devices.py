"""Run with four virtual devices: load sharded weights, recording what is read from the files."""

import collections
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from test_weights import CONFIGS, V, on_one
from tiny_gguf import random_weights

from jslora.model import weights as module
from jslora.model.quantize import quantized
from jslora.model.weights import dummy_weights, load_weights
from jslora.sharding import weight_spec

DEVICES = 4
ROWS = ("qkv", "qkv_bias", "gate_up", "embed", "head")
COLUMNS = ("o", "down")
FUSED = {
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


class Recorder:
    """Stands in for `safe_open`, noting the size of every read."""

    def __init__(self) -> None:
        self.reads: dict[str, list[int]] = collections.defaultdict(list)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        file, recorder = safe_open(*args, **kwargs), self

        class File:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *args: Any) -> None: ...

            def keys(self) -> list[str]:
                return file.keys()

            def get_slice(self, name: str) -> Any:
                return Slice(name, file.get_slice(name))

        class Slice:
            def __init__(self, name: str, inner: Any) -> None:
                self.name, self.inner = name, inner
                self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

            def __getitem__(self, index: Any) -> np.ndarray:
                part = self.inner[index]
                recorder.reads[self.name].append(part.size)
                return part

        return File()


def main() -> None:
    folder = Path(sys.argv[1])
    config = replace(CONFIGS["qwen2"], kv_heads=4, tie_embeddings=False)
    tensors = random_weights("qwen2", V, tied=False)
    for name in [n for n in tensors if "k_proj" in n or "v_proj" in n]:
        tensors[name] = np.concatenate([tensors[name], 2 * tensors[name]])  # from 2 heads to 4
    save_file(tensors, folder / "model.safetensors")
    mesh = Mesh(np.array(jax.devices()), ("model",))
    assert mesh.size == DEVICES

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        leaf = name.split(".")[-1]
        if leaf in COLUMNS:
            return NamedSharding(mesh, PartitionSpec(None, "model"))
        return NamedSharding(mesh, PartitionSpec("model") if leaf in ROWS else PartitionSpec())

    plain = load_weights(folder, config, jnp.float32, on_one, shards=DEVICES)
    recorder = Recorder()
    module.safe_open = recorder.open
    sharded = load_weights(folder, config, jnp.float32, sharding, shards=DEVICES)
    for name, weight in sharded.items():
        np.testing.assert_array_equal(weight, plain[name], err_msg=name)

    for name, sizes in recorder.reads.items():
        size = tensors[name].size
        if "norm" in name:
            assert sizes == [size], (name, sizes)
        else:
            assert sizes == [size // DEVICES] * DEVICES, (name, sizes)
    assert recorder.reads.keys() == tensors.keys()

    for leaf, sources in FUSED.items():
        for shard in sharded[f"layers.1.{leaf}"].addressable_shards:
            parts = [np.split(tensors[f"model.layers.1.{s}"], DEVICES) for s in sources]
            own = np.concatenate([part[shard.device.id] for part in parts])
            np.testing.assert_array_equal(shard.data, own, err_msg=leaf)

    one, four = (dummy_weights(config, jnp.float32, where) for where in (on_one, sharding))
    for name, weight in one.items():
        np.testing.assert_allclose(four[name], weight, rtol=1e-6, err_msg=name)
    check_quantised(mesh)
    print("every part read once by its own device")


def check_quantised(mesh: Mesh) -> None:
    """A device's part is what a single one would make of it, bit for bit."""
    weight = np.random.default_rng(0).normal(size=(128, 24 * DEVICES)).astype(np.float32)

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(name))

    for name in ("layers.0.qkv", "layers.0.down"):
        given = jax.device_put(weight, place(name, weight.shape))
        made = dict(quantized([(name, given)], "int8", place))
        assert {part: x.sharding for part, x in made.items()} == {n: place(n, ()) for n in made}
        shards = [x.addressable_shards for x in (given, *made.values())]
        for whole, *parts in zip(*shards, strict=True):
            alone = quantized([(name, jnp.asarray(np.asarray(whole.data)))], "int8", on_one)
            for part, (_, right) in zip(parts, alone, strict=True):
                np.testing.assert_array_equal(part.data, right, err_msg=name)


if __name__ == "__main__":
    main()
