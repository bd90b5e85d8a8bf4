"""Matrix products of training, with what their gradients are computed in.

Operands are rounded to the dtype of the activations and products accumulate in float32, backwards
as forwards: left to itself, differentiation would multiply a float32 gradient with bfloat16
weights, for which a CPU has no fast instruction (four times slower with AMX), and a GPU none at
all.
"""

from functools import partial, reduce

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
    return dot("tc,ci->ti", g, a).astype(x.dtype), dot("tc,ti->ci", g, x)


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

    One product of [x z] and [W Bᵀ]: beside a copy of W the sums of all tokens are large, and this
    way they are written once, not three times.

    Args:
        low: (z, B), `z` in the dtype of activations; None where there are no deltas.
        stream: what a RESIDUAL is added to.
    """
    return _adapted_forward(finish, x, w, low, stream)[0]


def _adapted_forward(
    finish: Finish, x: Array, w: Array, low: tuple[Array, Array] | None, stream: Array | None
) -> tuple[Array, tuple[Array, tuple[Array, Array] | None, Array | None]]:
    if low is not None:
        low = low[0], low[1].astype(w.dtype)
        x = jnp.concatenate([x, low[0]], axis=1)
    y = dot("ti,oi->to", x, _joined(w, low))
    # In the activations' dtype the halves take a third of the memory of what SiLU's own gradient
    # would keep.
    halves = y.astype(w.dtype) if finish is Finish.GATED else None
    return finish_sum(y, finish, stream, w.dtype), (w, low, halves)


def _adapted_backward(
    finish: Finish, kept: tuple[Array, tuple[Array, Array] | None, Array | None], g: Array
) -> tuple[Array, None, tuple[Array, Array] | None, Array | None]:
    w, low, halves = kept
    # One part for each half of a gated sum: joined they would be copied, and no product needs it.
    parts = [g.astype(w.dtype)] if halves is None else _gated_gradient(halves, g)
    weights = jnp.split(_joined(w, low), len(parts))
    both = reduce(
        jnp.add, [dot("to,oi->ti", part, own) for part, own in zip(parts, weights, strict=True)]
    ).astype(w.dtype)
    dx, dz = jnp.split(both, [w.shape[1]], axis=1)
    of_low = None
    if low is not None:
        of_low = dz, jnp.concatenate([dot("tc,to->co", low[0], part) for part in parts], axis=1)
    return dx, None, of_low, g if finish is Finish.RESIDUAL else None


adapted.defvjp(_adapted_forward, _adapted_backward)


def _joined(w: Array, low: tuple[Array, Array] | None) -> Float[Array, "out_all in_and_C"]:
    return w if low is None else jnp.concatenate([w, low[1].T], axis=1)


def _gated_gradient(halves: Float[Array, "T two_F"], g: Float[Array, "T F"]) -> list[Array]:
    """Gradients of gate and up, rounded, from that of SiLU(gate)·up."""
    gate, up = (half.astype(jnp.float32) for half in jnp.split(halves, 2, axis=-1))
    wide, share = g.astype(jnp.float32), jax.nn.sigmoid(gate)
    of_gate = wide * up * share * (1 + gate * (1 - share))
    return [of_gate.astype(halves.dtype), (wide * gate * share).astype(halves.dtype)]


def dot(spec: str, left: Array, right: Array) -> Array:
    """An einsum summed in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
