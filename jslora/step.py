"""The compiled programs: one step of the model, sampling, scoring, and writes into the pool.

Pure functions of arrays, shared by every bucket. Weights come as flat leaves (never an `nnx.State`,
whose flattening costs milliseconds a call), the pool is donated, and the activations of each row's
last token go on to the sampling program without a stop at the host.

Invariant: rows of padding tokens may hold anything, NaN included; nothing reads across rows, and
the host points every index at a row that is real, or drops what it made.

A step is one program on an accelerator. On a CPU the same parts are separate programs, one for any
layer, dispatched one behind the other: XLA:CPU compiles every layer of a whole step anew, at half a
minute a bucket for 30 layers, while dispatching 30 programs costs about two milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jslora import batch, sampling
from jslora.batch import Bucket, Geometry
from jslora.buckets import SMALLEST
from jslora.model.config import ModelConfig
from jslora.model.transformer import Block, Layout, StepInput, rms_norm, rope_tables
from jslora.sharding import AXIS
from jslora.split import ONE_DEVICE, Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Shape, Work, work_shape
from pallas_kernels.paged_attention.rows import Rows


class Weights(NamedTuple):
    """The model's leaves; one list a layer, in the order of `Programs.leaf_names`."""

    embed: Float[Array, "V H"]
    layers: list[list[jax.Array]]
    norm: Float[Array, " H"]


@dataclass(frozen=True)
class Programs:
    """The functions to compile for one model and pool.

    Split over several devices they are one device's part of programs over a mesh.

    Attributes:
        config: of the whole model.
        geometry: one device's.
        quantize: how linear layers are kept, "none" or one of `quantize.FORMATS`.
    """

    config: ModelConfig
    dtype: jnp.dtype
    geometry: Geometry
    kernels: Kernels
    split: Split = ONE_DEVICE
    quantize: str = "none"

    @property
    def vocabulary_axis(self) -> str | None:
        """The mesh axis over which embedding and head are split, if they are."""
        return AXIS if self.split.splits_vocabulary(self.config) else None

    @cached_property
    def leaf_names(self) -> list[str]:
        """Names of one layer's weights in the order the programs take them."""
        return list(self._block(Bucket(SMALLEST, SMALLEST, 1))[1])

    def lora_shape(self, bucket: Bucket) -> Shape:
        """How the LoRA work of a bucket is cut."""
        peers = max(self.geometry.peers)
        # Each of several adapters has its ranks rounded up to the devices that share them.
        rank = self.geometry.max_rank + (self.geometry.max_composed - 1) * (peers - 1)
        return work_shape(
            bucket.tokens, rank, self.kernels, prefill=bucket.prefill, peers=peers,
            storages=self.geometry.storages,
        )  # fmt: skip

    def _block(self, bucket: Bucket) -> tuple[nnx.GraphDef, dict[str, tuple]]:
        """A block's structure, and the state path of each weight by its name."""
        layout = Layout(
            self.geometry.pages, bucket.prefill, self.lora_shape(bucket), self.geometry.attention,
            self.kernels, self.split, self.quantize,
        )  # fmt: skip
        config = self.split.local(self.config)
        block = nnx.eval_shape(lambda: Block(config, self.dtype, layout))
        graph, state = nnx.split(block)
        return graph, {str(path[0]): path for path, _ in nnx.to_flat_state(state)}

    def weights(self, leaves: Mapping[str, Any]) -> Weights:
        """Arrange leaves, or what stands for them, by their dotted names."""
        layers = [
            [leaves[f"layers.{layer}.{name}"] for name in self.leaf_names]
            for layer in range(self.config.layers)
        ]
        return Weights(leaves["embed"], layers, leaves["norm"])

    def step(
        self,
        bucket: Bucket,
        weights: Weights,
        pages: Float[Array, "pages S 2 K D"],
        last_token: Int32[Array, " slots"],
        packed: Int32[Array, " ints"],
        work: Work,
    ) -> tuple[Float[Array, "pages S 2 K D"], Float[Array, "B H"], Float[Array, "T H"]]:
        """Run a bucket's tokens: (pool, last activations of each row, all activations)."""
        x, inputs = self.begin(bucket, weights.embed, last_token, packed)
        # Behind an inner jit the layer is traced once, not once a layer.
        layer = jax.jit(partial(self.layer, bucket))
        for index, leaves in enumerate(weights.layers):
            x, pages = layer(leaves, x, pages, jnp.int32(index), inputs, work)
        h, x = self.finish(weights.norm, x, inputs)
        return pages, h, x

    def begin(
        self,
        bucket: Bucket,
        embed: Float[Array, "V H"],
        last_token: Int32[Array, " slots"],
        packed: Int32[Array, " ints"],
    ) -> tuple[Float[Array, "T H"], StepInput]:
        """Unpack a step; tokens the host has not read yet come from their slots."""
        at = batch.views(packed, batch.int_fields(bucket, self.geometry))
        fed = last_token.at[at["fed_slot"]].get(mode="clip")
        tokens = jnp.where(at["fed_slot"] < self.geometry.slots, fed, at["token"])
        return _embed(embed, tokens, self.vocabulary_axis), self.inputs(bucket, packed)

    def inputs(self, bucket: Bucket, packed: Int32[Array, " ints"]) -> StepInput:
        """What every layer needs of a packed step."""
        at = batch.views(packed, batch.int_fields(bucket, self.geometry))
        rows = Rows(
            at["block_table"], at["context"], at["start"], at["length"],
            at["parts"], at["items"], at["item_count"],
        )  # fmt: skip
        cos, sin = rope_tables(self.config, at["position"])
        return StepInput(cos, sin, at["write_page"], at["write_offset"], rows, at["last"])

    def layer(
        self,
        bucket: Bucket,
        leaves: list[jax.Array],
        x: Float[Array, "T H"],
        pages: Float[Array, "pages S 2 K D"],
        index: Int32[Array, ""],
        inputs: StepInput,
        work: Work,
    ) -> tuple[Float[Array, "T H"], Float[Array, "pages S 2 K D"]]:
        """One layer, whichever `index` says."""
        graph, paths = self._block(bucket)
        flat = [(path, nnx.Param(leaf)) for path, leaf in zip(paths.values(), leaves, strict=True)]
        block = nnx.merge(graph, nnx.from_flat_state(flat))
        return block(x, pages, index, inputs, work)

    def finish(
        self, norm: Float[Array, " H"], x: Float[Array, "T H"], inputs: StepInput
    ) -> tuple[Float[Array, "B H"], Float[Array, "T H"]]:
        """The final norm: activations of each row's last token, and of all tokens."""
        x = rms_norm(x, norm, self.config.norm_eps)
        return x.at[inputs.last].get(mode="clip"), x


