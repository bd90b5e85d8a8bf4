"""Which of an adapter's inputs are left out, decided by a hash of where they stand.

Every row of a batch has a seed and every layer's module a number; the place in the row does the
rest. So a row has the same zeros beside whatever other rows, forwards and backwards, and nothing
is stored or drawn in order. A hash is several times cheaper than a cipher such as Threefry, whose
strength no mask needs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32


def dropped(
    x: Float[Array, "B T in"],
    share: Float[Array, " B"],
    seed: UInt32[Array, " B"],
    number: Int32[Array, ""],
) -> Float[Array, "B T in"]:
    """`x` with each row's share of zeros; the rest grows, so that sums stay what they are.

    Args:
        share: in [0, 1), by row.
        number: of what is dropped, so that each has zeros of its own.
    """
    T, width = x.shape[1:]
    key = _mixed(seed ^ _mixed(number.astype(jnp.uint32)))[:, None, None]
    places = jnp.arange(T * width, dtype=jnp.uint32).reshape(1, T, width)
    limit = jnp.round(share * 2**24).astype(jnp.uint32)[:, None, None]
    keep = (_mixed((places * jnp.uint32(0x9E3779B9)) ^ key) >> 8) >= limit
    grown = x.astype(jnp.float32) / (1 - share)[:, None, None]
    return jnp.where(keep, grown, 0).astype(x.dtype)


def _mixed(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Each bit of the result depends on all bits: Murmur3's finaliser (A. Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
