"""LoRA from pages of the pool against a float64 oracle.

The pool holds NaN wherever no factor lies, and so does every input row without an adapter: what
must not be read into a result shows at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.adapters.layout import pack
from jslora.adapters.peft import Adapter, Factors
from jslora.batch import Bucket, Geometry, Placement, Segment, pack_lora
from jslora.lora import apply_lora
from jslora.model.config import GROUPS, MODULES, ModelConfig
from pallas_kernels.lora import RANK_BLOCK, Work, slack_pages, work_shape

# Rows of 16, 32, 64, 80 and 96 numbers in pages of 256: pieces of 16, 32 and 64.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=8, hidden=64, layers=3, heads=6, kv_heads=1,
    head_dim=16, feed_forward=80, max_positions=64,
)  # fmt: skip
PAGE_SHAPE = (8, 2, 1, 16)
PAGE = 256
PAGES = 2048
SLACK = slack_pages(max(max(MODEL.widths(module)) for module in MODULES), PAGE)
GEOMETRY = Geometry(
    layers=MODEL.layers, pages=PAGES, page_size=8, page_numbers=PAGE, slots=64,
    drop_page=MODEL.layers * PAGES + SLACK, query_tile=32, rank_block=RANK_BLOCK, max_rank=256,
    row_lengths=tuple(MODEL.widths(module) for module in MODULES),
)  # fmt: skip
DECODE, WIDE_DECODE, PREFILL = Bucket(8, 8, 8), Bucket(64, 64, 8), Bucket(64, 8, 8)

Ranks = Mapping[tuple[int, str], int]


def everywhere(rank: int) -> Ranks:
    return {(layer, module): rank for layer in range(MODEL.layers) for module in MODULES}


@dataclass(eq=False)
class Pool:
    """A pool in which only what was placed is a number."""

    dtype: np.dtype

    def __post_init__(self) -> None:
        self.rows = np.full((MODEL.layers * PAGES + SLACK, PAGE), np.nan, self.dtype)
        self.taken: set[int] = {0}
        self.random = np.random.default_rng(0)

    def place(self, ranks: Ranks, where: str = "bottom") -> tuple[Placement, Adapter]:
        """Lay a normal adapter into pages at an end of the pool, or anywhere."""
        adapter = self._draw(ranks)
        packed = pack(adapter, MODEL, PAGE, self.dtype)
        pages = self._choose(packed.n_pages, where)
        blob = np.array(packed.blob).reshape(MODEL.layers, -1)
        for layer in range(MODEL.layers):
            for column, rank in enumerate(packed.rank[layer]):
                for offset, row in zip(
                    (packed.a_offset, packed.b_offset), MODEL.widths(MODULES[column]), strict=True
                ):
                    first = offset[layer, column]
                    used = blob[layer, first : first + rank * row]
                    place = np.arange(first, first + rank * row)
                    rows = layer * PAGES + np.array(pages)[place // PAGE]
                    self.rows[rows, place % PAGE] = used
        placement = Placement(
            f"{len(self.taken):05}", tuple(pages), packed.a_offset, packed.b_offset, packed.rank,
            packed.scale,
        )  # fmt: skip
        self.taken.update(pages)
        return placement, adapter

    def poison(self, placement: Placement, value: float) -> None:
        for layer in range(MODEL.layers):
            self.rows[layer * PAGES + np.array(placement.pages)] = value

    def _draw(self, ranks: Ranks) -> Adapter:
        factors = {}
        for (layer, module), rank in ranks.items():
            wide, out = MODEL.widths(module)
            a = self.random.normal(size=(rank, wide)) / wide**0.5
            b = self.random.normal(size=(out, rank)) / rank**0.5
            scale = np.float32(self.random.uniform(0.5, 2))
            factors[layer, module] = Factors(a.astype(self.dtype), b.astype(self.dtype), scale)
        return Adapter(factors=factors, digest="", base_model=None, bytes=0, warnings=())

    def _choose(self, n: int, where: str) -> list[int]:
        free = [page for page in range(PAGES) if page not in self.taken]
        if where == "split":
            return [int(page) for page in self.random.choice(free, n, replace=False)]
        return free[:n] if where == "bottom" else free[-n:]


Part = tuple[Placement, Adapter, int, int]
"""An adapter and its tokens, first and one past the last."""


@cache
def compiled(bucket: Bucket) -> Callable:
    """All deltas of one layer: group by group, as the model adds them."""
    shape = work_shape(bucket.tokens, prefill=bucket.prefill)

    def layer_deltas(
        ys: list[jax.Array], xs: list[jax.Array], pages: jax.Array, layer: jax.Array, work: Work
    ) -> list[jax.Array]:
        add = partial(
            apply_lora, config=MODEL, shape=shape, pages=pages, first_page=layer * PAGES,
            layer=layer, work=work,
        )  # fmt: skip
        return [add(ys[group], xs[group], group=group) for group in range(len(GROUPS))]

    return jax.jit(layer_deltas)


def run(
    bucket: Bucket, pool: Pool, parts: Sequence[Part], layer: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(inputs, outputs before, outputs after) of every group of a layer."""
    random = np.random.default_rng(1)
    mine = np.zeros(bucket.tokens, bool)
    for _, _, start, end in parts:
        mine[start:end] = True
    xs, ys = [], []
    for group in GROUPS:
        x = random.normal(size=(bucket.tokens, MODEL.widths(group[0])[0])).astype(pool.dtype)
        x[~mine] = np.nan
        xs.append(x)
        out = sum(MODEL.widths(module)[1] for module in group)
        ys.append(random.normal(size=(bucket.tokens, out)).astype(np.float32))
    cut = work_shape(bucket.tokens, prefill=bucket.prefill)
    segments = [Segment(placement, start, end) for placement, _, start, end in parts]
    work = Work(*pack_lora(segments, bucket, GEOMETRY, cut))
    pages = jnp.asarray(pool.rows.reshape(-1, *PAGE_SHAPE))
    found = compiled(bucket)(ys, xs, pages, jnp.int32(layer), work)
    return xs, ys, [np.asarray(y) for y in found]


