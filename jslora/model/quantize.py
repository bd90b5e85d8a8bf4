"""Linear layers with weights of 8 bits: how the weights are made, and how activations meet them.

Every output channel has a scale of its own, symmetric around zero, so that int8 and float8 products
need no offsets. Activations are brought to the same type as they come, each token by its own
largest number, and products are summed exactly (int8, in int32) or in float32 (float8); both scales
are applied to the sums. Nothing is shared between tokens: what stands in one row of a batch never
changes another. A number that is not finite makes its whole row so.

Some channels of the activations are many times larger than the others, and would leave to these
only a few of the steps that int8 has. So both sides are turned by a Hadamard matrix first, block by
block of channels, as QuaRot does (arXiv 2404.00456): their product stays what it was, and what is
large is shared by the channels of a block. float8 has an exponent, and would lose by it.

Weights lie [out, in]: what is summed over is contiguous, which int8 products of XLA:CPU and float8
products of a GPU need.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

LINEAR = {"qkv": False, "o": True, "gate_up": False, "down": True}
"""Leaves of a layer that are quantised, by the last part of their names; whether several devices
split them by their inputs."""

SCALE = "_scale"
"""Behind the name of a leaf, that of its scales."""

BLOCK = 64
"""Channels that are turned together; fewer where so many do not divide a device's channels."""


class Format(NamedTuple):
    """A type of 8 bits, its largest number, in what products are summed, whether it is turned."""

    dtype: Any
    largest: float
    sums: Any
    turned: bool


FORMATS = {
    "int8": Format(jnp.int8, 127.0, jnp.int32, True),
    "fp8": Format(jnp.float8_e4m3fn, 448.0, jnp.float32, False),
}
"""By `model.quantize` of the configuration, which may also be "none"."""

Named = tuple[str, jax.Array]
"""A leaf's dotted name, and the leaf."""


def is_linear(name: str) -> bool:
    """Whether the leaf of a dotted name is one that is quantised."""
    return name.rpartition(".")[2] in LINEAR


def scales(name: str, outputs: int, devices: int) -> int:
    """How many scales a leaf has: where inputs are split, every device has one for each output."""
    return outputs * devices if LINEAR[name.rpartition(".")[2]] else outputs


def quantized(
    weights: Iterable[Named],
    quantize: str,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> Iterator[Named]:
    """Leaves one after the other, each linear layer's followed by its scales, in float32.

    A device converts what it has by itself: processes need not do it at the same time, or at all.
    """
    if quantize == "none":
        yield from weights
        return
    convert = jax.jit(partial(_convert, quantize=quantize))
    whole = jax.make_array_from_single_device_arrays
    for name, weight in weights:
        if not is_linear(name):
            yield name, weight
            continue
        made = [convert(shard.data) for shard in weight.addressable_shards]
        yield name, whole(weight.shape, weight.sharding, [rows for rows, _ in made])
        shape = (scales(name, weight.shape[0], len(weight.sharding.device_set)),)
        where = sharding(name + SCALE, shape)
        yield name + SCALE, whole(shape, where, [scale for _, scale in made])


def product(
    x: Float[Array, "T i"], weight: Shaped[Array, "o i"], scale: Float32[Array, " o"], quantize: str
) -> Float32[Array, "T o"]:
    """Activations times a quantised weight; both are one device's."""
    rows, own = to_rows(turn(x, _block(x.shape[-1], quantize)), quantize)
    sums = jnp.einsum("ti,oi->to", rows, weight, preferred_element_type=FORMATS[quantize].sums)
    return sums.astype(jnp.float32) * own[:, None] * scale


def _convert(
    weight: Float[Array, "o i"], quantize: str
) -> tuple[Shaped[Array, "o i"], Float32[Array, " o"]]:
    """A weight in 8 bits and its scales, which also undo the length that turning twice gives."""
    block = _block(weight.shape[1], quantize)
    rows, scale = to_rows(turn(weight, block), quantize)
    return rows, scale / block


def _block(channels: int, quantize: str) -> int:
    return math.gcd(channels, BLOCK) if FORMATS[quantize].turned else 1


def turn(x: Float[Array, "n i"], block: int) -> Float32[Array, "n i"]:
    """Each block of channels times a Hadamard matrix of 1 and -1 (Sylvester's, symmetric).

    A product of two that are turned is `block` times the product of what they were.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned = jnp.einsum(
        "ngb,bc->ngc", x.reshape(x.shape[0], -1, block), jnp.asarray(matrix, x.dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    return turned.reshape(x.shape)


def to_rows(
    x: Float[Array, "n i"], quantize: str
) -> tuple[Shaped[Array, "n i"], Float32[Array, " n"]]:
    """Rows in 8 bits and their scales: row times scale is near what it was."""
    form = FORMATS[quantize]
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.maximum(most / form.largest, jnp.finfo(jnp.float32).tiny)  # a NaN stays one
    rows = x / scale[:, None]
    return (jnp.round(rows) if quantize == "int8" else rows).astype(form.dtype), scale
