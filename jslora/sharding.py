"""Tensor parallelism over the mesh axis "model": who holds which part, and one step over all.

The base is split as in Megatron-LM (arXiv 1909.08053): q, k, v, gate and up by their outputs, o and
down by their inputs, so that a layer needs two sums over the devices. Keys, values and the pool are
split by kv heads. Everything else is replicated. A device runs the same program as a single one
would, on a `local_config`; an adapter lies in each device's part of the pool as that configuration
lays it out: A whole and B's own columns for the modules split by outputs, A's own columns and B
whole for the others, whose deltas join the partial products before these are summed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jslora.errors import ModelError
from jslora.model.config import ModelConfig

AXIS = "model"

POOL = PartitionSpec(None, None, None, AXIS, None)
"""Pages of [S, 2, K, D]: every device has every page, with its own kv heads."""

WHOLE = PartitionSpec()
"""What every device has whole."""

_LEAVES = {
    "qkv": PartitionSpec(None, AXIS),
    "qkv_bias": PartitionSpec(AXIS),
    "o": PartitionSpec(AXIS, None),
    "gate_up": PartitionSpec(None, AXIS),
    "down": PartitionSpec(AXIS, None),
}


def local_config(config: ModelConfig, devices: int) -> ModelConfig:
    """The dimensions of one device's part.

    Raises:
        ModelError: kv heads or the feed-forward width do not divide by `devices`.
    """
    for what, size in (("kv heads", config.kv_heads), ("feed-forward width", config.feed_forward)):
        if size % devices:
            raise ModelError(f"{size} {what} cannot be split over {devices} devices")
    return replace(
        config,
        heads=config.heads // devices,
        kv_heads=config.kv_heads // devices,
        feed_forward=config.feed_forward // devices,
    )


def weight_spec(name: str) -> PartitionSpec:
    """How the leaf of a dotted name (`jslora.model.weights.shapes`) is split.

    Fused columns are ordered shard by shard, as `load_weights` does with `shards`.
    """
    return _LEAVES.get(name.rpartition(".")[2], WHOLE)


def over_devices(
    step: Callable[..., tuple[jax.Array, jax.Array, jax.Array]], weights: Any, mesh: Mesh
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """A step over the mesh axis "model" from one device's step.

    Args:
        step: (weights, pages, last_token, packed, work) → (pages, h, x), as `Programs.step` with a
            bucket; sums over "model" itself.
        weights: the `weight_spec` of each leaf, arranged as the step takes the leaves.
    """
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(weights, POOL, WHOLE, WHOLE, WHOLE),
        out_specs=(POOL, WHOLE, WHOLE),
        check_vma=False,  # the kernels do not say which of their outputs differ between devices
    )


def whole_array(part: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: Mesh) -> Any:
    """The abstract array whose parts on the devices of a mesh are like `part`."""
    split = (*spec, *[None] * (part.ndim - len(spec)))
    sizes = [1 if name is None else mesh.shape[name] for name in split]
    shape = tuple(dim * size for dim, size in zip(part.shape, sizes, strict=True))
    return jax.ShapeDtypeStruct(shape, part.dtype, sharding=NamedSharding(mesh, spec))