def expected(
    bucket: Bucket, parts: Sequence[Part], layer: int, xs: list[np.ndarray], ys: list[np.ndarray]
) -> list[np.ndarray]:
    """The same straight off the definition, in float64."""
    result = []
    for group, x, y in zip(GROUPS, xs, ys, strict=True):
        after, column = y.astype(np.float64), 0
        for module in group:
            width = MODEL.widths(module)[1]
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
    bucket: Bucket, pool: Pool, parts: Sequence[Part], layers: Sequence[int] = (0, 2),
    tolerance: float = 2e-5,
) -> None:  # fmt: skip
    for layer in layers:
        xs, ys, found = run(bucket, pool, parts, layer)
        for before, wanted, after in zip(
            ys, expected(bucket, parts, layer, xs, ys), found, strict=True
        ):
            np.testing.assert_allclose(after, wanted, atol=tolerance, rtol=tolerance)
            touched = np.zeros(bucket.tokens, bool)
            for _, _, start, end in parts:
                touched[start:end] = True
            np.testing.assert_array_equal(after[~touched], before[~touched])


F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 16, 64, 255, 256])
def test_one_adapter_of_any_rank(rank: int) -> None:
    pool = Pool(F32)
    check(DECODE, pool, [(*pool.place(everywhere(rank)), 0, 8)])


def test_no_adapter_changes_nothing() -> None:
    pool = Pool(F32)
    pool.place(everywhere(8))
    check(DECODE, pool, [])


def test_every_row_its_own_adapter() -> None:
    pool = Pool(F32)
    ranks = (1, 8, 16, 3, 64, 12, 33, 2)
    check(DECODE, pool, [(*pool.place(everywhere(rank)), t, t + 1) for t, rank in enumerate(ranks)])


def test_sixty_four_adapters_at_once() -> None:
    pool = Pool(F32)
    parts = [(*pool.place(everywhere((4, 8, 1)[t % 3])), t, t + 1) for t in range(64)]
    check(WIDE_DECODE, pool, parts)


def test_adapters_at_both_ends_of_the_pool() -> None:
    pool = Pool(F32)
    low, high = pool.place(everywhere(5), "bottom"), pool.place(everywhere(5), "top")
    assert low[0].pages[0] == 1 and high[0].pages[-1] == PAGES - 1
    check(DECODE, pool, [(*low, 0, 3), (*high, 4, 8)])


def test_pages_that_do_not_follow_each_other() -> None:
    pool = Pool(F32)
    whole, split = pool.place(everywhere(9), "top"), pool.place(everywhere(12), "split")
    assert whole[0].is_run and not split[0].is_run
    check(DECODE, pool, [(*split, 1, 4), (*whole, 4, 7)])


def test_layers_and_modules_with_ranks_of_their_own() -> None:
    """Targets that one adapter has in a layer and another has not; one layer without any."""
    pool = Pool(F32)
    mixed = {(0, "q_proj"): 3, (0, "v_proj"): 17, (0, "down_proj"): 8, (2, "o_proj"): 40}
    other = {(0, "k_proj"): 5, (2, "q_proj"): 9, (2, "up_proj"): 1}
    parts = [(*pool.place(mixed), 0, 2), (*pool.place(other), 2, 5), (*pool.place(mixed), 5, 8)]
    check(DECODE, pool, parts, layers=(0, 1, 2))


