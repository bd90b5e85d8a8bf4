"""The loss behind the head, and its gradient in the same pass.

The head is not trained, so the gradient of the activations is at hand as soon as the logits are,
and logits of a few tokens at a time are all that is ever in memory. Only tokens that count are
taken: prompts and padding cost nothing here.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# Tokens whose logits are in memory at a time; every chunk has the head rearranged for its products.
_CHUNK = 512


def head_loss(
    h: Float[Array, "T H"], head: Float[Array, "V H"], target: Int32[Array, " T"],
    weight: Float[Array, " T"],
) -> tuple[Float[Array, " T"], Float[Array, "T H"]]:  # fmt: skip
    """(-log p(target) where the weight is not zero; gradient of their weighted sum, float32)."""
    T, chunk = h.shape[0], min(_CHUNK, h.shape[0])
    places = jnp.nonzero(weight, size=T + chunk, fill_value=T)[0]  # T lies beyond all of them

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, losses, gradient = state
        at = lax.dynamic_slice(places, (start,), (chunk,))
        some = [x.at[at].get(mode="clip") for x in (h, target, weight)]
        loss, slope = _chunk_loss(some[0], head, some[1], some[2])
        losses = losses.at[at].set(loss, mode="drop")
        return start + chunk, losses, gradient.at[at].set(slope, mode="drop")

    empty = jnp.int32(0), jnp.zeros(T, jnp.float32), jnp.zeros(h.shape, jnp.float32)
    count = jnp.count_nonzero(weight)
    return lax.while_loop(lambda state: state[0] < count, body, empty)[1:]


def _chunk_loss(
    h: Float[Array, "t H"], head: Float[Array, "V H"], target: Int32[Array, " t"],
    weight: Float[Array, " t"],
) -> tuple[Float[Array, " t"], Float[Array, "t H"]]:  # fmt: skip
    logits = jnp.einsum("th,vh->tv", h, head, preferred_element_type=jnp.float32)
    top = logits.max(-1, keepdims=True)
    shares = jnp.exp(logits - top)
    total = shares.sum(-1, keepdims=True)
    right = jnp.take_along_axis(logits, target[:, None], axis=1)
    loss = (top + jnp.log(total) - right)[:, 0]
    # The softmax is divided by its sum behind the product, where there are fewer numbers.
    mean = jnp.einsum("tv,vh->th", shares.astype(h.dtype), head, preferred_element_type=jnp.float32)
    slope = mean / total - head.at[target].get(mode="clip").astype(jnp.float32)
    return loss, slope * weight[:, None]
