"""The LoRA work lists of both forms against a slow rule: every token, every true rank, once."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import Bucket, Geometry, Placement, Segment
from jslora.blocks import BlockArrays, block_items, pack_blocks
from jslora.model.config import MODULES
from jslora.spans import pack_spans, span_pairs
from jslora.split import BY_INPUT
from pallas_kernels.lora.reference import Block, BlockShape, block_shape
from pallas_kernels.lora.segments import Address, Pair, SegmentShape, segment_shape
from pallas_kernels.paged_attention.cut import Cut

GEOMETRY = Geometry(
    layers=2, pages=900, page_size=4, page_numbers=64, slots=12, drop_page=1810,
    attention=Cut(query_tile=4, parts=0, span=0), rank_block=8, max_rank=40,
    row_lengths=((48, 64), (48, 16), (48, 16), (64, 48), (48, 80), (48, 80), (80, 48)),
    max_composed=3,
)  # fmt: skip
DECODE = Bucket(8, 8, 8)


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
def compositions(draw: Callable) -> tuple[Bucket, list[Segment]]:
    """A bucket, and segments that fill some of it, of up to three adapters each."""
    placed = draw(placements())
    bucket = draw(st.sampled_from([DECODE, Bucket(64, 8, 8)]))
    cuts = sorted(draw(st.sets(st.integers(0, bucket.tokens), min_size=1, max_size=9)))
    parts: list[Segment] = []
    for start, end in pairwise(cuts):
        chosen = draw(st.lists(st.sampled_from(placed), max_size=3, unique_by=id))
        while sum(placement.rank.max() for placement in chosen) > GEOMETRY.max_rank:
            chosen.pop()
        scales = [draw(st.sampled_from([1.0, 0.5, 0.0])) for _ in chosen]
        parts += [Segment(p, start, end, s) for p, s in zip(chosen, scales, strict=True)]
    return bucket, parts


def blocks_of(arrays: BlockArrays, cut: BlockShape, layer: int, module: int) -> Iterator[list]:
    """The items of a list: (block, scale) of each that has ranks."""
    for item in range(arrays.items[layer, module]):
        at = slice(item * cut.blocks, (item + 1) * cut.blocks)
        pairs = zip(arrays.blocks[layer, module, at], arrays.scale[layer, module, at], strict=True)
        yield [(Block(*fields.tolist()), float(scale)) for fields, scale in pairs if fields[4]]


def addresses(start: int, row: int, rank: int, pages: np.ndarray | None) -> list[tuple[int, int]]:
    """(page, offset in it) of every number of a row; `start` counts pieces, in `pages` if given."""
    first = start * int(np.gcd(row, GEOMETRY.page_numbers)) + rank * row
    found = []
    for number in range(first, first + row):
        page, offset = divmod(number, GEOMETRY.page_numbers)
        found.append((page if pages is None else int(pages[page]), offset))
    return found


def where(placement: Placement, first: int, row: int) -> list[tuple[int, int]]:
    """The same of a row of the adapter's blob."""
    pairs = (divmod(n, GEOMETRY.page_numbers) for n in range(first, first + row))
    return [(placement.pages[page], offset) for page, offset in pairs]


