"""Every program that a device compiles: its function, and the shapes it is compiled for.

Nothing here holds an array or asks for a device, so one list serves the start-up on the device at
hand and compiling ahead for a GPU that is not there (`scripts/check_gpu_build.py`).
"""

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jslora import sampling
from jslora.batch import SAMPLERS, Bucket, Geometry, Segment, int_fields, sample_fields, size
from jslora.blocks import block_fields, block_items, pack_blocks
from jslora.buckets import make_buckets
from jslora.calls import SCORE_ROWS
from jslora.model.config import MODULES, ModelConfig
from jslora.model.weights import abstract_weights
from jslora.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from jslora.sharding import EACH, POOL, WHOLE, Job, part_shape, weight_spec
from jslora.spans import pack_spans, span_pairs
from jslora.split import ONE_DEVICE, Split
from jslora.step import Programs, Weights, sample, score, write_pages
from pallas_kernels.launch import Kernels, choose
from pallas_kernels.lora import api as lora
from pallas_kernels.lora.pieces import RANK_BLOCK, slack_pages
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork
from pallas_kernels.paged_attention import api as attention
from pallas_kernels.paged_attention.reference import CHUNK_PAGES

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
    storages: tuple[str, ...] = ("full",)
    max_composed: int = 1
    quantize: str = "none"


def slack(config: ModelConfig, page_size: int, split: Split = ONE_DEVICE) -> int:
    """Pages behind the last layer that are only ever read past (see `slack_pages`)."""
    longest = max(max(split.rows(config, module)) for module in MODULES)
    return slack_pages(longest, split.page_numbers(config, page_size))


def choose_kernels(
    config: ModelConfig, page_size: int, wanted: str, platform: str, split: Split = ONE_DEVICE
) -> Kernels:
    """The kernels for a model's shapes on one device.

    Raises:
        NotImplementedError: one was asked for by name and cannot be had; says why.
    """
    rows = tuple(split.rows(config, module) for module in MODULES)
    page = split.page_numbers(config, page_size)
    checks = {
        "lora": partial(lora.check, rows=rows, page=page),
        "attention": partial(attention.check, head_dim=config.head_dim),
    }
    return choose(wanted, platform, checks)