def sample(
    program: str,
    h: Float[Array, "B H"],
    head: Float[Array, "V H"],
    slots: sampling.Slots,
    ints: Int32[Array, " ints"],
    floats: Float[Array, "6 B"],
    *,
    axis: str | None = None,
) -> tuple[sampling.Slots, sampling.Sampled]:
    """Draw each row's token and remember it in its slot; `program` is one of `batch.SAMPLERS`.

    Args:
        axis: the mesh axis over which the head is split, if it is.
    """
    at = batch.views(ints, batch.sample_fields(h.shape[0]))
    named = dict(zip(batch.SAMPLE_FLOATS, floats, strict=True))
    rows, logits = sampling.SampleRows(**at, **named), _logits(h, head, axis)
    if program == "greedy":
        return sampling.sample_greedy(logits, slots, rows)
    return sampling.sample_drawn(logits, slots, rows, filters=program == "filter")


def score(
    x: Float[Array, "T H"],
    head: Float[Array, "V H"],
    index: Int32[Array, " C"],
    target: Int32[Array, " C"],
    *,
    axis: str | None = None,
) -> sampling.Sampled:
    """Logprob of `target` after each of some tokens of a step; laid out as by `logprobs`."""
    logits = _logits(x.at[index].get(mode="clip"), head, axis)
    return sampling.Sampled(*sampling.logprobs(logits, target))


def write_pages(
    pages: Float[Array, "pages S 2 K D"],
    rows: Int32[Array, " C"],
    data: Float[Array, "1 C numbers"],
) -> Float[Array, "pages S 2 K D"]:
    """Put whole pages into this device's part of the pool; a row beyond it is dropped."""
    data = data.reshape(rows.shape[0], *pages.shape[1:])
    return pages.at[rows].set(data, mode="drop")


def _embed(
    embed: Float[Array, "V H"], tokens: Int32[Array, " T"], axis: str | None
) -> Float[Array, "T H"]:
    """Rows of the embedding; over a split vocabulary, the sum of one device's row and zeros."""
    if axis is None:
        return embed.at[tokens].get(mode="clip")
    own = tokens - lax.axis_index(axis) * embed.shape[0]
    here = (own >= 0) & (own < embed.shape[0])
    rows = embed.at[own].get(mode="clip")
    return lax.psum(jnp.where(here[:, None], rows, 0), axis)


def _logits(
    h: Float[Array, "B H"], weight: Float[Array, "V H"], axis: str | None
) -> Float[Array, "B V"]:
    """In float32, of the whole vocabulary."""
    logits = jnp.einsum("bh,vh->bv", h, weight, preferred_element_type=jnp.float32)
    return logits if axis is None else lax.all_gather(logits, axis, axis=1, tiled=True)
