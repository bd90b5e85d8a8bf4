"""What is packed for the device against slow and direct constructions of the same."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import (
    SAMPLE_FLOATS,
    Bucket,
    Geometry,
    LoraArrays,
    Placement,
    RowPlan,
    Segment,
    int_fields,
    pack_lora,
    pack_sampling,
    pack_step,
    sample_fields,
    segments,
    size,
    views,
)  # fmt: skip
from pallas_kernels.lora import Block, Shape, work_shape

GEOMETRY = Geometry(
    layers=2, pages=900, page_size=4, page_numbers=64, slots=12, drop_page=1810, query_tile=4,
    rank_block=8, max_rank=40,
    row_lengths=((48, 64), (48, 16), (48, 16), (64, 48), (48, 80), (48, 80), (80, 48)),
)  # fmt: skip
MIXED = Bucket(24, 8, 8)
DECODE = Bucket(8, 8, 8)


@st.composite
def plans(draw: Callable, bucket: Bucket = MIXED) -> list[RowPlan]:
    """Rows that fit into a bucket."""
    slots = draw(st.permutations(range(GEOMETRY.slots)))
    pages = draw(st.permutations(range(1, 100)))
    rows, left, used = [], bucket.tokens, 0
    for slot in slots[: draw(st.integers(0, bucket.rows))]:
        length = draw(st.integers(1, min(left, 10))) if left else 0
        if length == 0:
            break
        position = draw(st.integers(0, bucket.pages * 4 - length))
        held = -(-(position + length) // 4)
        fed = draw(st.booleans())
        known = length - fed
        rows.append(
            RowPlan(
                tokens=draw(st.lists(st.integers(0, 999), min_size=known, max_size=known)),
                fed=fed,
                position=position,
                pages=[pages[(used + i) % len(pages)] for i in range(held)],
                slot=slot,
                samples=draw(st.booleans()),
                seed=draw(st.integers(0, 2**64 - 1)),
                temperature=draw(st.sampled_from([0.0, 0.5])),
                top_k=draw(st.integers(0, 9)),
                top_p=draw(st.sampled_from([1.0, 0.25])),
                min_p=draw(st.sampled_from([0.0, 0.125])),
                repetition=draw(st.sampled_from([1.0, 1.5])),
                presence=draw(st.sampled_from([0.0, -1.0])),
                frequency=draw(st.sampled_from([0.0, 2.0])),
                hold_stop=draw(st.booleans()),
                stateful=draw(st.booleans()),
            )
        )
        left, used = left - length, used + held
    return rows


# The step ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans())
def test_every_token_and_row_is_packed_where_it_belongs(rows: list[RowPlan]) -> None:
    at = views(pack_step(rows, MIXED, GEOMETRY), int_fields(MIXED, GEOMETRY))
    t = 0
    for b, row in enumerate(rows):
        assert (at["start"][b], at["length"][b]) == (t, row.length)
        assert (at["last"][b], at["context"][b]) == (t + row.length - 1, row.position + row.length)
        assert at["block_table"][b].tolist() == [*row.pages, *[0] * (8 - len(row.pages))]
        for i in range(row.length):
            position = row.position + i
            assert at["position"][t] == position
            assert at["write_page"][t] == row.pages[position // 4]
            assert at["write_offset"][t] == position % 4
            if i < len(row.tokens):
                assert (at["token"][t], at["fed_slot"][t]) == (row.tokens[i], GEOMETRY.slots)
            else:
                assert row.fed and at["fed_slot"][t] == row.slot
            t += 1
    assert (at["fed_slot"][t:] == GEOMETRY.slots).all(), "padding is fed from no slot"
    assert (at["write_page"][t:] == GEOMETRY.drop_page).all(), "padding is written nowhere"
    for name in ("length", "context"):
        assert not at[name][len(rows) :].any()
    assert not at["block_table"][len(rows) :].any(), "padding reads the null page"


@settings(deadline=None)
@given(plans())
def test_tiles_cover_the_rows_of_several_tokens_once(rows: list[RowPlan]) -> None:
    at = views(pack_step(rows, MIXED, GEOMETRY), int_fields(MIXED, GEOMETRY))
    covered = Counter()
    for u in range(at["tiles"][0]):
        row, first, n = at["tile_row"][u], at["tile_start"][u], at["tile_length"][u]
        assert 1 <= n <= GEOMETRY.query_tile
        assert (first - at["start"][row]) % GEOMETRY.query_tile == 0
        covered.update((int(row), int(token)) for token in range(first, first + n))
    t, expected = 0, Counter()
    for b, row in enumerate(rows):
        if row.length > 1:
            expected.update((b, token) for token in range(t, t + row.length))
        t += row.length
    assert covered == expected


def test_the_most_tiles_a_step_can_have_fit() -> None:
    row = RowPlan([1, 2], False, 0, [1], 0, False)
    rows = [replace(row, tokens=[1] * n, pages=[1, 2, 3]) for n in (2, 2, 2, 2, 2, 2, 2, 10)]
    at = views(pack_step(rows, MIXED, GEOMETRY), int_fields(MIXED, GEOMETRY))
    assert at["tiles"][0] == 10 <= GEOMETRY.tiles(MIXED)


def test_a_step_larger_than_its_bucket_is_an_error() -> None:
    row = RowPlan([5], False, 0, [1], 0, False)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        pack_step([row] * 9, DECODE, GEOMETRY)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        pack_step([replace(row, tokens=[5] * 4)] * 7, MIXED, GEOMETRY)


def test_packed_arrays_are_fresh() -> None:
    row = RowPlan([5], False, 0, [1], 0, True)
    first, second = (pack_step([row], DECODE, GEOMETRY) for _ in range(2))
    assert not np.shares_memory(first, second)
    pairs = zip(pack_sampling([row], 8, 12), pack_sampling([row], 8, 12), strict=True)
    assert not any(np.shares_memory(one, other) for one, other in pairs)


def test_views_share_the_packed_array_without_overlap() -> None:
    fields = int_fields(MIXED, GEOMETRY)
    packed = np.arange(size(fields), dtype=np.int32)
    found = views(packed, fields)
    assert {name: view.shape for name, view in found.items()} == fields
    everything = np.concatenate([view.reshape(-1) for view in found.values()])
    np.testing.assert_array_equal(everything, packed)
    with pytest.raises(AssertionError, match="packed array of"):
        views(np.append(packed, 0), fields)


# Sampling ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans())
def test_rows_that_sample_are_packed_and_no_others(rows: list[RowPlan]) -> None:
    ints, floats = pack_sampling(rows, MIXED.rows, GEOMETRY.slots)
    at = views(ints, sample_fields(MIXED.rows))
    for b in range(MIXED.rows):
        row = rows[b] if b < len(rows) and rows[b].samples else None
        if row is None:
            assert at["slot"][b] == GEOMETRY.slots, "a slot past the end"
            assert floats[:, b].tolist() == [0, 1, 0, 1, 0, 0]
            assert not any(at[name][b].any() for name in at if name != "slot")
            continue
        words = at["seed"][b].view(np.uint32)
        assert int(words[0]) + (int(words[1]) << 32) == row.seed
        assert at["position"][b] == row.position + row.length, "of the token to be drawn"
        names = ("slot", "top_k", "hold_stop", "stateful")
        assert [at[name][b] for name in names] == [getattr(row, name) for name in names]
        assert floats[:, b].tolist() == [getattr(row, name) for name in SAMPLE_FLOATS]


# LoRA --------------------------------------------------------------------------------------------


@st.composite
def placements(draw: Callable) -> list[Placement]:
    """Adapters with ranks of their own in every layer and module, laid out by the slow rule."""
    found, free = [], list(range(1, GEOMETRY.pages))
    for number in range(draw(st.integers(1, 4))):
        ranks = draw(st.lists(st.sampled_from([0, 0, 1, 5, 8, 9, 17]), min_size=14, max_size=14))
        rank = np.array(ranks, np.int32).reshape(2, 7)
        rank[0, 0] = max(rank[0, 0], 1)
        a, b = np.zeros((2, 7), np.int32), np.zeros((2, 7), np.int32)
        longest = 0
        for layer in range(2):
            end = 0
            for module, lengths in enumerate(GEOMETRY.row_lengths):
                for offset, row in zip((a, b), lengths, strict=True):
                    if rank[layer, module]:
                        width = np.gcd(row, GEOMETRY.page_numbers)
                        offset[layer, module] = -(-end // width) * width
                        end = offset[layer, module] + rank[layer, module] * row
            longest = max(longest, end)
        n = int(-(-longest // GEOMETRY.page_numbers))
        pages = draw(st.randoms()).sample(free, n) if draw(st.booleans()) else free[:n]
        free = [page for page in free if page not in pages]
        scale = np.arange(14, dtype=np.float32).reshape(2, 7) + number / 4 + 1
        found.append(Placement(f"{number}", tuple(pages), a, b, rank, scale))
    return found


@st.composite
def compositions(draw: Callable) -> tuple[Bucket, Shape, list[Segment]]:
    placed = draw(placements())
    bucket = draw(st.sampled_from([DECODE, Bucket(64, 8, 8)]))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=1, max_size=9)))
    parts = [
        Segment(draw(st.sampled_from(placed)), start, end)
        for start, end in pairwise(cuts)
        if draw(st.booleans())
    ]
    return bucket, work_shape(bucket.tokens, prefill=bucket.prefill), parts


def blocks_of(arrays: LoraArrays, cut: Shape, layer: int, module: int) -> Iterator[list]:
    """The items of a list: (block, scale) of each that has ranks."""
    for item in range(arrays.items[layer, module]):
        at = slice(item * cut.blocks, (item + 1) * cut.blocks)
        pairs = zip(arrays.blocks[layer, module, at], arrays.scale[layer, module, at], strict=True)
        yield [(Block(*fields.tolist()), float(scale)) for fields, scale in pairs if fields[4]]


def addresses(
    arrays: LoraArrays, start: int, row: int, rank: int, listed: int
) -> list[tuple[int, int]]:
    """(page, offset in it) of every number of a row of a block; `start` counts pieces."""
    first = start * int(np.gcd(row, GEOMETRY.page_numbers)) + rank * row
    found = []
    for number in range(first, first + row):
        page, offset = divmod(number, GEOMETRY.page_numbers)
        found.append((int(arrays.page_list[listed + page]) if arrays.split else page, offset))
    return found


def where(placement: Placement, first: int, row: int) -> list[tuple[int, int]]:
    """The same of a row of the adapter's blob."""
    pairs = (divmod(n, GEOMETRY.page_numbers) for n in range(first, first + row))
    return [(placement.pages[page], offset) for page, offset in pairs]


