"""From the logits of each row to its next token, on the device.

Three programs: greedy; draw (penalties, bias, draws, logprobs); and filter (the same after top-k,
top-p and min-p). None sorts the vocabulary: filters find a threshold by bisection, and a draw
inverts the cumulative distribution at one uniform number per (seed, position). So equal logits give
equal draws in any batch, and a row that asks for less gets the same from a program that does more.

Per-slot state lives on the device between steps: the last token, which the next step reads back
without the host, and the token counts that penalties need. Padding rows use a slot past the end:
their reads are clamped and their writes dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jslora.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS

IN_PROMPT = 1 << 30
"""Flag beside the count of generated tokens: the token also occurs in the prompt."""

_BLOCK = 256
_BISECTIONS = 32


class Slots(NamedTuple):
    """What the device remembers of each running sequence; donated to every sampling program."""

    last_token: Int32[Array, " slots"]
    counts: Int32[Array, "slots V"]
    bias_ids: Int32[Array, "slots 300"]
    bias_values: Float[Array, "slots 300"]
    stop_ids: Int32[Array, "slots 32"]  # ids that cannot be drawn before min_tokens; V pads


class SampleRows(NamedTuple):
    """Per-row settings of one step; rows that do not sample have a slot past the end."""

    slot: Int32[Array, " B"]
    seed: Int32[Array, "B 2"]
    position: Int32[Array, " B"]
    top_k: Int32[Array, " B"]
    hold_stop: Int32[Array, " B"]
    stateful: Int32[Array, " B"]  # the slot's counts and bias apply
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]


class Sampled(NamedTuple):
    """What the host reads back, one copy each; `floats` is empty in the greedy program.

    `ints` columns: token, finite, rank, then MAX_LOGPROBS likeliest ids; `floats` columns: the
    token's logprob, then theirs.
    """

    ints: Int32[Array, "B ints"]
    floats: Float[Array, "B floats"]


def new_slots(slots: int, vocab: int) -> Slots:
    """State of `slots` slots in which no sequence runs."""
    return Slots(
        last_token=jnp.zeros((slots,), jnp.int32),
        counts=jnp.zeros((slots, vocab), jnp.int32),
        bias_ids=jnp.full((slots, MAX_LOGIT_BIAS), vocab, jnp.int32),
        bias_values=jnp.zeros((slots, MAX_LOGIT_BIAS), jnp.float32),
        stop_ids=jnp.full((slots, 2 * MAX_STOP_IDS), vocab, jnp.int32),
    )


def admit(
    slots: Slots,
    slot: Int32[Array, ""],
    tokens: Int32[Array, " N"],
    prompt: Int32[Array, ""],
    total: Int32[Array, ""],
    bias_ids: Int32[Array, " 300"],
    bias_values: Float[Array, " 300"],
    stop_ids: Int32[Array, " 32"],
) -> Slots:
    """Give a slot to a sequence with penalties, bias or a minimum length.

    `tokens` holds the prompt, then what was generated before a preemption, then padding.
    """
    at, vocab = jnp.arange(tokens.shape[0]), slots.counts.shape[1]
    in_prompt = jnp.zeros((vocab,), jnp.int32)
    in_prompt = in_prompt.at[jnp.where(at < prompt, tokens, vocab)].set(IN_PROMPT, mode="drop")
    generated = (at >= prompt) & (at < total)
    counts = in_prompt.at[jnp.where(generated, tokens, vocab)].add(1, mode="drop")
    return Slots(
        last_token=slots.last_token,
        counts=slots.counts.at[slot].set(counts),
        bias_ids=slots.bias_ids.at[slot].set(bias_ids),
        bias_values=slots.bias_values.at[slot].set(bias_values),
        stop_ids=slots.stop_ids.at[slot].set(stop_ids),
    )


def sample_greedy(
    logits: Float[Array, "B V"], slots: Slots, rows: SampleRows
) -> tuple[Slots, Sampled]:
    """The likeliest token of each row; a row with a logit that is not a number is flagged."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    finite = _finite(logits)
    last = slots.last_token.at[rows.slot].set(token, mode="drop")
    ints = jnp.stack([token, finite.astype(jnp.int32)], axis=1)
    none = jnp.zeros((logits.shape[0], 0), jnp.float32)
    return slots._replace(last_token=last), Sampled(ints, none)


def sample_drawn(
    raw: Float[Array, "B V"],
    slots: Slots,
    rows: SampleRows,
    *,
    filters: bool,
) -> tuple[Slots, Sampled]:
    """Draws, and logprobs of the model's own distribution (before any setting)."""
    logits = _adjust(raw, slots, rows)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    p = _weights(logits, rows)
    p = _filter(p, rows) if filters else p
    drawn = _inverse_cdf(p, _uniform(rows.seed, rows.position))
    token = jnp.where(rows.temperature == 0, greedy, drawn)
    ints, floats = logprobs(raw, token)
    finite = _finite(raw).astype(jnp.int32)[:, None]
    ints = jnp.concatenate([ints[:, :1], finite, ints[:, 1:]], axis=1)
    slots = slots._replace(
        last_token=slots.last_token.at[rows.slot].set(token, mode="drop"),
        counts=slots.counts.at[rows.slot, token].add(1, mode="drop"),
    )
    return slots, Sampled(ints, floats)


