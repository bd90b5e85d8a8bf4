"""What is measured: the model, sizes of the sweeps, and adapter mixes with their work lists.

A mix is a number of adapters whose ranks take turns; the rows of a batch are shared out among them
in runs, as the engine sorts them. Adapters lie in the pool as `jslora.adapters.layout` lays them
out, which needs libraries that a bare GPU machine may lack; a test holds the two to be equal.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jslora.aot.cases import MODELS
from jslora.batch import Bucket, Placement, RowPlan, Segment, StepRows, int_fields, pack_step, views
from jslora.bench import floor
from jslora.model.config import GROUPS, MODULES, ModelConfig, from_hf
from jslora.programs import Catalog, Sizes, slack
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Work
from pallas_kernels.lora.pieces import factor_end, row_piece
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork
from pallas_kernels.paged_attention.rows import Rows

LLAMA3_8B = from_hf(MODELS["llama3-8b"])
TINY_MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=64, hidden=64, layers=2, heads=4, kv_heads=2,
    head_dim=16, feed_forward=128, max_positions=64,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """So many adapters, with these ranks in turn, in all seven modules."""

    adapters: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = f"{min(self.ranks)}-{max(self.ranks)}" if len(self.ranks) > 1 else self.ranks[0]
        return f"{self.adapters} x {ranks}"

    def of(self) -> list[floor.Adapter]:
        ranks = [self.ranks[i % len(self.ranks)] for i in range(self.adapters)]
        return [floor.uniform(f"a{i}", rank) for i, rank in enumerate(ranks)]

    def rows(self, batch: int, context: int) -> list[floor.Row]:
        """A decode batch of this mix; without adapters, of the base model."""
        adapters = self.of()
        return [
            floor.Row(context, adapter=adapters[b * self.adapters // batch] if adapters else None)
            for b in range(batch)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of everything that is measured, in the order of importance.

    Attributes:
        step_mixes: the first is the one that is profiled.
        baseline_points: those with the most work come last, for the time that a point takes is
            only known of those before it.
        chain: layers that one timed call walks.
        cold_bytes: distinct bytes that calls walk before the first are read again, several times
            what the device's caches hold.
        pool_bytes: of the pool that kernels are timed over.
        wide_numbers: of the pool whose far end correctness is checked at.
        wide_rank: highest rank that correctness is checked with.
    """

    model: ModelConfig = LLAMA3_8B
    dtype: str = "bfloat16"
    page_size: int = 16
    max_model_len: int = 8192
    batches: tuple[int, ...] = (64, 8, 256, 32, 1, 128)
    adapters: tuple[int, ...] = (8, 32, 128, 1)
    ranks: tuple[tuple[int, ...], ...] = ((16,), (8, 16, 32, 64), (64,), (8,))
    contexts: tuple[int, ...] = (1024, 4096, 128, 8192)
    step_rows: int = 64
    step_context: int = 1024
    step_mixes: tuple[Mix, ...] = (
        Mix(8, (16,)), Mix(32, (16,)), Mix(1, (16,)), Mix(64, (16,)), Mix(32, (8, 16, 32, 64)),
        Mix(32, (8,)), Mix(32, (32,)), Mix(32, (64,)),
    )  # fmt: skip
    baseline_points: tuple[tuple[int, Mix], ...] = (
        (64, Mix(8, (16,))), (64, Mix(32, (16,))), (64, Mix(1, (16,))), (8, Mix(8, (16,))),
        (256, Mix(8, (16,))), (8, Mix(1, (8,))), (64, Mix(64, (16,))),
        (64, Mix(32, (8, 16, 32, 64))), (64, Mix(32, (64,))), (256, Mix(128, (16,))),
        (256, Mix(32, (64,))), (256, Mix(128, (8, 16, 32, 64))),
    )  # fmt: skip
    chain: int = 8
    cold_bytes: int = 250 * 10**6
    pool_bytes: int = 12 * 2**30
    wide_numbers: int = 2**31 + 2**28
    wide_rank: int = 256
    copy_bytes: int = 2 * 2**30
    product: int = 8192
    rounds: int = 7
    sample_seconds: float = 0.03

    @property
    def item(self) -> np.dtype:
        return np.dtype(jnp.dtype(self.dtype))

    @property
    def max_rank(self) -> int:
        return max(max(ranks) for ranks in self.ranks)

    @property
    def page_numbers(self) -> int:
        return self.page_size * 2 * self.model.kv_heads * self.model.head_dim

    def sizes(self, pages: int, rows: int) -> Sizes:
        """For decode batches of up to `rows`; a mixed bucket is listed, and never compiled."""
        return Sizes(
            pages=pages, page_size=self.page_size, max_running=rows, max_step_tokens=rows,
            max_model_len=self.max_model_len, max_rank=self.max_rank,
            dtype=jnp.dtype(self.dtype),
        )  # fmt: skip