@settings(max_examples=150, deadline=None)
@given(compositions())
def test_lora_work_is_every_token_with_every_true_rank_once(composition: tuple) -> None:
    bucket, cut, parts = composition
    arrays = pack_lora(parts, bucket, GEOMETRY, cut)
    for layer in range(2):
        for module, (wide, out) in enumerate(GEOMETRY.row_lengths):
            found: Counter = Counter()
            items = 0
            for item in blocks_of(arrays, cut, layer, module):
                tile = {block.tile for block, _ in item}
                assert len(tile) == 1, "an item lies in one tile"
                items += 1
                for block, scale in item:
                    assert block.ranks <= GEOMETRY.rank_block
                    end = min(block.end, block.tile + cut.tile)
                    inside = range(max(block.start, block.tile), end)
                    for rank in range(block.ranks):
                        a = addresses(arrays, block.a, wide, rank, block.pages)
                        b = addresses(arrays, block.b, out, rank, block.pages)
                        found.update((t, (*a,), (*b,), scale) for t in inside)
            assert found == slow_work(parts, layer, module, wide, out)
            assert items == fewest_items(parts, bucket, cut, layer, module)


def slow_work(parts: list[Segment], layer: int, module: int, wide: int, out: int) -> Counter:
    expected: Counter = Counter()
    for part in parts:
        p = part.placement
        for rank in range(p.rank[layer, module]):
            a = where(p, int(p.a_offset[layer, module]) + rank * wide, wide)
            b = where(p, int(p.b_offset[layer, module]) + rank * out, out)
            scale = float(p.scale[layer, module])
            expected.update((t, (*a,), (*b,), scale) for t in range(part.start, part.end))
    return expected