@dataclass(frozen=True)
class Catalog:
    """The programs of one model on one device, or on each device of a mesh axis.

    Attributes:
        config: of the whole model; shapes here are one device's.
    """

    config: ModelConfig
    sizes: Sizes
    kernels: Kernels
    split: Split = ONE_DEVICE

    @cached_property
    def geometry(self) -> Geometry:
        """What the host must know to fill the programs' arrays."""
        c, sizes, split = self.config, self.sizes, self.split
        return Geometry(
            layers=c.layers,
            pages=sizes.pages,
            page_size=sizes.page_size,
            page_numbers=split.page_numbers(c, sizes.page_size),
            slots=sizes.max_running,
            drop_page=self.pool_rows,
            attention=attention.attention_cut(sizes.max_model_len, self.kernels),
            rank_block=RANK_BLOCK,
            max_rank=sizes.max_rank,
            max_composed=sizes.max_composed,
            row_lengths=tuple(split.rows(c, module) for module in MODULES),
            peers=tuple(split.peers(module) for module in MODULES),
            storages=sizes.storages,
            word_bits=8 * sizes.dtype.itemsize,
        )

    @property
    def pool_rows(self) -> int:
        behind = slack(self.config, self.sizes.page_size, self.split)
        return self.config.layers * self.sizes.pages + behind

    @cached_property
    def programs(self) -> Programs:
        return Programs(
            self.config, self.sizes.dtype, self.geometry, self.kernels, self.split,
            self.sizes.quantize,
        )  # fmt: skip

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
        kv_heads = self.split.local(self.config).kv_heads
        page = (self.sizes.page_size, 2, kv_heads, self.config.head_dim)
        return jax.ShapeDtypeStruct((self.pool_rows, *page), self.sizes.dtype)

    def slots(self) -> sampling.Slots:
        make = partial(sampling.new_slots, self.sizes.max_running, self.config.vocab_size)
        return jax.eval_shape(make)

    def weights(self) -> tuple[Weights, Any]:
        """The abstract weights, and the head's."""
        specs, devices = self.weight_specs, self.split.devices
        leaves: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(part_shape(leaf.shape, specs[name], devices), leaf.dtype)
            for name, leaf in self.leaves.items()
        }
        return self.programs.weights(leaves), leaves[self.head]

    @cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of the model, whole."""
        sizes = self.sizes
        return abstract_weights(self.config, sizes.dtype, sizes.quantize, self.split.devices)

    @cached_property
    def weight_specs(self) -> dict[str, PartitionSpec]:
        """How each of them is split."""
        vocabulary = self.split.splits_vocabulary(self.config)
        return {name: weight_spec(name, vocabulary=vocabulary) for name in self.leaves}

    @property
    def head(self) -> str:
        return "embed" if self.config.tie_embeddings else "head"

    def jobs(self) -> dict[Hashable, Job]:
        """Every program by its key."""
        jobs: dict[Hashable, Job] = {}
        for bucket in self.buckets:
            jobs |= self.step_jobs(bucket)
        for n in {bucket.rows for bucket in self.buckets}:
            jobs |= {("sample", n, sampler): self._sample_job(n, sampler) for sampler in SAMPLERS}
        for n in {bucket.tokens for bucket in self.buckets}:
            jobs["score", n] = self._score_job(n)
        return jobs | {"write": self._write_job(), "admit": self._admit_job()}

    def step_jobs(self, bucket: Bucket) -> dict[Hashable, Job]:
        """A step in one program, or in three where `Kernels.one_program` says it does not pay."""
        p, name = self.programs, f"{bucket.tokens}x{bucket.rows}"
        packed = _ints(size(int_fields(bucket, self.geometry)))
        (weights, _), work = self.weights(), self.work(bucket)
        specs = p.weights(self.weight_specs)
        pages, last_token = self.pool(), self.slots().last_token
        if self.kernels.one_program:
            arguments = (weights, pages, last_token, packed, work)
            given = (specs, POOL, WHOLE, WHOLE, WHOLE)
            step = partial(p.step, bucket)
            return {bucket: Job(f"step {name}", step, (1,), arguments, given, (POOL, WHOLE, WHOLE))}
        begin, first = partial(p.begin, bucket), (weights.embed, last_token, packed)
        x = jax.ShapeDtypeStruct((bucket.tokens, self.config.hidden), self.sizes.dtype)
        inputs = jax.eval_shape(partial(p.inputs, bucket), packed)
        layer = (weights.layers[0], x, pages, _ints(), inputs, work)
        lies = (specs.layers[0], WHOLE, POOL, WHOLE, WHOLE, WHOLE)
        last = (weights.norm, x, inputs)
        return {
            ("begin", bucket): Job(
                f"begin {name}", begin, (), first, (specs.embed, WHOLE, WHOLE), WHOLE
            ),
            ("layer", bucket): Job(
                f"layer {name}", partial(p.layer, bucket), (2,), layer, lies, (WHOLE, POOL)
            ),
            ("finish", bucket): Job(f"finish {name}", p.finish, (), last, (WHOLE,) * 3, WHOLE),
        }

    def _sample_job(self, rows: int, sampler: str) -> Job:
        numbers = (_ints(size(sample_fields(rows))), _floats(6, rows))
        arguments = (self._activations(rows), self.weights()[1], self.slots(), *numbers)
        given = (WHOLE, self.weight_specs[self.head], WHOLE, WHOLE, WHOLE)
        function = partial(sample, sampler, axis=self.programs.vocabulary_axis)
        return Job(f"sample {rows} {sampler}", function, (2,), arguments, given, WHOLE)

    def _score_job(self, tokens: int) -> Job:
        arguments = (
            self._activations(tokens), self.weights()[1], _ints(SCORE_ROWS), _ints(SCORE_ROWS),
        )  # fmt: skip
        given = (WHOLE, self.weight_specs[self.head], WHOLE, WHOLE)
        function = partial(score, axis=self.programs.vocabulary_axis)
        return Job(f"score {tokens}", function, (), arguments, given, WHOLE)

    def _write_job(self) -> Job:
        numbers = (1, self.upload_rows, self.geometry.page_numbers)
        chunk = jax.ShapeDtypeStruct(numbers, self.sizes.dtype)
        arguments = (self.pool(), _ints(self.upload_rows), chunk)
        return Job("write", write_pages, (0,), arguments, (POOL, WHOLE, EACH), POOL)

    def _admit_job(self) -> Job:
        bias = (_ints(MAX_LOGIT_BIAS), _floats(MAX_LOGIT_BIAS), _ints(2 * MAX_STOP_IDS))
        new = (_ints(), _ints(self.sizes.max_model_len), _ints(), _ints(), *bias)
        arguments = (self.slots(), *new)
        return Job("admit", sampling.admit, (0,), arguments, (WHOLE,) * len(arguments), WHOLE)

    def _activations(self, rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, self.config.hidden), self.sizes.dtype)

    def work(self, bucket: Bucket) -> lora.Work:
        """The abstract work lists of a bucket."""
        g, shape = self.geometry, self.programs.lora_shape(bucket)
        lists = (g.layers, len(MODULES))
        if isinstance(shape, BlockShape):
            n = block_items(bucket, g, shape) * shape.blocks
            return BlockWork(
                _ints(*lists, n, block_fields(g)), _floats(*lists, n), _ints(*lists), _ints(),
                _ints(g.pages),
            )  # fmt: skip
        n = span_pairs(bucket, shape, g.max_composed)
        return SegmentWork(
            _ints(n, 8), _ints(1), _ints(*lists, n, 3), _floats(*lists, n), _ints(g.pages)
        )

    def pack_work(self, parts: Seq[Segment], bucket: Bucket) -> tuple[np.ndarray, ...]:
        """The work lists of a step with these segments, as `work` says."""
        shape = self.programs.lora_shape(bucket)
        if isinstance(shape, BlockShape):
            return tuple(pack_blocks(parts, bucket, self.geometry, shape))
        return tuple(pack_spans(parts, bucket, self.geometry, shape))


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
