"""Matrix products of training, with what their gradients are computed in.

Operands are rounded to the dtype of the activations and products accumulate in float32, backwards
as forwards: left to itself, differentiation would multiply a float32 gradient with bfloat16
weights, for which a CPU has no fast instruction (four times slower with AMX), and a GPU none at
all.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lora.finish import Finish, finish_sum


@jax.custom_vjp
def shrink(x: Float[Array, "T in"], a: Float[Array, "C in"]) -> Float[Array, "T C"]:
    """x·Aᵀ in float32; the gradient of `a` is float32 as it is."""
    return dot("ti,ci->tc", x, a.astype(x.dtype))


def _shrink_forward(x: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = a.astype(x.dtype)
    return dot("ti,ci->tc", x, rounded), (x, rounded)


def _shrink_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, a = kept
    g = g.astype(x.dtype)
    return dot("tc,ci->ti", g, a).astype(x.dtype), _over_tokens(g, x)


shrink.defvjp(_shrink_forward, _shrink_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted(
    finish: Finish,
    x: Float[Array, "T in"],
    w: Float[Array, "out_all in"],
    low: tuple[Float[Array, "T C"], Float[Array, "C out_all"]] | None,
    stream: Float[Array, "T out"] | None,
) -> Float[Array, "T out"]:
    """The sum of x·Wᵀ and deltas z·B, finished; `w` has no gradient.

    Args:
        low: (z, B), `z` in the dtype of activations; None where there are no deltas.
        stream: what a RESIDUAL is added to.
    """
    return _adapted_forward(finish, x, w, low, stream)[0]


def _adapted_forward(
    finish: Finish, x: Array, w: Array, low: tuple[Array, Array] | None, stream: Array | None
) -> tuple[Array, tuple[Array, tuple[Array, Array] | None, Array | None]]:
    y = dot("ti,oi->to", x, w)
    if low is not None:
        low = low[0], low[1].astype(w.dtype)
        y = y + dot("tc,co->to", low[0], low[1])
    # In the activations' dtype the halves take a third of the memory of what SiLU's own gradient
    # would keep. SiLU itself reads them too, or the float32 sum would be made twice.
    halves = y.astype(w.dtype) if finish is Finish.GATED else None
    y = y if halves is None else halves.astype(y.dtype)
    return finish_sum(y, finish, stream, w.dtype), (w, low, halves)


def _adapted_backward(
    finish: Finish, kept: tuple[Array, tuple[Array, Array] | None, Array | None], g: Array
) -> tuple[Array, None, tuple[Array, Array] | None, Array | None]:
    w, low, halves = kept
    g_sum = g.astype(w.dtype) if halves is None else _gated_gradient(halves, g)
    dx = dot("to,oi->ti", g_sum, w).astype(w.dtype)
    of_low = None
    if low is not None:
        z, b = low
        of_low = dot("to,co->tc", g_sum, b).astype(z.dtype), _over_tokens(z, g_sum)
    return dx, None, of_low, g if finish is Finish.RESIDUAL else None


adapted.defvjp(_adapted_forward, _adapted_backward)


def _over_tokens(z: Float[Array, "T C"], x: Float[Array, "T i"]) -> Float[Array, "C i"]:
    """zᵀ·x in float32."""
    # Padded, the transposed factor is an array of its own. XLA:CPU would fold a bare transpose into
    # the product, and has no bfloat16 product that sums over both first axes: three times slower.
    # At least one row is added, to a multiple of 16 too, or nothing would be padded.
    C = z.shape[1]
    return dot("ct,ti->ci", jnp.pad(z.T, ((0, 16 - C % 16), (0, 0))), x)[:C]


def _gated_gradient(
    halves: Float[Array, "T two_F"], g: Float[Array, "T F"]
) -> Float[Array, "T two_F"]:
    """That of gate and up side by side, rounded, from that of SiLU(gate)·up."""
    gate, up = (half.astype(jnp.float32) for half in jnp.split(halves, 2, axis=-1))
    wide, share = g.astype(jnp.float32), jax.nn.sigmoid(gate)
    of_gate, of_up = wide * up * share * (1 + gate * (1 - share)), wide * gate * share
    return jnp.concatenate([x.astype(halves.dtype) for x in (of_gate, of_up)], axis=1)


def dot(spec: str, left: Array, right: Array) -> Array:
    """An einsum summed in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