def fewest_items(parts: list[Segment], bucket: Bucket, cut: Shape, layer: int, module: int) -> int:
    """Whole items of every tile: cost follows the ranks that are there."""
    total = 0
    for tile in range(0, bucket.tokens, cut.tile):
        blocks = sum(
            -(-int(part.placement.rank[layer, module]) // GEOMETRY.rank_block)
            for part in parts
            if part.start < tile + cut.tile and part.end > tile
        )
        total += -(-blocks // cut.blocks)
    return total


def a_placement(digest: str, pages: tuple[int, ...], rank: int = 8) -> Placement:
    table = np.zeros((2, 7), np.int32)
    ranks = np.full((2, 7), rank, np.int32)
    return Placement(digest, pages, table, table, ranks, np.ones((2, 7), np.float32))


def test_no_adapter_is_no_work() -> None:
    arrays = pack_lora([], DECODE, GEOMETRY, work_shape(8, prefill=False))
    assert not arrays.items.any() and arrays.split == 0


def test_the_most_work_there_can_be_has_room() -> None:
    """Every row has an adapter of the highest rank, and as many as can cross a tile's end."""
    bucket, cut = Bucket(64, 8, 8), work_shape(64, prefill=True)
    ends = [1, 2, 3, 33, 34, 35, 36, 64]
    parts = [
        Segment(a_placement(f"{i}", (i + 1,), GEOMETRY.max_rank), start, end)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    arrays = pack_lora(parts, bucket, GEOMETRY, cut)
    assert (arrays.items <= GEOMETRY.items(bucket, cut)).all()
    assert arrays.items.sum() > 0


def test_work_is_split_only_when_some_pages_do_not_follow_each_other() -> None:
    cut = work_shape(8, prefill=False)
    run, broken = a_placement("a", (4, 5, 6)), a_placement("b", (8, 7, 9))
    assert run.is_run and not broken.is_run and a_placement("c", (3,)).is_run
    assert pack_lora([Segment(run, 0, 3)], DECODE, GEOMETRY, cut).split == 0
    arrays = pack_lora([Segment(run, 0, 3), Segment(broken, 3, 4)], DECODE, GEOMETRY, cut)
    assert arrays.split == 1
    assert arrays.page_list[:6].tolist() == [4, 5, 6, 8, 7, 9]


def test_segments_are_the_rows_of_one_adapter_side_by_side() -> None:
    a, b = a_placement("a", (1,)), a_placement("b", (2,))
    base = RowPlan([1], False, 0, [1], 0, True)
    rows = [
        base, replace(base, tokens=[1, 2]), replace(base, placement=a, fed=True),
        replace(base, placement=a), replace(base, placement=b, tokens=[], fed=True),
    ]  # fmt: skip
    assert segments(rows) == [Segment(a, 3, 6), Segment(b, 6, 7)]
    assert segments(rows[:2]) == []
