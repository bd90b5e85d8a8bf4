"""What is packed for the device against slow and direct constructions of the same."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import (
    SAMPLE_FLOATS,
    Applied,
    Bucket,
    Draw,
    Geometry,
    Placement,
    RowPlan,
    Segment,
    StepRows,
    int_fields,
    pack_sampling,
    pack_step,
    sample_fields,
    segments,
    size,
    views,
)  # fmt: skip
from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Item

GEOMETRY = Geometry(
    layers=2, pages=900, page_size=4, page_numbers=64, slots=12, drop_page=1810,
    attention=Cut(query_tile=4, parts=0, span=0),
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
                draw=Draw(
                    seed=draw(st.integers(0, 2**64 - 1)),
                    temperature=draw(st.sampled_from([0.0, 0.5])),
                    top_k=draw(st.integers(0, 9)),
                    top_p=draw(st.sampled_from([1.0, 0.25])),
                    min_p=draw(st.sampled_from([0.0, 0.125])),
                    repetition=draw(st.sampled_from([1.0, 1.5])),
                    presence=draw(st.sampled_from([0.0, -1.0])),
                    frequency=draw(st.sampled_from([0.0, 2.0])),
                    stateful=draw(st.booleans()),
                ),
                hold_stop=draw(st.booleans()),
            )
        )
        left, used = left - length, used + held
    return rows


# The step ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans())
def test_every_token_and_row_is_packed_where_it_belongs(rows: list[RowPlan]) -> None:
    at = views(pack_step(StepRows.of(rows), MIXED, GEOMETRY), int_fields(MIXED, GEOMETRY))
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


def items_of(rows: list[RowPlan], geometry: Geometry) -> tuple[dict[str, np.ndarray], list[Item]]:
    """A packed step and its attention items."""
    at = views(pack_step(StepRows.of(rows), MIXED, geometry), int_fields(MIXED, geometry))
    return at, [Item(*map(int, item)) for item in at["items"][: at["item_count"][0]]]


@settings(deadline=None)
@given(plans())
def test_items_cover_the_rows_of_several_tokens_once(rows: list[RowPlan]) -> None:
    at, items = items_of(rows, GEOMETRY)
    covered: Counter = Counter()
    for item in items:
        assert 1 <= item.tokens <= 4
        assert (item.start - at["start"][item.row]) % 4 == 0
        assert item.first == item.part == 0
        after = at["start"][item.row] + at["length"][item.row] - item.start - item.tokens
        assert item.end == at["context"][item.row] - after, "what its last query sees"
        covered.update((item.row, token) for token in range(item.start, item.start + item.tokens))
    t, expected = 0, Counter()
    for b, row in enumerate(rows):
        if row.length > 1:
            expected.update((b, token) for token in range(t, t + row.length))
        t += row.length
    assert covered == expected
    assert not at["parts"].any()


@settings(deadline=None)
@given(plans(), st.integers(1, 5), st.sampled_from([4, 8]))
def test_parts_cover_the_context_of_rows_of_one_token_once(
    rows: list[RowPlan], parts: int, span: int
) -> None:
    cut = Cut(query_tile=4, parts=parts, span=span)
    at, items = items_of(rows, replace(GEOMETRY, attention=cut))
    for b, row in enumerate(rows):
        mine = [item for item in items if item.row == b]
        if row.length > 1:
            assert sum(item.tokens for item in mine) == row.length and at["parts"][b] == 0
            continue
        assert [item.part for item in mine] == list(range(at["parts"][b]))
        assert 1 <= len(mine) <= parts
        assert mine[0].first == 0 and mine[-1].end == at["context"][b]
        for item, after in pairwise(mine):
            assert item.end == after.first and item.end % GEOMETRY.page_size == 0
            assert item.end - item.first >= min(span, 4), "a part is worth a program"
        assert {(item.start, item.tokens) for item in mine} == {(at["start"][b], 1)}


def test_the_most_items_a_step_can_have_fit() -> None:
    row = RowPlan([1, 2], False, 0, [1], 0, False)
    rows = [row._replace(tokens=[1] * n, pages=[1, 2, 3]) for n in (2, 2, 2, 2, 2, 2, 2, 10)]
    _, items = items_of(rows, GEOMETRY)
    assert len(items) == 10 <= GEOMETRY.attention_items(MIXED)
    in_parts = replace(GEOMETRY, attention=Cut(query_tile=4, parts=3, span=4))
    late = row._replace(tokens=[1], position=31, pages=list(range(1, 9)))
    _, items = items_of([late] * 8, in_parts)
    assert len(items) == 24 <= in_parts.attention_items(MIXED)


def test_a_step_larger_than_its_bucket_is_an_error() -> None:
    row = RowPlan([5], False, 0, [1], 0, False)
    with pytest.raises(AssertionError, match="9 tokens, 9 rows"):
        pack_step(StepRows.of([row] * 9), DECODE, GEOMETRY)
    with pytest.raises(AssertionError, match="28 tokens, 7 rows"):
        pack_step(StepRows.of([row._replace(tokens=[5] * 4)] * 7), MIXED, GEOMETRY)


def test_packed_arrays_are_fresh() -> None:
    row = RowPlan([5], False, 0, [1], 0, True)
    first, second = (pack_step(StepRows.of([row]), DECODE, GEOMETRY) for _ in range(2))
    assert not np.shares_memory(first, second)
    one, other = (pack_sampling(StepRows.of([row]), 8, 12) for _ in range(2))
    pairs = zip(one, other, strict=True)
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
    ints, floats = pack_sampling(StepRows.of(rows), MIXED.rows, GEOMETRY.slots)
    at = views(ints, sample_fields(MIXED.rows))
    for b in range(MIXED.rows):
        row = rows[b] if b < len(rows) and rows[b].samples else None
        if row is None:
            assert at["slot"][b] == GEOMETRY.slots, "a slot past the end"
            assert floats[:, b].tolist() == [0, 1, 0, 1, 0, 0]
            assert not any(at[name][b].any() for name in at if name != "slot")
            continue
        words = at["seed"][b].view(np.uint32)
        assert int(words[0]) + (int(words[1]) << 32) == row.draw.seed
        assert at["position"][b] == row.position + row.length, "of the token to be drawn"
        assert (at["slot"][b], at["hold_stop"][b]) == (row.slot, row.hold_stop)
        assert (at["top_k"][b], at["stateful"][b]) == (row.draw.top_k, row.draw.stateful)
        assert floats[:, b].tolist() == [getattr(row.draw, name) for name in SAMPLE_FLOATS]


def test_segments_are_the_rows_of_one_adapter_side_by_side() -> None:
    none = np.zeros((2, 7), np.int32)
    a, b = (Placement(name, (1,), none, none, none, none) for name in "ab")
    both = (Applied(a), Applied(b, 0.5))
    base = RowPlan([1], False, 0, [1], 0, True)
    rows = [
        base, base._replace(tokens=[1, 2]), base._replace(applied=(Applied(a),), fed=True),
        base._replace(applied=(Applied(a),)), base._replace(applied=both, tokens=[], fed=True),
        base._replace(applied=both), base._replace(applied=(Applied(a, 0.5),)),
    ]  # fmt: skip
    assert segments(StepRows.of(rows)) == [
        Segment(a, 3, 6), Segment(a, 6, 8), Segment(b, 6, 8, 0.5), Segment(a, 8, 9, 0.5),
    ]  # fmt: skip
    assert segments(StepRows.of(rows[:2])) == []
