"""The transformer block of Llama, Mistral, Qwen2 and Qwen3, on a flat token axis.

One step's tokens of all rows lie side by side in T. The pool of pages runs through the layers and
comes back updated; LoRA is an argument, never state. Activations are kept in the weights' dtype
between blocks; products accumulate, and rope, norms and deltas are computed, in float32.

Invariant: every read of the pool that precedes a layer's write of keys and values feeds that write
(q, k and v are one array until then), or XLA:CPU copies the whole pool.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jslora.lora import apply_lora
from jslora.model.config import ModelConfig
from jslora.model.quantize import FORMATS, SCALE, product
from jslora.sharding import AXIS
from jslora.split import ONE_DEVICE, Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Shape, Work
from pallas_kernels.lora.finish import Finish
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Rows


class StepInput(NamedTuple):
    """What a block needs to know of the step, beside the activations."""

    cos: Float[Array, "T 1 D"]
    sin: Float[Array, "T 1 D"]
    write_page: Int32[Array, " T"]  # in layer 0; a padding token's page lies beyond the pool
    write_offset: Int32[Array, " T"]
    rows: Rows
    last: Int32[Array, " B"]  # each row's last token


class Layout(NamedTuple):
    """What is fixed when a block is traced.

    Attributes:
        pages_per_layer: P.
        prefill: whether rows may have several tokens.
        lora, attention: how the host cut the step's work.
        split: over which devices heads and the feed-forward are split; the block's config and
            weights are one device's.
        quantize: how linear layers are kept, "none" or one of `quantize.FORMATS`.
    """

    pages_per_layer: int
    prefill: bool
    lora: Shape
    attention: Cut
    kernels: Kernels
    split: Split = ONE_DEVICE
    quantize: str = "none"


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, layout: Layout) -> None:
        H, F, D = config.hidden, config.feed_forward, config.head_dim
        qkv = (config.heads + 2 * config.kv_heads) * D
        self.config, self.layout = config, layout
        self.attn_norm = nnx.Param(jnp.ones((H,), dtype))
        self._declare("qkv", qkv, H, dtype)
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((qkv,), dtype))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((D,), dtype))
            self.k_norm = nnx.Param(jnp.ones((D,), dtype))
        self._declare("o", H, config.heads * D, dtype)
        self.mlp_norm = nnx.Param(jnp.ones((H,), dtype))
        self._declare("gate_up", 2 * F, H, dtype)
        self._declare("down", H, F, dtype)

    def _declare(self, name: str, outputs: int, inputs: int, dtype: jnp.dtype) -> None:
        """A linear layer."""
        if (quantize := self.layout.quantize) != "none":
            dtype = FORMATS[quantize].dtype
            setattr(self, name + SCALE, nnx.Param(jnp.ones((outputs,), jnp.float32)))
        setattr(self, name, nnx.Param(jnp.zeros((outputs, inputs), dtype)))

    def _linear(self, name: str, x: Float[Array, "T i"]) -> Float[Array, "T o"]:
        """In float32; adapters are given `x` as it is, whatever becomes of it here."""
        weight, quantize = getattr(self, name)[...], self.layout.quantize
        if quantize != "none":
            return product(x, weight, getattr(self, name + SCALE)[...], quantize)
        return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "T H"],
        pages: Float[Array, "pages S 2 K D"],
        layer: Int32[Array, ""],
        step: StepInput,
        work: Work,
    ) -> tuple[Float[Array, "T H"], Float[Array, "pages S 2 K D"]]:
        """Activations after this layer, and the pool with its keys and values written."""
        pool = _Pool(self.layout, self.config, pages, layer, step, work)
        return self.forward(x, step.cos, step.sin, pool.lora, pool.attend), pool.pages

    def forward(
        self,
        x: Float[Array, "T H"],
        cos: Float[Array, "T 1 D"],
        sin: Float[Array, "T 1 D"],
        lora: Callable[..., Array],
        attend: Callable[..., Float[Array, "T N D"]],
    ) -> Float[Array, "T H"]:
        """Activations after this layer, whatever adapters and attention are; also what is trained.

        Args:
            lora: (base output in float32, input, group, finish, stream) to what `Finish` says.
            attend: (q, k, v) to the heads' outputs.
        """
        h = rms_norm(x, self.attn_norm[...], self.config.norm_eps)
        q, k, v = self._heads(lora(self._linear("qkv", h), h, group=0), cos, sin)
        h = attend(q, k, v).reshape(x.shape[0], -1)
        x = self._add(x, lora, h, "o", group=1)
        h = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        h = lora(self._linear("gate_up", h), h, group=2, finish=Finish.GATED)
        return self._add(x, lora, h, "down", group=3)

    def _add(
        self, x: Float[Array, "T H"], lora: Callable[..., Array], h: Float[Array, "T i"],
        name: str, *, group: int,
    ) -> Float[Array, "T H"]:  # fmt: skip
        """The stream with a row-parallel product and its deltas added.

        Where devices hold parts of the product, the deltas join the parts before these are summed.
        """
        y = self._linear(name, h)
        if self.layout.split.devices == 1:
            return lora(y, h, group=group, finish=Finish.RESIDUAL, stream=x)
        return x + lax.psum(lora(y, h, group=group), AXIS).astype(x.dtype)

    def _heads(
        self, qkv: Float[Array, "T qkv"], cos: Float[Array, "T 1 D"], sin: Float[Array, "T 1 D"]
    ) -> tuple[Float[Array, "T N D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
        """Bias, split, norm and rotate; in the weights' dtype, ready for the pool."""
        N, K, D = self.config.heads, self.config.kv_heads, self.config.head_dim
        if self.config.qkv_bias:
            qkv = qkv + self.qkv_bias[...].astype(qkv.dtype)
        q, k, v = jnp.split(qkv.reshape(-1, N + 2 * K, D), [N, N + K], axis=1)
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.norm_eps)
        dtype = self.attn_norm[...].dtype
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)


