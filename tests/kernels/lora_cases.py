"""Pools, adapters and a float64 oracle for tests of LoRA kernels, and how each implementation runs.

The pool holds NaN wherever no factor lies, and so does every input row without an adapter: what
must not be read into a result shows at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.experimental.pallas  # its first import during a trace would make jit trace again
import jax.numpy as jnp
import numpy as np

from jslora.adapters.layout import PackedAdapter, pack, unpack
from jslora.adapters.peft import Adapter, Factors
from jslora.batch import Bucket, Geometry, Placement, Segment
from jslora.blocks import pack_blocks
from jslora.lora import apply_lora
from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.spans import pack_spans
from jslora.split import ONE_DEVICE, Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora import triton
from pallas_kernels.lora.api import Shape, Work, work_shape
from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.pieces import (
    RANK_BLOCK,
    first_scale,
    row_words,
    scale_groups,
    slack_pages,
)
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentShape, SegmentWork
from pallas_kernels.lora.tiles import INTERPRETED_PROGRAMS, expand_tiles, shrink_tiles
from pallas_kernels.paged_attention.cut import Cut


@dataclass(frozen=True)
class Setup:
    """A model, the pages that its adapters lie in on one device, how both are split and stored."""

    config: ModelConfig
    page_shape: tuple[int, int, int, int]
    pages: int
    split: Split = ONE_DEVICE
    storages: tuple[str, ...] = ("full",)
    composed: int = 1

    @property
    def page(self) -> int:
        return math.prod(self.page_shape)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.split.rows(self.config, module) for module in MODULES)

    @property
    def slack(self) -> int:
        return slack_pages(max(max(pair) for pair in self.rows), self.page)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            layers=self.config.layers, pages=self.pages, page_size=self.page_shape[0],
            page_numbers=self.page, slots=64,
            drop_page=self.config.layers * self.pages + self.slack,
            attention=Cut(query_tile=32, parts=0, span=0), rank_block=RANK_BLOCK,
            max_rank=MAX_RANK, row_lengths=self.rows,
            peers=tuple(self.split.peers(module) for module in MODULES),
            storages=self.storages, max_composed=self.composed,
        )  # fmt: skip


def setup(
    layers: int,
    hidden: int,
    heads: int,
    kv: int,
    dim: int,
    wide: int,
    pages: int,
    page_size: int = 16,
    split: Split = ONE_DEVICE,
    storages: tuple[str, ...] = ("full",),
) -> Setup:
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=8, hidden=hidden, layers=layers, heads=heads,
        kv_heads=kv, head_dim=dim, feed_forward=wide, max_positions=64,
    )  # fmt: skip
    return Setup(config, (page_size, 2, kv // split.devices, dim), pages, split, storages)


MAX_RANK = 256
TINY = setup(3, 64, 6, 1, 16, 80, pages=2048, page_size=8)
"""Rows of 16, 32, 64, 80 and 96 numbers in pages of 256: pieces of 16, 32 and 64."""
SMOLLM2_135M = setup(1, 576, 9, 3, 64, 1536, pages=128)
LLAMA3_8B = setup(1, 4096, 32, 8, 128, 14336, pages=128)
QWEN3_8B_OF_FOUR_DEVICES = setup(1, 4096, 8, 2, 128, 3072, pages=256)

Ranks = Mapping[tuple[int, str], int]


def everywhere(rank: int) -> Ranks:
    return {(layer, module): rank for layer in range(3) for module in MODULES}


@dataclass(eq=False)
class Pool:
    """A pool in which only what was placed is a number.

    `parts` are the devices' pools, and `rows` is the first one's.
    """

    dtype: np.dtype
    setup: Setup = TINY

    def __post_init__(self) -> None:
        rows = self.setup.config.layers * self.setup.pages + self.setup.slack
        shape = (self.setup.split.devices, rows, self.setup.page)
        self.parts = np.full(shape, np.nan, self.dtype)
        self.rows = self.parts[0]
        self.taken: set[int] = {0}
        self.random = np.random.default_rng(0)

    @property
    def geometry(self) -> Geometry:
        return replace(self.setup.geometry, word_bits=8 * self.dtype.itemsize)

    def place(
        self, ranks: Ranks, where: str = "bottom", storage: str = "full"
    ) -> tuple[Placement, Adapter]:
        """Lay a normal adapter into pages at an end of the pool, or anywhere."""
        return self.lay(self._draw(ranks), where, storage)

    def lay(self, adapter: Adapter, where: str, storage: str = "full") -> tuple[Placement, Adapter]:
        """Where an adapter lies, and the one that its numbers there make."""
        config, page, split = self.setup.config, self.setup.page, self.setup.split
        packed = pack(adapter, config, page, self.dtype, split, storage=storage)
        pages = self._choose(packed.n_pages, where)
        placement = Placement(
            f"{len(self.taken):05}", tuple(pages), packed.a_offset, packed.b_offset, packed.rank,
            packed.scale, storage,
        )  # fmt: skip
        blob = np.array(packed.blob).reshape(split.devices, config.layers, -1)
        for layer in range(config.layers):
            for place in self._factors(packed, layer):
                rows = layer * self.setup.pages + np.array(pages)[place // page]
                self.parts[:, rows, place % page] = blob[:, layer, place]
        self.taken.update(pages)
        if storage != "full":
            adapter = replace(adapter, factors=unpack(packed, config, split))
        return placement, adapter

    def _factors(self, packed: PackedAdapter, layer: int) -> Iterator[np.ndarray]:
        """Where a layer's words are that hold something, counted from the adapter's start."""
        storage, bits = packed.storage, 8 * self.dtype.itemsize
        for column, module in enumerate(MODULES):
            counts = np.array([1, self.setup.split.peers(module)]) * packed.rank[layer, column]
            firsts = packed.a_offset[layer, column], packed.b_offset[layer, column]
            for row, count, first in zip(self.setup.rows[column], counts, firsts, strict=True):
                yield first + np.arange(count * row_words(row, storage, bits))
                if storage != "full":
                    scale = first_scale(first, count, row, storage, bits, self.setup.page)
                    yield scale + np.arange(count * scale_groups(row, storage))

    def poison(self, placement: Placement, value: float, device: int = 0) -> None:
        for layer in range(self.setup.config.layers):
            self.parts[device, layer * self.setup.pages + np.array(placement.pages)] = value

    def _draw(self, ranks: Ranks) -> Adapter:
        factors = {}
        for (layer, module), rank in ranks.items():
            if layer < self.setup.config.layers:
                wide, out = self.setup.config.widths(module)
                a = self.random.normal(size=(rank, wide)) / wide**0.5
                b = self.random.normal(size=(out, rank)) / rank**0.5
                scale = np.float32(self.random.uniform(0.5, 2))
                factors[layer, module] = Factors(a.astype(self.dtype), b.astype(self.dtype), scale)
        return Adapter(factors=factors, digest="", base_model=None, bytes=0, warnings=())

    def _choose(self, n: int, where: str) -> list[int]:
        free = [page for page in range(self.setup.pages) if page not in self.taken]
        if where == "split":
            return [int(page) for page in self.random.choice(free, n, replace=False)]
        return free[:n] if where == "bottom" else free[-n:]


Part = tuple[Placement, Adapter, int, int]
"""An adapter and its tokens, first and one past the last."""


Streams = Sequence[np.ndarray | None]
"""Of every group, what its sums are added to where they are."""


def kernels(implementation: str) -> Kernels:
    return Kernels(implementation, "reference", "cpu")


def pack_work(
    implementation: str, pool: Pool, parts: Sequence[Part], bucket: Bucket
) -> tuple[Work, Shape]:
    """The work list of these segments in the form that the implementation walks."""
    g = pool.geometry
    shape = work_shape(
        bucket.tokens, MAX_RANK, kernels(implementation), prefill=bucket.prefill,
        peers=max(g.peers), storages=g.storages,
    )  # fmt: skip
    cut = [Segment(placement, start, end) for placement, _, start, end in parts]
    if isinstance(shape, BlockShape):
        return BlockWork(*pack_blocks(cut, bucket, g, shape)), shape
    if implementation == "triton":  # its interpreter takes milliseconds for each product
        shape = shape._replace(splits=min(shape.splits, 3))
    return SegmentWork(*pack_spans(cut, bucket, g, shape)), shape


SUMS = (Finish.SUM,) * 4
AS_IN_THE_MODEL = (Finish.SUM, Finish.RESIDUAL, Finish.GATED, Finish.RESIDUAL)


@cache
def compiled(
    implementation: str, setup: Setup, shape: Shape, finishes: tuple[Finish, ...]
) -> Callable:
    """All deltas of one layer: group by group, as the model adds them."""

    def layer_deltas(
        ys: list[jax.Array], xs: list[jax.Array], streams: list[jax.Array | None],
        pages: jax.Array, layer: jax.Array, work: Work,
    ) -> list[jax.Array]:  # fmt: skip
        add = partial(
            apply_lora, config=setup.config, shape=shape, kernels=kernels(implementation),
            pages=pages, first_page=layer * setup.pages, layer=layer, work=work,
        )  # fmt: skip
        return [
            add(y, x, group=group, finish=finish, stream=stream)
            for group, (y, x, finish, stream) in enumerate(
                zip(ys, xs, finishes, streams, strict=True)
            )
        ]

    return jax.jit(layer_deltas)


def interpret_triton(
    pool: Pool, xs: list[np.ndarray], ys: list[np.ndarray], layer: int, work: SegmentWork,
    shape: SegmentShape, finishes: tuple[Finish, ...], streams: Streams,
) -> list[np.ndarray]:  # fmt: skip
    """The same by the kernels in the Triton language, in Triton's interpreter."""
    found = []
    for group, (x, y, finish, stream) in enumerate(zip(xs, ys, finishes, streams, strict=True)):
        low = shrink_in_triton(pool, x, 0, group, layer, work, shape)
        found.append(expand_in_triton(pool, y, low, 0, group, layer, work, shape, finish, stream))
    return found


