"""Tensor parallelism over the mesh axis "model": what lies where, and programs over all devices.

The base is split as `jslora.split` says, so that a layer needs two sums over the devices. Keys,
values and the pool are split by kv heads; the vocabulary by its rows, where the devices divide
them. Everything else every device has whole: activations between layers, what is sampled, and the
state of the slots, which all devices compute alike. A device runs the program that a single one
would, on its own part of the weights and of the pool.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jslora.errors import ConfigError

AXIS = "model"

POOL = PartitionSpec(None, None, None, AXIS, None)
"""Pages of [S, 2, K, D]: every device has every page, with its own kv heads."""

EACH = PartitionSpec(AXIS)
"""Something for each device, stacked."""

WHOLE = PartitionSpec()
"""What every device has whole."""

_LEAVES = {
    "qkv": PartitionSpec(AXIS, None),
    "qkv_bias": PartitionSpec(AXIS),
    "o": PartitionSpec(None, AXIS),
    "gate_up": PartitionSpec(AXIS, None),
    "down": PartitionSpec(None, AXIS),
    **{f"{name}_scale": PartitionSpec(AXIS) for name in ("qkv", "o", "gate_up", "down")},
}


class Job(NamedTuple):
    """A program of one device, and how it becomes one of all.

    Attributes:
        donated: numbers of the arguments that are.
        arguments: abstract, as one device has them.
        given, made: the `PartitionSpec` of every argument and result, or of a tree of them.
    """

    name: str
    function: Callable
    donated: tuple[int, ...]
    arguments: tuple[Any, ...]
    given: tuple[Any, ...]
    made: Any

    def over(self, mesh: Mesh) -> "Job":
        """The same over the devices of a mesh; its arguments say where they lie."""
        function = self.function
        if mesh.size > 1:
            # The kernels do not say which of their outputs differ between devices.
            function = jax.shard_map(
                function, mesh=mesh, in_specs=self.given, out_specs=self.made, check_vma=False
            )
        arguments = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda leaf: whole_array(leaf, spec, mesh), part),
            self.given, self.arguments, is_leaf=lambda node: isinstance(node, PartitionSpec),
        )  # fmt: skip
        return self._replace(function=function, arguments=arguments)


def weight_spec(name: str, *, vocabulary: bool = False) -> PartitionSpec:
    """How the leaf of a dotted name (`jslora.model.weights.abstract_weights`) is split.

    Fused rows are ordered shard by shard, as `load_weights` does with `shards`.

    Args:
        vocabulary: whether embedding and head are split.
    """
    if vocabulary and name in ("embed", "head"):
        return PartitionSpec(AXIS, None)
    return _LEAVES.get(name.rpartition(".")[2], WHOLE)


def prepare_devices(count: int) -> None:
    """Have so many devices if this is a CPU, where they are virtual.

    Too late once jax was asked for devices; `make_mesh` says if they are too few.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def make_mesh(devices: int) -> Mesh:
    """A mesh of `devices`, as many of each process, those of a process side by side.

    Raises:
        ConfigError: there are not so many.
    """
    processes = jax.process_count()
    own, rest = divmod(devices, processes)
    if rest:
        raise ConfigError(f"mesh.model: {devices} cannot be divided among {processes} processes")
    chosen: list[Any] = []
    for process in range(processes):
        found = [device for device in jax.devices() if device.process_index == process]
        if len(found) < own:
            raise ConfigError(
                f"mesh.model: {devices} needs {own} devices in every process; "
                f"process {process} has {len(found)}"
            )
        chosen += sorted(found, key=lambda device: device.id)[:own]
    return Mesh(np.array(chosen), (AXIS,))


def lies(mesh: Mesh, spec: PartitionSpec) -> Sharding:
    """Where an array of this split lies; calls with a plain sharding of one device are fastest."""
    if mesh.size == 1:
        return SingleDeviceSharding(mesh.devices.item())
    return NamedSharding(mesh, spec)


def part_shape(shape: tuple[int, ...], spec: PartitionSpec, devices: int) -> tuple[int, ...]:
    """The shape of one device's part."""
    split = (*spec, *[None] * (len(shape) - len(spec)))
    return tuple(
        dim if name is None else dim // devices for dim, name in zip(shape, split, strict=True)
    )


def whole_array(part: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: Mesh) -> Any:
    """The abstract array whose parts on the devices of a mesh are like `part`."""
    split = (*spec, *[None] * (part.ndim - len(spec)))
    sizes = [1 if name is None else mesh.shape[name] for name in split]
    shape = tuple(dim * size for dim, size in zip(part.shape, sizes, strict=True))
    return jax.ShapeDtypeStruct(shape, part.dtype, sharding=lies(mesh, spec))