class _Pool:
    """One layer's adapters and attention, read from pages; `pages` is the pool as it is then."""

    def __init__(
        self, layout: Layout, config: ModelConfig, pages: Float[Array, "pages S 2 K D"],
        layer: Int32[Array, ""], step: StepInput, work: Work,
    ) -> None:  # fmt: skip
        self.pages, self._layout, self._config, self._step = pages, layout, config, step
        self._first_page = layer * layout.pages_per_layer
        self._lora = partial(
            apply_lora, config=config, first_page=self._first_page, layer=layer, work=work,
            shape=layout.lora, kernels=layout.kernels, split=layout.split,
        )  # fmt: skip

    def lora(
        self, y: Float[Array, "T out"], x: Float[Array, "T in"], *, group: int,
        finish: Finish = Finish.SUM, stream: Float[Array, "T H"] | None = None,
    ) -> Float[Array, "T out"]:  # fmt: skip
        return self._lora(y, x, pages=self.pages, group=group, finish=finish, stream=stream)

    def attend(
        self, q: Float[Array, "T N D"], k: Float[Array, "T K D"], v: Float[Array, "T K D"]
    ) -> Float[Array, "T N D"]:
        """Write keys and values, then read those of every row."""
        step, layout = self._step, self._layout
        at = self._first_page + step.write_page, step.write_offset
        self.pages = self.pages.at[at].set(jnp.stack([k, v], axis=1), mode="drop")
        return paged_attention(
            q, self.pages, self._first_page, step.rows, scale=self._config.head_dim**-0.5,
            prefill=layout.prefill, cut=layout.attention, kernels=layout.kernels,
        )  # fmt: skip


def rms_norm(
    x: Float[Array, "*n H"], weight: Float[Array, " H"], eps: float
) -> Float[Array, "*n H"]:
    """Divide by the root mean square of the last axis, in float32, and scale (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rope_tables(
    config: ModelConfig, positions: Int32[Array, " T"]
) -> tuple[Float[Array, "T 1 D"], Float[Array, "T 1 D"]]:
    """Cosine and sine of every position's rotation angles, both halves (arXiv 2104.09864)."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(config))[None]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, None]
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of channels, [D/2] float32, with the model's scaling."""
    D = config.head_dim
    exponent = np.arange(0, D, 2, dtype=np.float64) / D
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between are blended.
    turns = scaling.original_positions * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def _rotate(
    x: Float[Array, "T heads D"], cos: Float[Array, "T 1 D"], sin: Float[Array, "T 1 D"]
) -> Float[Array, "T heads D"]:
    """Rotate channel i with channel i + D/2, as Hugging Face checkpoints expect."""
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin
