"""What follows a sum of base output and deltas, done by the kernel that makes the sum.

Two of the four groups of a block are followed by little more than an addition or a product. Where
the expand kernel does that, the sum is neither written nor read again, and a launch is saved.
"""

from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Finish(Enum):
    """SUM: float32, in the base output's place. RESIDUAL: rounded and added to the stream, in its
    place. GATED: the first half of the columns through SiLU, times the second, rounded.
    """

    SUM = "sum"
    RESIDUAL = "residual"
    GATED = "gated"


def finish_sum(
    y: Float[Array, "T out_all"],
    finish: Finish,
    stream: Float[Array, "T out"] | None,
    dtype: np.dtype,
) -> Float[Array, "T out"]:
    """The same in jax.numpy, of a sum that is done; `dtype` is that of rounded results."""
    if finish is Finish.SUM:
        return y
    if finish is Finish.GATED:
        gate, up = jnp.split(y, 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(dtype)
    assert stream is not None, "nothing to add the sum to"
    return stream + y.astype(stream.dtype)