def test_segments_that_cross_tiles() -> None:
    pool = Pool(F32)
    parts = [(*pool.place(everywhere(16)), 3, 50), (*pool.place(everywhere(40)), 50, 51),
             (*pool.place(everywhere(1)), 52, 64)]  # fmt: skip
    check(PREFILL, pool, parts)


def test_one_adapter_in_two_segments() -> None:
    pool = Pool(F32)
    twice = pool.place(everywhere(6))
    check(PREFILL, pool, [(*twice, 0, 5), (*pool.place(everywhere(4)), 5, 9), (*twice, 9, 40)])


def test_the_largest_work_there_can_be_fits() -> None:
    """Each of the step's rows has an adapter of the highest rank, and they cross tiles."""
    pool = Pool(F32)
    big = [pool.place({(0, "q_proj"): 256, (0, "k_proj"): 256}) for _ in range(8)]
    ends = [1, 2, 3, 31, 33, 34, 63, 64]
    parts = [(*one, start, end) for one, start, end in zip(big, [0, *ends], ends, strict=False)]
    check(PREFILL, pool, parts, layers=(0,), tolerance=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["bottom", "split"])
@pytest.mark.parametrize("bucket", [DECODE, PREFILL])
def test_a_poisoned_adapter_reaches_no_row_but_its_own(
    bucket: Bucket, where: str, value: float
) -> None:
    pool = Pool(F32)
    clean, bad, last = (pool.place(everywhere(rank), where) for rank in (8, 16, 5))
    pool.poison(bad[0], value)
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    assert not np.isfinite(only_bad_rows(bucket, pool, parts)).any(), "it is not hidden either"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_b_reaches_no_row_but_its_own(value: float) -> None:
    pool = Pool(F32)
    clean, bad, last = (pool.place(everywhere(rank)) for rank in (8, 16, 5))
    first = bad[0].b_offset[2, 0] + 3 * 96 + 7  # of q_proj: rank 3, column 7
    pool.rows[2 * PAGES + bad[0].pages[first // PAGE], first % PAGE] = value
    parts = [(*clean, 0, 2), (*bad, 2, 4), (*last, 4, 8)]
    after = only_bad_rows(DECODE, pool, parts)
    assert not np.isfinite(after[:, 7]).any()
    assert np.isfinite(after[:, 96:]).all(), "the other modules' columns"


def only_bad_rows(bucket: Bucket, pool: Pool, parts: list[Part]) -> np.ndarray:
    """What layer 2 makes of tokens 2 and 3, once all other tokens are seen to be right."""
    xs, ys, found = run(bucket, pool, parts, layer=2)
    wanted = expected(bucket, [parts[0], parts[2]], 2, xs, ys)
    others = np.r_[0:2, 4 : bucket.tokens]
    for after, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(after[others], right[others], atol=2e-5, rtol=2e-5)
    return found[0][2:4]


def test_bfloat16() -> None:
    pool = Pool(BF16)
    parts = [(*pool.place(everywhere(16), "top"), 0, 4), (*pool.place(everywhere(3)), 5, 8)]
    check(DECODE, pool, parts, tolerance=3e-2)


@st.composite
def mixes(draw: Callable) -> tuple[Bucket, list[tuple[Ranks, str]], list[tuple[int, int, int]]]:
    """A bucket, adapters with a place each, and segments (adapter, start, end)."""
    bucket = draw(st.sampled_from([DECODE, PREFILL]))
    ranks = st.dictionaries(
        st.tuples(st.sampled_from([0, 2]), st.sampled_from(MODULES)), st.integers(1, 40), min_size=1
    )
    place = st.sampled_from(["bottom", "top", "split"])
    adapters = draw(st.lists(st.tuples(ranks, place), min_size=1, max_size=4))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=2, max_size=9)))
    chosen = draw(
        st.lists(
            st.none() | st.integers(0, len(adapters) - 1),
            min_size=len(cuts) - 1,
            max_size=len(cuts) - 1,
        )
    )
    spans = zip(chosen, cuts, cuts[1:], strict=False)
    return bucket, adapters, [(n, start, end) for n, start, end in spans if n is not None]


@settings(max_examples=100, deadline=None)
@given(mixes())
def test_any_mix(mix: tuple) -> None:
    bucket, adapters, spans = mix
    pool = Pool(F32)
    placed = [pool.place(ranks, where) for ranks, where in adapters]
    check(bucket, pool, [(*placed[n], start, end) for n, start, end in spans])