@settings(max_examples=150, deadline=None)
@given(compositions())
def test_blocks_are_every_token_with_every_true_rank_once(composition: tuple) -> None:
    bucket, parts = composition
    cut = block_shape(bucket.tokens, prefill=bucket.prefill)
    arrays = pack_blocks(parts, bucket, GEOMETRY, cut)
    for layer in range(2):
        for module, (wide, out) in enumerate(GEOMETRY.row_lengths):
            found: Counter = Counter()
            items = 0
            for item in blocks_of(arrays, cut, layer, module):
                tiles = {t // cut.tile for block, _ in item for t in (block.start, block.end - 1)}
                assert len(tiles) == 1, "an item lies in one tile"
                items += 1
                for block, scale in item:
                    assert block.ranks <= GEOMETRY.rank_block
                    inside = range(block.start, block.end)
                    ranks = block.share * int(np.gcd(out, GEOMETRY.page_numbers)) // out
                    assert (
                        block.ranks
                        <= ranks
                        <= max(int(part.placement.rank[layer, module]) for part in parts)
                    )
                    pages = arrays.page_list[block.pages :] if arrays.split else None
                    for rank in range(block.ranks):
                        a = addresses(block.a, wide, rank, pages)
                        b = addresses(block.b, out, rank, pages)
                        found.update((t, (*a,), (*b,), scale) for t in inside)
            assert found == slow_work(parts, layer, module, wide, out)
            assert items == fewest_items(parts, bucket, cut, layer, module)


@settings(max_examples=150, deadline=None)
@given(compositions(), st.sampled_from([1, 2, 3]))
def test_spans_are_every_token_with_every_true_rank_once(composition: tuple, peers: int) -> None:
    """Where devices share the ranks of some modules, the lists are those of one device's share."""
    bucket, parts = composition
    shared = tuple(1 if module in BY_INPUT else peers for module in MODULES)
    geometry = replace(GEOMETRY, peers=shared)
    shape = segment_shape(bucket.tokens, 3 * GEOMETRY.max_rank, prefill=False, peers=peers)
    assert shape.span == 16 and shape.share * peers == shape.low
    arrays = pack_spans(parts, bucket, geometry, shape)
    pairs = [Pair(*map(int, pair)) for pair in arrays.pairs[: arrays.total[0]]]
    assert all(p.low % peers == p.stride % peers == 0 for p in pairs)
    for n in (1, peers):  # of all devices, and of one
        products = [range(p.low // n, p.low // n + p.tokens * (p.stride // n)) for p in pairs]
        assert all(one.stop <= other.start for one, other in pairwise(products)), "they overlap"
        assert all(product.stop <= shape.low // n for product in products)
    heads = [i for i, pair in enumerate(pairs) if pair.chain]
    assert all(i + pairs[i].chain == j for i, j in pairwise([*heads, len(pairs)])), "chains"
    for i in heads:
        assert {p[:2] for p in pairs[i : i + pairs[i].chain]} == {pairs[i][:2]}, "not one span"
    spans = [range(pairs[i].start, pairs[i].start + pairs[i].tokens) for i in heads]
    covered = [token for span in spans for token in span]
    assert covered == list(range(bucket.tokens)), "what follows a sum is done for every token"
    for layer in range(2):
        for module, (wide, out) in enumerate(GEOMETRY.row_lengths):
            found: Counter = Counter()
            for i, pair in enumerate(pairs):
                at = Address(*map(int, arrays.table[layer, module, i]))
                scale = float(arrays.scale[layer, module, i])
                assert at.rank * shared[module] <= pair.stride and 1 <= pair.tokens <= 16
                pages = arrays.page_list[pair.pages :] if pair.split else None
                for rank in range(at.rank):
                    a = addresses(at.a, wide, rank, pages)
                    b = addresses(at.b, out, rank, pages)
                    tokens = range(pair.start, pair.start + pair.tokens)
                    found.update((t, (*a,), (*b,), scale) for t in tokens)
            assert found == slow_work(parts, layer, module, wide, out)


def slow_work(parts: list[Segment], layer: int, module: int, wide: int, out: int) -> Counter:
    expected: Counter = Counter()
    for part in parts:
        p = part.placement
        for rank in range(p.rank[layer, module]):
            a = where(p, int(p.a_offset[layer, module]) + rank * wide, wide)
            b = where(p, int(p.b_offset[layer, module]) + rank * out, out)
            scale = float(p.scale[layer, module]) * part.scale
            expected.update((t, (*a,), (*b,), scale) for t in range(part.start, part.end))
    return expected


def fewest_items(
    parts: list[Segment], bucket: Bucket, cut: BlockShape, layer: int, module: int
) -> int:
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
    arrays = pack_blocks([], DECODE, GEOMETRY, block_shape(8, prefill=False))
    assert not arrays.items.any() and arrays.split == 0
    spans = pack_spans([], DECODE, GEOMETRY, SegmentShape(16, 1, 0))
    assert spans.total == 1 and Pair(*spans.pairs[0].tolist())[:2] == (0, 8)
    assert not spans.table.any()


def test_the_most_work_there_can_be_has_room() -> None:
    """Every row has an adapter of the highest rank, and as many as can cross a tile's end."""
    bucket, cut = Bucket(64, 8, 8), block_shape(64, prefill=True)
    ends = [1, 2, 3, 33, 34, 35, 36, 64]
    parts = [
        Segment(a_placement(f"{i}", (i + 1,), GEOMETRY.max_rank), start, end)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    arrays = pack_blocks(parts, bucket, GEOMETRY, cut)
    assert (arrays.items <= block_items(bucket, GEOMETRY, cut)).all()
    assert arrays.items.sum() > 0
    shape = segment_shape(64, GEOMETRY.max_rank, prefill=True)
    assert pack_spans(parts, bucket, GEOMETRY, shape).total == 8
    every_other = [Segment(parts[0].placement, 2 * i, 2 * i + 1) for i in range(4)]
    assert pack_spans(every_other, DECODE, GEOMETRY, shape).total == 8


def test_the_most_adapters_of_every_row_have_room() -> None:
    """Ranks that fill no block, and that the devices that share them round up."""
    ranks, peers = (1, 9, 30), 4
    rounded = sum(-(-rank // peers) * peers for rank in ranks)
    placed = [a_placement(f"{i}", (i + 1,), rank) for i, rank in enumerate(ranks)]
    shared = replace(GEOMETRY, peers=(peers,) * 7)
    for bucket in (DECODE, Bucket(64, 8, 8)):
        each = bucket.tokens // bucket.rows
        starts = range(0, bucket.tokens, each)
        parts = [Segment(p, start, start + each, 0.5) for start in starts for p in placed]
        cut = block_shape(bucket.tokens, prefill=bucket.prefill)
        arrays = pack_blocks(parts, bucket, GEOMETRY, cut)
        assert arrays.items.max() <= block_items(bucket, GEOMETRY, cut)
        shape = segment_shape(bucket.tokens, rounded, prefill=bucket.prefill, peers=peers)
        quarter = [replace(p, rank=-(-p.rank // peers)) for p in placed]
        parts = [Segment(p, start, start + each) for start in starts for p in quarter]
        spans = pack_spans(parts, bucket, shared, shape)
        assert spans.total == 3 * bucket.rows <= span_pairs(bucket, shape, 3)
        assert Pair(*spans.pairs[1].tolist())[:5] == (0, each, 0, each * 4, 12)


def test_work_is_split_only_when_some_pages_do_not_follow_each_other() -> None:
    cut = block_shape(8, prefill=False)
    run, broken = a_placement("a", (4, 5, 6)), a_placement("b", (8, 7, 9))
    assert run.is_run and not broken.is_run and a_placement("c", (3,)).is_run
    assert pack_blocks([Segment(run, 0, 3)], DECODE, GEOMETRY, cut).split == 0
    arrays = pack_blocks([Segment(run, 0, 3), Segment(broken, 3, 4)], DECODE, GEOMETRY, cut)
    assert arrays.split == 1
    assert arrays.page_list[:6].tolist() == [4, 5, 6, 8, 7, 9]
    shape = segment_shape(8, GEOMETRY.max_rank, prefill=False)
    spans = pack_spans([Segment(run, 0, 3), Segment(broken, 3, 4)], DECODE, GEOMETRY, shape)
    assert [Pair(*pair).split for pair in spans.pairs[:2].tolist()] == [0, 1]
    assert spans.page_list[:6].tolist() == [4, 5, 6, 8, 7, 9]
