"""A step's numbers, packed: from the scheduler's rows to the few fixed-shape arrays of a bucket.

One int32 and one float32 array carry everything that changes every step; the LoRA work lists
change only when rows or adapters do and are kept until then. Host side in numpy; the same `Field`
tables tell the device side (`jslora.step`) where things lie. Host only: no jax.

Invariants: arrays are freshly allocated and never written after they were handed out, because JAX
on a CPU reads host buffers without copying. Padding tokens write to a page beyond the pool,
padding rows sample into a slot beyond the last, padding reads go to page 0.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from pallas_kernels.paged_attention.cut import Cut


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shapes of one compiled step: T tokens, B rows, M pages a row."""

    tokens: int
    rows: int
    pages: int

    @property
    def prefill(self) -> bool:
        """Whether rows may have several tokens in a step."""
        return self.tokens > self.rows


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the host must know of the compiled programs to fill their arrays.

    Attributes:
        slots: running sequences at most; also the slot of padding rows.
        page_numbers: numbers in one page of one layer.
        drop_page: a page beyond the pool in every layer, where padding writes go.
        attention: how a step's attention is cut.
        rank_block: ranks in one LoRA block.
        max_rank: highest rank an adapter may have, and all together that a row has.
        row_lengths: of each module, the length of a row of A and of a row of B.
        peers: of each module, the devices that share its ranks.
        max_composed: adapters that a row may have.
        storages: those that adapters may have, in the order of `pieces.STORAGES`.
        word_bits: bits of a number of the pool.
    """

    layers: int
    pages: int
    page_size: int
    page_numbers: int
    slots: int
    drop_page: int
    attention: Cut
    rank_block: int
    max_rank: int
    row_lengths: tuple[tuple[int, int], ...]
    peers: tuple[int, ...] = (1,) * 7
    max_composed: int = 1
    storages: tuple[str, ...] = ("full",)
    word_bits: int = 16

    def attention_items(self, bucket: Bucket) -> int:
        """Most attention items of a step: every row in parts, or in whole tiles and one more."""
        tiles = bucket.tokens // self.attention.query_tile if bucket.prefill else 0
        return bucket.rows * max(1, self.attention.parts) + tiles


def int_fields(bucket: Bucket, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what lies in the int32 array of a step, in order."""
    T, B, M, items = bucket.tokens, bucket.rows, bucket.pages, geometry.attention_items(bucket)
    return {
        "token": (T,), "fed_slot": (T,), "position": (T,), "write_page": (T,),
        "write_offset": (T,), "start": (B,), "length": (B,), "context": (B,), "last": (B,),
        "parts": (B,), "block_table": (B, M), "items": (items, 6), "item_count": (1,),
    }  # fmt: skip


def sample_fields(rows: int) -> dict[str, tuple[int, ...]]:
    """The same for the int32 array of the sampling program."""
    names = ("slot", "position", "top_k", "hold_stop", "stateful")
    return {"seed": (rows, 2)} | {name: (rows,) for name in names}


SAMPLERS = ("greedy", "draw", "filter")
"""The sampling programs, each able to do what those before it can."""

SAMPLE_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


def size(fields: dict[str, tuple[int, ...]]) -> int:
    """Length of the packed array."""
    return sum(int(np.prod(shape)) for shape in fields.values())