def logprobs(
    logits: Float[Array, "B V"], token: Int32[Array, " B"]
) -> tuple[Int32[Array, "B ints"], Float[Array, "B floats"]]:
    """([token, rank, likeliest ids], [its logprob, theirs]); rank 1 is the likeliest."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, token[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    values, ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - ids.shape[1]))
    ids, values = jnp.pad(ids, pad), jnp.pad(values, pad, constant_values=-jnp.inf)
    ints = jnp.concatenate([token[:, None], rank[:, None], ids.astype(jnp.int32)], axis=1)
    return ints, jnp.concatenate([own - total, values - total], axis=1)


def _finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """The largest magnitude is a NaN or an infinity wherever there is one among the logits."""
    return jnp.isfinite(jnp.max(jnp.abs(logits), axis=-1))


def _adjust(logits: Float[Array, "B V"], slots: Slots, rows: SampleRows) -> Float[Array, "B V"]:
    """Penalties as OpenAI and Hugging Face define them, then bias, then the minimum length."""
    B, V = logits.shape

    def at(table: jax.Array) -> jax.Array:
        return table.at[rows.slot].get(mode="clip")

    stateful = rows.stateful[:, None] == 1
    counts = jnp.where(stateful, at(slots.counts), 0)
    seen, generated = counts > 0, (counts & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - rows.frequency[:, None] * generated
    logits = logits - rows.presence[:, None] * (generated > 0)
    row = jnp.arange(B)[:, None]
    bias_ids = jnp.where(stateful, at(slots.bias_ids), V)
    logits = logits.at[row, bias_ids].add(at(slots.bias_values), mode="drop")
    held = jnp.where(rows.hold_stop[:, None] == 1, at(slots.stop_ids), V)
    return logits.at[row, held].set(-jnp.inf, mode="drop")


def _weights(logits: Float[Array, "B V"], rows: SampleRows) -> Float[Array, "B V"]:
    """Likelihoods at the row's temperature, relative to the likeliest token's."""
    warm = jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    return jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / warm)


def _filter(p: Float[Array, "B V"], rows: SampleRows) -> Float[Array, "B V"]:
    """Keep the top k, of those the likeliest that make up top_p, of those the ones above min_p."""
    k, top_p = rows.top_k[:, None], rows.top_p[:, None]
    of_k = _keep_above(p, lambda kept: jnp.sum(kept > 0, axis=-1, keepdims=True) >= k)
    p = jnp.where((k > 0) & (k < p.shape[1]), of_k, p)
    enough = top_p * jnp.sum(p, axis=-1, keepdims=True)
    of_p = _keep_above(p, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= enough)
    p = jnp.where(top_p < 1, of_p, p)
    return jnp.where(p >= rows.min_p[:, None], p, 0)


def _keep_above(
    p: Float[Array, "B V"], enough: Callable[[jax.Array], jax.Array]
) -> Float[Array, "B V"]:
    """Zero all below the highest threshold that still keeps enough; ties at it are all kept.

    Positive floats order as their bit patterns do, so halving an integer interval finds the
    threshold exactly in 31 steps. p lies in [0, 1].
    """
    bits = lax.bitcast_convert_type(p, jnp.int32)
    low = jnp.zeros((p.shape[0], 1), jnp.int32)  # keeping all at or above `low` is enough
    high = jnp.full_like(low, 0x3F800001)  # above 1.0: keeps nothing

    for _ in range(_BISECTIONS):
        middle = low + (high - low) // 2
        ok = enough(jnp.where(bits >= middle, p, 0))
        low, high = jnp.where(ok, middle, low), jnp.where(ok, high, middle)
    return jnp.where(bits >= low, p, 0)


def _uniform(seed: Int32[Array, "B 2"], position: Int32[Array, " B"]) -> Float[Array, " B"]:
    """One number in [0, 1) per (seed, position), whatever else is in the batch."""

    def one(seed: Int32[Array, " 2"], position: Int32[Array, ""]) -> Float[Array, ""]:
        key = jax.random.wrap_key_data(lax.bitcast_convert_type(seed, jnp.uint32))
        return jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)

    return jax.vmap(one)(seed, position)


def _inverse_cdf(p: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int32[Array, " B"]:
    """First token whose cumulative weight exceeds `uniform` of the total, by blocks of _BLOCK.

    Summing within blocks first keeps float32 cumulative sums short, and cheap on a CPU.
    """
    B, V = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    block = _first(ends > target[:, None], sums > 0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(ends, block[:, None], axis=1)[:, 0] - jnp.sum(inside, axis=-1)
    past = before[:, None] + jnp.cumsum(inside, axis=-1) > target[:, None]
    offset = _first(past, inside > 0)
    return (block * _BLOCK + offset).astype(jnp.int32)


def _first(past: Bool[Array, "B n"], possible: Bool[Array, "B n"]) -> Int32[Array, " B"]:
    """Index of the first possible entry that is past the target, or of the last possible one.

    Rounding may make a cumulative sum grow where nothing was added, or end before the target.
    """
    past = past & possible
    last = possible.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(jnp.any(past, axis=-1), jnp.argmax(past, axis=-1), last)
