"""Every program that a runner compiles: its function, and the shapes it is compiled for.

Nothing here holds an array or asks for a device, so one list serves the start-up on the device at
hand and compiling ahead for a GPU that is not there (`scripts/check_gpu_build.py`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jslora import sampling
from jslora.batch import SAMPLERS, Bucket, Geometry, int_fields, sample_fields, size
from jslora.blocks import block_items
from jslora.buckets import make_buckets
from jslora.model.config import MODULES, ModelConfig
from jslora.model.weights import shapes
from jslora.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from jslora.spans import span_pairs
from jslora.step import Programs, Weights, sample, score, write_pages
from pallas_kernels.launch import Kernels, choose
from pallas_kernels.lora import api as lora
from pallas_kernels.lora.pieces import RANK_BLOCK, slack_pages
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork
from pallas_kernels.paged_attention import api as attention
from pallas_kernels.paged_attention.reference import CHUNK_PAGES

Job = tuple[str, Callable, tuple[int, ...], tuple]
"""What to compile: name, function, donated arguments, abstract arguments."""

SCORE_ROWS = 32
"""Prompt positions scored by one call of the scoring program."""

UPLOAD_BYTES = 2 * 2**20
"""About how much one upload moves: small enough that a write never holds up a step."""


@dataclass(frozen=True)
class Sizes:
    """Sizes the programs are compiled for."""

    pages: int
    page_size: int
    max_running: int
    max_step_tokens: int
    max_model_len: int
    max_rank: int
    dtype: jnp.dtype


def page_numbers(config: ModelConfig, page_size: int) -> int:
    """Numbers in one page of one layer: S tokens of K keys and K values."""
    return page_size * 2 * config.kv_heads * config.head_dim


def slack(config: ModelConfig, page_size: int) -> int:
    """Pages behind the last layer that are only ever read past (see `slack_pages`)."""
    longest = max(max(config.widths(module)) for module in MODULES)
    return slack_pages(longest, page_numbers(config, page_size))


def choose_kernels(config: ModelConfig, page_size: int, wanted: str, platform: str) -> Kernels:
    """The kernels for a model's shapes.

    Raises:
        NotImplementedError: one was asked for by name and cannot be had; says why.
    """
    rows, page = tuple(config.widths(m) for m in MODULES), page_numbers(config, page_size)
    checks = {
        "lora": partial(lora.check, rows=rows, page=page),
        "attention": partial(attention.check, head_dim=config.head_dim),
    }
    return choose(wanted, platform, checks)


@dataclass(frozen=True)
class Catalog:
    """The programs of one model on one device, or on each device of a mesh axis."""

    config: ModelConfig
    sizes: Sizes
    kernels: Kernels
    axis: str | None = None

    @cached_property
    def geometry(self) -> Geometry:
        """What the host must know to fill the programs' arrays."""
        c, sizes = self.config, self.sizes
        return Geometry(
            layers=c.layers,
            pages=sizes.pages,
            page_size=sizes.page_size,
            page_numbers=page_numbers(c, sizes.page_size),
            slots=sizes.max_running,
            drop_page=self.pool_rows,
            attention=attention.attention_cut(sizes.max_model_len, self.kernels),
            rank_block=RANK_BLOCK,
            max_rank=sizes.max_rank,
            row_lengths=tuple(c.widths(module) for module in MODULES),
        )

    @property
    def pool_rows(self) -> int:
        return self.config.layers * self.sizes.pages + slack(self.config, self.sizes.page_size)

    @cached_property
    def programs(self) -> Programs:
        return Programs(self.config, self.sizes.dtype, self.geometry, self.kernels, self.axis)

    @cached_property
    def buckets(self) -> list[Bucket]:
        width = -(-self.sizes.max_model_len // self.sizes.page_size)
        width = -(-width // CHUNK_PAGES) * CHUNK_PAGES
        return make_buckets(self.sizes.max_running, self.sizes.max_step_tokens, width)

    @property
    def upload_rows(self) -> int:
        """Pages in one chunk of an upload."""
        return max(1, UPLOAD_BYTES // (self.geometry.page_numbers * self.sizes.dtype.itemsize))

    def pool(self) -> jax.ShapeDtypeStruct:
        c = self.config
        page = (self.sizes.page_size, 2, c.kv_heads, c.head_dim)
        return jax.ShapeDtypeStruct((self.pool_rows, *page), self.sizes.dtype)

    def slots(self) -> sampling.Slots:
        make = partial(sampling.new_slots, self.sizes.max_running, self.config.vocab_size)
        return jax.eval_shape(make)

    def weights(self) -> tuple[Weights, Any]:
        """The abstract weights, and the head's."""
        leaves: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, self.sizes.dtype)
            for name, shape in shapes(self.config).items()
        }
        return self.programs.weights(leaves), leaves[self.head]

    @property
    def head(self) -> str:
        return "embed" if self.config.tie_embeddings else "head"

    def jobs(self) -> dict[Hashable, Job]:
        """Every program by its key."""
        ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        c, dtype = self.config, self.sizes.dtype
        pages, slots, (_, head) = self.pool(), self.slots(), self.weights()
        acts = lambda n: jax.ShapeDtypeStruct((n, c.hidden), dtype)  # noqa: E731
        jobs: dict[Hashable, Job] = {}
        for bucket in self.buckets:
            jobs |= self.step_jobs(bucket)
        for n in {bucket.rows for bucket in self.buckets}:
            rows = (ints((size(sample_fields(n)),)), floats((6, n)))
            for sampler in SAMPLERS:
                arguments = (acts(n), head, slots, *rows)
                jobs["sample", n, sampler] = (
                    f"sample {n} {sampler}", partial(sample, sampler), (2,), arguments,
                )  # fmt: skip
        for n in {bucket.tokens for bucket in self.buckets}:
            positions = (ints((SCORE_ROWS,)), ints((SCORE_ROWS,)))
            jobs["score", n] = (f"score {n}", score, (), (acts(n), head, *positions))
        chunk = jax.ShapeDtypeStruct((self.upload_rows, self.geometry.page_numbers), dtype)
        jobs["write"] = ("write", write_pages, (0,), (pages, ints((self.upload_rows,)), chunk))
        bias = (ints((MAX_LOGIT_BIAS,)), floats((MAX_LOGIT_BIAS,)), ints((2 * MAX_STOP_IDS,)))
        new = (ints(()), ints((self.sizes.max_model_len,)), ints(()), ints(()), *bias)
        jobs["admit"] = ("admit", sampling.admit, (0,), (slots, *new))
        return jobs

    def step_jobs(self, bucket: Bucket) -> dict[Hashable, Job]:
        """A step in one program, or in three where `Kernels.one_program` says it does not pay."""
        p, name = self.programs, f"{bucket.tokens}x{bucket.rows}"
        packed = jax.ShapeDtypeStruct((size(int_fields(bucket, self.geometry)),), jnp.int32)
        (weights, _), work = self.weights(), self.work(bucket)
        pages, last_token = self.pool(), self.slots().last_token
        if self.kernels.one_program:
            arguments = (weights, pages, last_token, packed, work)
            return {bucket: (f"step {name}", partial(p.step, bucket), (1,), arguments)}
        begin = partial(p.begin, bucket)
        x, inputs = jax.eval_shape(begin, weights.embed, last_token, packed)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        layer = (weights.layers[0], x, pages, index, inputs, work)
        return {
            ("begin", bucket): (f"begin {name}", begin, (), (weights.embed, last_token, packed)),
            ("layer", bucket): (f"layer {name}", partial(p.layer, bucket), (2,), layer),
            ("finish", bucket): (f"finish {name}", p.finish, (), (weights.norm, x, inputs)),
        }

    def work(self, bucket: Bucket) -> lora.Work:
        """The abstract work lists of a bucket."""
        g, shape = self.geometry, self.programs.lora_shape(bucket)
        ints: Callable[..., Any] = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        floats: Callable[..., Any] = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        lists = (g.layers, len(MODULES))
        if isinstance(shape, BlockShape):
            n = block_items(bucket, g, shape) * shape.blocks
            return BlockWork(
                ints((*lists, n, 7)), floats((*lists, n)), ints(lists), ints(()), ints((g.pages,))
            )
        n = span_pairs(bucket, shape)
        return SegmentWork(
            ints((n, 8)), ints((1,)), ints((*lists, n, 3)), floats((*lists, n)), ints((g.pages,))
        )