def views(packed: Any, fields: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Writable views of a packed numpy array (or slices of a traced one), by name."""
    found, at = {}, 0
    for name, shape in fields.items():
        count = int(np.prod(shape))
        found[name] = packed[at : at + count].reshape(shape)
        at += count
    assert at == packed.shape[0], f"packed array of {packed.shape[0]} numbers, fields of {at}"
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where an adapter lies on the device: its pages in blob order, and its layout.

    Offsets are in numbers of the pool from the blob's start, [L, 7]; rank 0 means not targeted.
    `storage` is one of `pieces.STORAGES`, by which the scales' places follow.
    """

    digest: str
    pages: tuple[int, ...]
    a_offset: np.ndarray
    b_offset: np.ndarray
    rank: np.ndarray
    scale: np.ndarray
    storage: str = "full"

    @property
    def is_run(self) -> bool:
        """Whether the pages follow each other in the pool."""
        return all(b - a == 1 for a, b in pairwise(self.pages))


class Applied(NamedTuple):
    """An adapter on the device and what its delta is multiplied by."""

    placement: Placement
    scale: float = 1.0


class Draw(NamedTuple):
    """How a sequence's tokens are drawn, the same in all its rows.

    Attributes:
        stateful: whether counts, bias or stop ids of its slot matter.
    """

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    stateful: bool = False


DRAW = np.dtype([
    ("seed", np.uint64), ("temperature", np.float64), ("top_k", np.int32), ("top_p", np.float64),
    ("min_p", np.float64), ("repetition", np.float64), ("presence", np.float64),
    ("frequency", np.float64), ("stateful", bool),
])  # fmt: skip
"""A column of `Draw`."""


class RowPlan(NamedTuple):
    """One row of a step.

    Attributes:
        tokens: ids the host knows; when `fed` the last one is read from the slot on the device.
        position: of the first token.
        pages: the sequence's block table, covering all positions up to the last token.
        slot: the sequence's slot.
        samples: whether the row's last token is the sequence's last, so that a token is drawn.
        applied: its adapters, whose deltas are added up.
        hold_stop: whether the sequence may not end with this token.
    """

    tokens: Seq[int]
    fed: bool
    position: int
    pages: Seq[int]
    slot: int
    samples: bool
    applied: tuple[Applied, ...] = ()
    draw: Draw = Draw()
    hold_stop: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens) + self.fed


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step in columns, because hundreds are planned and packed for every step.

    Attributes:
        tokens: ids the host knows of all rows, one row's behind the other's.
        known: how many of them are each row's.
        table: block tables, a row each; what lies behind a row's last token is not looked at.
        draw: of dtype `DRAW`.
        fed, position, slot, samples, hold_stop, applied: see `RowPlan`.
    """

    tokens: Int32[np.ndarray, " known"]
    known: Int[np.ndarray, " B"]
    fed: Bool[np.ndarray, " B"]
    position: Int[np.ndarray, " B"]
    table: Int32[np.ndarray, "B M"]
    slot: Int[np.ndarray, " B"]
    samples: Bool[np.ndarray, " B"]
    hold_stop: Bool[np.ndarray, " B"]
    draw: np.ndarray
    applied: list[tuple[Applied, ...]]

    @classmethod
    def of(cls, rows: Seq[RowPlan]) -> "StepRows":
        """The columns of rows given one by one."""
        table = np.zeros((len(rows), max((len(row.pages) for row in rows), default=0)), np.int32)
        for b, row in enumerate(rows):
            table[b, : len(row.pages)] = row.pages
        ints = partial(np.array, dtype=np.int64)
        flags = partial(np.array, dtype=bool)
        return cls(
            tokens=np.array([token for row in rows for token in row.tokens], np.int32),
            known=ints([len(row.tokens) for row in rows]),
            fed=flags([row.fed for row in rows]),
            position=ints([row.position for row in rows]),
            table=table,
            slot=ints([row.slot for row in rows]),
            samples=flags([row.samples for row in rows]),
            hold_stop=flags([row.hold_stop for row in rows]),
            draw=np.array([tuple(row.draw) for row in rows], DRAW),
            applied=[row.applied for row in rows],
        )

    def __len__(self) -> int:
        return len(self.applied)

    def __getitem__(self, b: int) -> RowPlan:
        """One row, its block table with what lies behind it."""
        last = int(self.known[: b + 1].sum())
        return RowPlan(
            self.tokens[last - int(self.known[b]) : last].tolist(), bool(self.fed[b]),
            int(self.position[b]), self.table[b].tolist(), int(self.slot[b]),
            bool(self.samples[b]), self.applied[b], Draw(*self.draw[b].item()),
            bool(self.hold_stop[b]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[RowPlan]:
        return (self[b] for b in range(len(self)))

    @property
    def length(self) -> Int[np.ndarray, " B"]:
        """Tokens of each row."""
        return self.known + self.fed

    @property
    def end(self) -> Int[np.ndarray, " B"]:
        """Position behind the last token of each row."""
        return self.position + self.length


def pack_step(rows: StepRows, bucket: Bucket, geometry: Geometry) -> np.ndarray:
    """The int32 array of one step; rows are laid out in the order given, sorted by adapter."""
    fields = int_fields(bucket, geometry)
    packed = np.zeros(size(fields), np.int32)
    at = views(packed, fields)
    at["fed_slot"][:] = geometry.slots
    at["write_page"][:] = geometry.drop_page
    count, length = len(rows), rows.length
    total, start = int(length.sum()), np.cumsum(length) - length
    assert total <= bucket.tokens and count <= bucket.rows, (
        f"{total} tokens, {count} rows: {bucket}"
    )
    last, row = start + length - 1, np.repeat(np.arange(count), length)
    position = np.arange(total) + (rows.position - start)[row]
    known = np.ones(total, bool)
    known[last[rows.fed]] = False
    at["token"][:total][known] = rows.tokens
    at["fed_slot"][last[rows.fed]] = rows.slot[rows.fed]
    at["position"][:total] = position
    at["write_page"][:total] = rows.table[row, position // geometry.page_size]
    at["write_offset"][:total] = position % geometry.page_size
    at["block_table"][:count, : rows.table.shape[1]] = rows.table
    at["start"][:count], at["length"][:count], at["last"][:count], at["context"][:count] = (
        start, length, last, rows.end,
    )  # fmt: skip
    at["parts"][:count], items = _attention_items(rows, start, geometry)
    at["items"][: len(items)], at["item_count"][0] = items, len(items)
    return packed


def _attention_items(
    rows: StepRows, start: np.ndarray, geometry: Geometry
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, "items 6"]]:
    """Parts of each row of one token, and all items (`pallas_kernels.paged_attention.rows.Item`).

    A row of several tokens is cut into tiles of them, the context of another into parts.
    """
    cut, n, context = geometry.attention, rows.length, rows.end
    several = n > 1
    parts = np.minimum(max(1, cut.parts), -(-context // max(1, cut.span)))
    span = (context + parts * geometry.page_size - 1) // (parts * geometry.page_size)
    span *= geometry.page_size
    count = np.where(several, -(-n // cut.query_tile), -(-context // span) if cut.parts else 0)
    row = np.repeat(np.arange(len(rows)), count)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    tile = nth * cut.query_tile
    many, n, context, span = several[row], n[row], context[row], span[row]
    ends = np.minimum(tile + cut.query_tile, n)
    items = np.stack([
        row,
        start[row] + np.where(many, tile, 0),
        np.where(many, ends - tile, 1),
        np.where(many, 0, nth * span),
        np.where(many, rows.position[row] + ends, np.minimum((nth + 1) * span, context)),
        np.where(many, 0, nth),
    ], axis=1)  # fmt: skip
    return np.where(several, 0, count), items


def pack_sampling(rows: StepRows, count: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The int32 and float32 arrays of the sampling program for `count` rows."""
    fields = sample_fields(count)
    ints = np.zeros(size(fields), np.int32)
    at = views(ints, fields)
    at["slot"][:] = slots
    floats = np.zeros((len(SAMPLE_FLOATS), count), np.float32)
    floats[1], floats[3] = 1.0, 1.0
    which = np.flatnonzero(rows.samples)
    draw = rows.draw[which]
    at["seed"][which] = np.ascontiguousarray(draw["seed"]).view(np.int32).reshape(-1, 2)
    at["slot"][which] = rows.slot[which]
    at["position"][which] = rows.end[which]
    at["top_k"][which] = draw["top_k"]
    at["hold_stop"][which] = rows.hold_stop[which]
    at["stateful"][which] = draw["stateful"]
    for column, name in zip(floats, SAMPLE_FLOATS, strict=True):
        column[which] = draw[name]
    return ints, floats


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens [start, end) of a step that share an adapter and its scale.

    The segments of tokens with several adapters have the same ends, and follow each other.
    """

    placement: Placement
    start: int
    end: int
    scale: float = 1.0


def segments(rows: StepRows) -> list[Segment]:
    """The segments of a step whose rows are sorted by adapters."""
    found: list[Segment] = []
    ends = np.cumsum(rows.length).tolist()
    starts = [0, *ends[:-1]]
    for applied, alike in groupby(range(len(rows)), rows.applied.__getitem__):
        first, *others = alike
        start, end = starts[first], ends[others[-1] if others else first]
        found += [Segment(placement, start, end, scale) for placement, scale in applied]
    return found


def list_pages(parts: Seq[Segment], geometry: Geometry) -> tuple[np.ndarray, dict[str, int]]:
    """Pages of all adapters of a step, int32 [P], and where those of each digest begin."""
    pages, first, filled = np.zeros(geometry.pages, np.int32), {}, 0
    for part in parts:
        placement = part.placement
        if placement.digest not in first:
            pages[filled : filled + len(placement.pages)] = placement.pages
            first[placement.digest] = filled
            filled += len(placement.pages)
    return pages, first