FULL = Plan()
TINY = Plan(
    model=TINY_MODEL, dtype="float32", page_size=8, max_model_len=64, batches=(8, 1),
    adapters=(2, 1), ranks=((4,), (2, 8)), contexts=(20, 64), step_rows=8, step_context=30,
    step_mixes=(Mix(2, (4,)), Mix(2, (2, 8)), Mix(2, (2,)), Mix(2, (8,))),
    baseline_points=((8, Mix(4, (4,))), (8, Mix(2, (2, 8)))), chain=2,
    cold_bytes=2**16, pool_bytes=2**20, wide_numbers=2**19, wide_rank=64, copy_bytes=2**16,
    product=64, rounds=2, sample_seconds=0.001,
)  # fmt: skip
"""For machines without a GPU: everything runs, and the figures mean nothing."""


# Adapters ----------------------------------------------------------------------------------------


def place(
    model: ModelConfig, adapter: floor.Adapter, page_numbers: int, pages: Seq[int], scale: float,
    storage: str = "full", word_bits: int = 16,
) -> Placement:  # fmt: skip
    """Where an adapter lies when its pages are the first of `pages` that it needs."""
    a, b, end = offsets(model, adapter.ranks, page_numbers, storage, word_bits)
    needed = -(-end // page_numbers)
    assert len(pages) >= needed, f"{adapter.name} needs {needed} pages, there are {len(pages)}"
    every = (model.layers, len(MODULES))
    return Placement(
        digest=adapter.name,
        pages=tuple(int(page) for page in pages[:needed]),
        a_offset=np.broadcast_to(np.array(a, np.int32), every),
        b_offset=np.broadcast_to(np.array(b, np.int32), every),
        rank=np.broadcast_to(np.array(adapter.ranks, np.int32), every),
        scale=np.full(every, scale, np.float32),
        storage=storage,
    )


def offsets(
    model: ModelConfig, ranks: Seq[int], page_numbers: int, storage: str = "full",
    word_bits: int = 16,
) -> tuple[list[int], list[int], int]:  # fmt: skip
    """First words of each module's A and B in a layer, and the end of the last factor."""
    found = [0] * len(MODULES), [0] * len(MODULES)
    end = 0
    for group in GROUPS:
        for side in (0, 1):
            for module in group:
                i, row = MODULES.index(module), model.widths(module)[side]
                if ranks[i]:
                    width = row_piece(row, storage, word_bits, page_numbers)
                    first = found[side][i] = -(-end // width) * width
                    end = factor_end(first, ranks[i], row, storage, word_bits, page_numbers)
    return *found, end


def place_mix(
    model: ModelConfig, mix: Mix, page_numbers: int, scale: float, first: int = 0
) -> list[Placement]:
    """One behind the other, from a page on."""
    placed = []
    for adapter in mix.of():
        _, _, end = offsets(model, adapter.ranks, page_numbers)
        pages = range(first, first + -(-end // page_numbers))
        placed.append(place(model, adapter, page_numbers, pages, scale))
        first = pages.stop
    return placed


def share_out(placed: Seq[Placement], batch: int) -> list[Segment]:
    """Rows of a decode batch among adapters, in runs."""
    bounds = [-(-i * batch // len(placed)) for i in range(len(placed) + 1)] if placed else []
    return [
        Segment(placement, start, end)
        for placement, start, end in zip(placed, bounds, bounds[1:], strict=False)
        if start < end
    ]


def mix_pages(plan: Plan, mix: Mix) -> int:
    """Pages that a mix takes."""
    return place_mix(plan.model, mix, plan.page_numbers, 1.0)[-1].pages[-1] + 1


# Arrays ------------------------------------------------------------------------------------------


def one_layer(plan: Plan, pages: int, rows: int, kernels: Kernels) -> Catalog:
    """Programs over a pool of one layer."""
    return Catalog(replace(plan.model, layers=1), plan.sizes(pages, rows), kernels)


def pack_work(parts: Seq[Segment], bucket: Bucket, catalog: Catalog) -> Work:
    """The LoRA work lists on the device, in the form that the chosen kernel walks."""
    lists = jax.device_put(catalog.pack_work(parts, bucket))
    blocks = isinstance(catalog.programs.lora_shape(bucket), BlockShape)
    return BlockWork(*lists) if blocks else SegmentWork(*lists)


def pack_rows(plans: Seq[RowPlan], bucket: Bucket, catalog: Catalog) -> Rows:
    """What attention walks, on the device."""
    packed = pack_step(StepRows.of(plans), bucket, catalog.geometry)
    at = views(packed, int_fields(bucket, catalog.geometry))
    fields = ("block_table", "context", "start", "length", "parts", "items", "item_count")
    return Rows(*jax.device_put(tuple(at[name] for name in fields)))


def random_pool(pages: int, catalog: Catalog, seed: int = 0) -> Float[Array, "pages S 2 K D"]:
    """A pool of normal numbers; a block of them repeats, far apart.

    Nothing is timed on zeros: a device moves and multiplies them faster.
    """
    page = catalog.pool().shape[1:]
    drawn = min(pages, 4096)

    @jax.jit
    def make() -> jax.Array:
        block = jax.random.normal(jax.random.key(seed), (drawn, *page), catalog.sizes.dtype)
        return jnp.tile(block, (-(-pages // drawn), 1, 1, 1, 1))[:pages]

    return make()


def pool_pages(plan: Plan) -> int:
    """Pages of the pool that kernels are timed over."""
    return plan.pool_bytes // (plan.page_numbers * plan.item.itemsize)


@dataclass(frozen=True, slots=True)
class Regions:
    """Stretches of a pool that calls walk in turn, so that none finds its bytes in a cache."""

    pages: int
    count: int

    @staticmethod
    def of(pages: int, plan: Plan, pool_pages: int) -> "Regions":
        """As many stretches of `pages` as are cold when the first comes again, if they fit."""
        cold = -(-plan.cold_bytes // (pages * plan.page_numbers * plan.item.itemsize))
        room = pool_pages - slack(plan.model, plan.page_size)
        return Regions(pages, max(1, min(room // pages, max(cold, plan.chain))))

    def firsts(self, chain: int) -> list[jax.Array]:
        """First pages of the layers of each call, int32 [chain], until all were walked."""
        calls = -(-self.count // chain)
        at = np.arange(calls * chain).reshape(calls, chain) % self.count * self.pages
        return [jnp.asarray(row, jnp.int32) for row in at]


def decode_bucket(catalog: Catalog, batch: int) -> Bucket:
    """The bucket that a decode batch runs in."""
    return min(bucket for bucket in catalog.buckets if not bucket.prefill and bucket.rows >= batch)