def shrink_in_triton(
    pool: Pool, x: np.ndarray, device: int, group: int, layer: int, work: SegmentWork,
    shape: SegmentShape,
) -> np.ndarray:  # fmt: skip
    """A device's low-rank products of a group."""
    from triton_numpy import launch

    from pallas_kernels.lora import triton_kernels

    page, n = pool.setup.page, INTERPRETED_PROGRAMS
    modules = tuple(MODULES.index(module) for module in GROUPS[group])
    low = np.full(triton.low_numbers(modules, shape), np.nan, np.float32)
    tiles = shrink_tiles(x.shape[1], page, shape, pool.dtype)
    launch(
        triton_kernels.shrink, (n,), np.array([layer * pool.setup.pages, layer], np.int32),
        work.pairs, work.total, work.table, work.page_list, pool.parts[device], x, low,
        **triton.shrink_constants(x.shape[1], page, pool.dtype, work, modules, shape, tiles, n),
    )  # fmt: skip
    return low


def expand_in_triton(
    pool: Pool, y: np.ndarray, low: np.ndarray, device: int, group: int, layer: int,
    work: SegmentWork, shape: SegmentShape, finish: Finish, stream: np.ndarray | None,
    first: int | None = None,
) -> np.ndarray:  # fmt: skip
    """A device's outputs of a group, from all products it needs; its columns begin at `first`."""
    from triton_numpy import launch

    from pallas_kernels.lora import triton_kernels

    page, n = pool.setup.page, INTERPRETED_PROGRAMS
    columns = [MODULES.index(module) for module in GROUPS[group]]
    widths = tuple(pool.setup.rows[column][1] for column in columns)
    tiles = expand_tiles(widths, page, shape, pool.dtype)
    constants = triton.expand_constants(
        widths, y.shape[1], page, pool.dtype, work, tuple(columns), shape, tiles, n
    )
    where = [layer * pool.setup.pages, layer]
    where += [] if first is None else [first // tiles.columns]
    lists = (
        np.array(where, np.int32), work.pairs, work.total, work.table, work.scale, work.page_list,
        pool.parts[device],
    )  # fmt: skip
    if finish is Finish.SUM:
        out = y.copy()
        launch(triton_kernels.expand, (n,), *lists, low, out, **constants)
        return out
    out = np.full((len(y), widths[0]), np.nan, pool.dtype) if stream is None else stream.copy()
    constants["FINISH"] = finish.value
    launch(triton_kernels.expand_into, (n,), *lists, low, y, out, **constants)
    return out


def draw_inputs(
    pool: Pool, bucket: Bucket, parts: Sequence[Part]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and base outputs of every group; inputs of tokens without an adapter are NaN."""
    random, widths = np.random.default_rng(1), pool.setup.config.widths
    mine, xs, ys = with_adapter(parts, bucket.tokens), [], []
    for group in GROUPS:
        x = random.normal(size=(bucket.tokens, widths(group[0])[0])).astype(pool.dtype)
        x[~mine] = np.nan
        xs.append(x)
        out = sum(widths(module)[1] for module in group)
        ys.append(random.normal(size=(bucket.tokens, out)).astype(np.float32))
    return xs, ys


def with_adapter(parts: Sequence[Part], tokens: int) -> np.ndarray:
    """Which tokens have one."""
    mine = np.zeros(tokens, bool)
    for _, _, start, end in parts:
        mine[start:end] = True
    return mine


def add_deltas(
    implementation: str, pool: Pool, xs: list[np.ndarray], ys: list[np.ndarray], layer: int,
    work: Work, shape: Shape, finishes: tuple[Finish, ...] = SUMS, streams: Streams = (None,) * 4,
) -> list[np.ndarray]:  # fmt: skip
    """The outputs of every group of a layer."""
    if implementation == "triton":
        return interpret_triton(pool, xs, ys, layer, work, shape, finishes, streams)
    pages = jnp.asarray(pool.rows.reshape(-1, *pool.setup.page_shape))
    add = compiled(implementation, pool.setup, shape, finishes)
    return [np.asarray(y) for y in add(ys, xs, list(streams), pages, jnp.int32(layer), work)]


def run(
    implementation: str, bucket: Bucket, pool: Pool, parts: Sequence[Part], layer: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(inputs, outputs before, outputs after) of every group of a layer."""
    xs, ys = draw_inputs(pool, bucket, parts)
    work, shape = pack_work(implementation, pool, parts, bucket)
    return xs, ys, add_deltas(implementation, pool, xs, ys, layer, work, shape)


def expected(
    pool: Pool, parts: Sequence[Part], layer: int, xs: list[np.ndarray], ys: list[np.ndarray]
) -> list[np.ndarray]:
    """The same straight off the definition, in float64."""
    result = []
    for group, x, y in zip(GROUPS, xs, ys, strict=True):
        after, column = y.astype(np.float64), 0
        for module in group:
            width = pool.setup.config.widths(module)[1]
            for _, adapter, start, end in parts:
                if (layer, module) in adapter.factors:
                    factors = adapter.factors[layer, module]
                    a, b = factors.a.astype(np.float64), factors.b.astype(np.float64)
                    low = x[start:end].astype(np.float64) @ a.T
                    delta = float(factors.scale) * low @ b.T
                    after[start:end, column : column + width] += delta
            column += width
        result.append(after)
    return result


def check(
    implementation: str, bucket: Bucket, pool: Pool, parts: Sequence[Part],
    layers: Sequence[int] = (0, 2), tolerance: float = 2e-5,
) -> None:  # fmt: skip
    """Tokens with an adapter are what the oracle says, and the others as before, bit by bit."""
    for layer in layers:
        xs, ys, found = run(implementation, bucket, pool, parts, layer)
        compare(parts, ys, expected(pool, parts, layer, xs, ys), found, tolerance)


def compare(
    parts: Sequence[Part], ys: list[np.ndarray], wanted: list[np.ndarray], found: list[np.ndarray],
    tolerance: float = 2e-5,
) -> None:  # fmt: skip
    for before, right, after in zip(ys, wanted, found, strict=True):
        np.testing.assert_allclose(after, right, atol=tolerance, rtol=tolerance)
        mine = with_adapter(parts, len(before))
        np.testing.assert_array_equal(after[~mine], before[~mine])
