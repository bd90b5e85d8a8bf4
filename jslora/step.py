"""The compiled programs: one step of the model, sampling, scoring, and writes into the pool.

Pure functions of arrays, shared by every bucket. The step takes the weights as flat leaves (never
an `nnx.State`, whose flattening costs milliseconds a call), the donated pool and the packed batch;
it returns the pool and the activations of each row's last token, which the sampling program turns
into tokens without a stop at the host.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jslora import batch, sampling
from jslora.batch import Bucket, Geometry
from jslora.model.config import ModelConfig
from jslora.model.transformer import StepInput, Transformer, rope_tables
from pallas_kernels.lora import Work
from pallas_kernels.paged_attention import Rows

Leaves = list[jax.Array]


@dataclass(frozen=True)
class Programs:
    """The functions to compile for one model and pool."""

    config: ModelConfig
    dtype: jnp.dtype
    geometry: Geometry

    def leaf_names(self) -> list[str]:
        """Names of the weights in the order the step takes them."""
        return list(self._abstract(prefill=False)[1])

    def _abstract(self, *, prefill: bool) -> tuple[nnx.GraphDef, dict[str, tuple]]:
        """The model's structure, and the state path of each weight by its dotted name."""
        model = nnx.eval_shape(lambda: Transformer(self.config, self.dtype, prefill=prefill))
        graph, state = nnx.split(model)
        paths = [path for path, _ in nnx.to_flat_state(state)]
        return graph, {".".join(str(part) for part in path): path for path in paths}

    def step(
        self,
        bucket: Bucket,
        leaves: Leaves,
        pages: Float[Array, "pages S 2 K D"],
        last_token: Int32[Array, " slots"],
        packed: Int32[Array, " ints"],
        lora: Work,
    ) -> tuple[Float[Array, "pages S 2 K D"], Float[Array, "B H"], Float[Array, "T H"]]:
        """Run a bucket's tokens: (pool, last activations of each row, all activations)."""
        graph, paths = self._abstract(prefill=bucket.prefill)
        flat = [(path, nnx.Param(leaf)) for path, leaf in zip(paths.values(), leaves, strict=True)]
        model = nnx.merge(graph, nnx.from_flat_state(flat))
        at = batch.views(packed, batch.int_fields(bucket, self.geometry))
        fed = last_token.at[at["fed_slot"]].get(mode="clip")
        tokens = jnp.where(at["fed_slot"] < self.geometry.slots, fed, at["token"])
        cos, sin = rope_tables(self.config, at["position"])
        rows = Rows(
            at["block_table"], at["context"], at["start"], at["length"],
            at["tile_row"], at["tile_start"], at["tile_length"], at["tiles"][0],
        )  # fmt: skip
        inputs = StepInput(
            cos, sin, at["write_page"], at["write_offset"], rows,
            jnp.int32(self.geometry.pages), lora,
        )  # fmt: skip
        x, pages = model(tokens, pages, inputs)
        return pages, x.at[at["last"]].get(mode="clip"), x


def sample(
    full: bool,
    h: Float[Array, "B H"],
    head: Float[Array, "V H"],
    slots: sampling.Slots,
    ints: Int32[Array, " ints"],
    floats: Float[Array, "6 B"],
) -> tuple[sampling.Slots, sampling.Sampled]:
    """Draw each row's token and remember it in its slot."""
    at = batch.views(ints, batch.sample_fields(h.shape[0]))
    named = dict(zip(batch.SAMPLE_FLOATS, floats, strict=True))
    rows = sampling.SampleRows(**at, **named)
    return (sampling.sample_full if full else sampling.sample_greedy)(h, head, slots, rows)


def score(
    x: Float[Array, "T H"],
    head: Float[Array, "V H"],
    index: Int32[Array, " C"],
    target: Int32[Array, " C"],
) -> sampling.Sampled:
    """Logprob of `target` after each of some tokens of a step; laid out as by `logprobs`."""
    logits = sampling.head(x.at[index].get(mode="clip"), head)
    return sampling.Sampled(*sampling.logprobs(logits, target))


def write_pages(
    pages: Float[Array, "pages S 2 K D"],
    rows: Int32[Array, " C"],
    data: Float[Array, "C numbers"],
) -> Float[Array, "pages S 2 K D"]:
    """Put whole pages into the pool; a row beyond it is dropped."""
    return pages.at[rows].set(data.reshape(rows.shape[0], *pages.shape[1:]), mode="drop")


