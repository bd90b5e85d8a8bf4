"""Grouped-query attention over pages of the pool, for decode rows and prefill tiles alike.

The reference in plain jax.numpy: the contract of every other implementation, and what runs on CPU.
Two loops with dynamic trip counts share one online softmax over chunks of pages:

- decode: every row of one query token at once, [B, ...], until the longest context is covered;
- prefill: a host-built list of tiles (row, first token, tokens), one after the other.

Invariant: a key or value beyond a row's context is never multiplied, only selected away, so a NaN
in a page that a row does not own cannot reach it (0 * NaN is NaN).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.paged_attention.rows import Item, Rows

CHUNK_PAGES = 8
QUERY_TILE = 32
_MASKED = -1e30


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    *,
    scale: float,
    prefill: bool,
) -> Float[Array, "T N D"]:
    """As `pallas_kernels.paged_attention.api.paged_attention`; rows of padding tokens are zero."""
    T = q.shape[0]
    decode_token = jnp.where(rows.length == 1, rows.start, T)
    out = _decode(q, pages, first_page, rows, decode_token, scale)
    if prefill:
        out = _prefill(q, pages, first_page, rows, out, scale)
    return out.astype(q.dtype)


def _decode(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    token: Int32[Array, " B"],
    scale: float,
) -> Float[Array, "T N D"]:
    """Attention of every one-token row; `token` is the row's token, T for the other rows.

    Keys and values of all heads are multiplied as they lie in the page, with queries that are
    zero outside their own kv head's key: on a CPU that costs less than transposing each chunk.
    """
    T, N, D = q.shape
    B, K = rows.context.shape[0], pages.shape[3]
    query = q.at[token].get(mode="fill", fill_value=0).reshape(B, K, N // K, 1, D)
    own_key = jnp.eye(K, 2 * K, dtype=q.dtype)[None, :, None, :, None]
    query = (query * own_key).reshape(B, N, 2 * K * D)
    context = jnp.where(token < T, rows.context, 0)
    span = CHUNK_PAGES * pages.shape[1]

    def body(i: Int32[Array, ""], carry: tuple) -> tuple:
        visible = (i * span + jnp.arange(span))[None] < context[:, None]
        kv = _chunk(pages, first_page, rows.block_table, i).reshape(B, span, 2 * K * D)
        kv = jnp.where(visible[:, :, None], kv, 0)
        scores = jnp.einsum("bnc,bsc->bns", query, kv, preferred_element_type=jnp.float32)
        weights, scaling, carry = _softmax_update(
            carry, jnp.where(visible[:, None], scores * scale, _MASKED)
        )
        update = jnp.einsum(
            "bns,bsc->bnc", weights.astype(kv.dtype), kv, preferred_element_type=jnp.float32
        )
        return (carry[0] * scaling[..., None] + update, *carry[1:])

    chunks = (jnp.max(context) + span - 1) // span
    acc, _, total = lax.fori_loop(0, chunks, body, _softmax_start((B, N), 2 * K * D))
    acc = acc.reshape(B, K, N // K, 2 * K, D)
    own_value = jnp.stack([acc[:, k, :, K + k] for k in range(K)], axis=1).reshape(B, N, D)
    result = own_value / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.zeros((T, N, D), jnp.float32).at[token].set(result, mode="drop")


def _prefill(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    out: Float[Array, "T N D"],
    scale: float,
) -> Float[Array, "T N D"]:
    T, N, D = q.shape
    K, span, Q = pages.shape[3], CHUNK_PAGES * pages.shape[1], min(QUERY_TILE, T)

    def tile(u: Int32[Array, ""], out: Float[Array, "T N D"]) -> Float[Array, "T N D"]:
        item = Item(*rows.items[u])
        row = item.row
        # A slice that would run past the end is moved back: `shift` tokens of it are not ours.
        start = jnp.minimum(item.start, T - Q)
        shift = item.start - start
        lane = jnp.arange(Q)
        ours = (lane >= shift) & (lane < shift + item.tokens)
        end = rows.context[row] - (rows.start[row] + rows.length[row] - start)  # position of lane 0
        visible_to = jnp.where(ours, end + lane + 1, 0)  # exclusive
        query = lax.dynamic_slice(q, (start, 0, 0), (Q, N, D)).reshape(Q, K, N // K, D)
        table = lax.dynamic_index_in_dim(rows.block_table, row)

        def body(i: Int32[Array, ""], carry: tuple) -> tuple:
            kv = _chunk(pages, first_page, table, i)
            k, v = kv[0, :, 0], kv[0, :, 1]
            at = i * span + jnp.arange(span)
            visible = at[None] < visible_to[:, None]  # [Q, s]
            scores = jnp.einsum("qkgd,skd->kgqs", query, k, preferred_element_type=jnp.float32)
            weights, scaling, carry = _softmax_update(
                carry, jnp.where(visible[None, None], scores * scale, _MASKED)
            )
            v = jnp.where((at < jnp.max(visible_to))[:, None, None], v, 0)
            update = jnp.einsum(
                "kgqs,skd->kgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return (carry[0] * scaling[..., None] + update, *carry[1:])

        chunks = (jnp.max(visible_to) + span - 1) // span
        acc, _, total = lax.fori_loop(0, chunks, body, _softmax_start((K, N // K, Q), D))
        result = acc / jnp.where(total == 0, 1.0, total)[..., None]
        result = result.transpose(2, 0, 1, 3).reshape(Q, N, D)
        before = lax.dynamic_slice(out, (start, 0, 0), (Q, N, D))
        return lax.dynamic_update_slice(
            out, jnp.where(ours[:, None, None], result, before), (start, 0, 0)
        )

    return lax.fori_loop(0, rows.total[0], tile, out)


def _chunk(
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    table: Int32[Array, "B M"],
    i: Int32[Array, ""],
) -> Float[Array, "B s 2 K D"]:
    """Keys and values of the i-th CHUNK_PAGES pages of each row; M is a multiple of that."""
    B = table.shape[0]
    ids = lax.dynamic_slice(table, (0, i * CHUNK_PAGES), (B, CHUNK_PAGES))
    kv = pages.at[first_page + ids].get(mode="promise_in_bounds")
    _, _, S, _, K, D = kv.shape
    return kv.reshape(B, CHUNK_PAGES * S, 2, K, D)


def _softmax_start(shape: tuple[int, ...], D: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(accumulator, running maximum, running sum) of an empty online softmax."""
    zeros = jnp.zeros(shape, jnp.float32)
    return jnp.zeros((*shape, D), jnp.float32), jnp.full(shape, _MASKED, jnp.float32), zeros


def _softmax_update(
    carry: tuple[jax.Array, jax.Array, jax.Array], scores: Float[Array, "... s"]
) -> tuple[Float[Array, "... s"], Float[Array, "..."], tuple[jax.Array, jax.Array, jax.Array]]:
    """Weights of this chunk, what to scale the accumulator by, and the carry with max and sum."""
    acc, high, total = carry
    new_high = jnp.maximum(high, jnp.max(scores, axis=-1))
    weights = jnp.where(scores == _MASKED, 0.0, jnp.exp(scores - new_high[..., None]))
    scaling = jnp.exp(high - new_high)
    return weights, scaling, (acc, new_high, total * scaling + jnp.sum(weights, axis=-1))
