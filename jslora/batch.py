"""A step's numbers, packed: from the scheduler's rows to the few fixed-shape arrays of a bucket.

One int32 and one float32 array carry everything that changes every step; the LoRA work lists
change only when rows or adapters do and are kept until then. Host side in numpy; the same `Field`
tables tell the device side (`jslora.step`) where things lie. Host only: no jax.

Invariants: arrays are freshly allocated and never written after they were handed out, because JAX
on a CPU reads host buffers without copying. Padding tokens write to a page beyond the pool,
padding rows sample into a slot beyond the last, padding reads go to page 0.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

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
        max_rank: highest rank an adapter may have.
        row_lengths: of each module, the length of a row of A and of a row of B.
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


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies on the device: its pages in blob order, and its layout.

    Offsets are in numbers from the blob's start, [L, 7]; rank 0 means not targeted.
    """

    digest: str
    pages: tuple[int, ...]
    a_offset: np.ndarray
    b_offset: np.ndarray
    rank: np.ndarray
    scale: np.ndarray

    @property
    def is_run(self) -> bool:
        """Whether the pages follow each other in the pool."""
        return all(b - a == 1 for a, b in pairwise(self.pages))


@dataclass(frozen=True, slots=True)
class Draw:
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


class RowPlan(NamedTuple):
    """One row of a step; a tuple, because hundreds are made for every step.

    Attributes:
        tokens: ids the host knows; when `fed` the last one is read from the slot on the device.
        position: of the first token.
        pages: the sequence's block table, covering all positions up to the last token.
        slot: the sequence's slot.
        samples: whether the row's last token is the sequence's last, so that a token is drawn.
        hold_stop: whether the sequence may not end with this token.
    """

    tokens: Seq[int]
    fed: bool
    position: int
    pages: Seq[int]
    slot: int
    samples: bool
    placement: Placement | None = None
    draw: Draw = Draw()
    hold_stop: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens) + self.fed


def pack_step(rows: Seq[RowPlan], bucket: Bucket, geometry: Geometry) -> np.ndarray:
    """The int32 array of one step; rows are laid out in the order given, sorted by adapter."""
    fields = int_fields(bucket, geometry)
    packed = np.zeros(size(fields), np.int32)
    at = views(packed, fields)
    at["fed_slot"][:] = geometry.slots
    at["write_page"][:] = geometry.drop_page
    t = 0
    items: list[tuple[int, ...]] = []
    for b, row in enumerate(rows):
        n, known = row.length, len(row.tokens)
        at["token"][t : t + known] = row.tokens
        if row.fed:
            at["fed_slot"][t + n - 1] = row.slot
        positions = np.arange(row.position, row.position + n, dtype=np.int32)
        at["position"][t : t + n] = positions
        table = np.asarray(row.pages, np.int32)
        at["write_page"][t : t + n] = table[positions // geometry.page_size]
        at["write_offset"][t : t + n] = positions % geometry.page_size
        at["block_table"][b, : len(table)] = table
        at["start"][b], at["length"][b], at["last"][b] = t, n, t + n - 1
        at["context"][b] = row.position + n
        found = _attention_items(b, t, row, geometry)
        at["parts"][b] = len(found) if n == 1 else 0
        items += found
        t += n
    at["item_count"][0] = len(items)
    if items:
        at["items"][: len(items)] = items
    assert t <= bucket.tokens and len(rows) <= bucket.rows, (
        f"{t} tokens, {len(rows)} rows: {bucket}"
    )
    return packed


def _attention_items(b: int, start: int, row: RowPlan, geometry: Geometry) -> list[tuple[int, ...]]:
    """Items of one row, fields as in `pallas_kernels.paged_attention.rows.Item`."""
    cut, n, context = geometry.attention, row.length, row.position + row.length
    if n > 1:
        return [
            (b, start + at, min(cut.query_tile, n - at), 0,
             row.position + min(at + cut.query_tile, n), 0)
            for at in range(0, n, cut.query_tile)
        ]  # fmt: skip
    if not cut.parts:
        return []
    parts = min(cut.parts, -(-context // cut.span))
    length = -(-context // parts // geometry.page_size) * geometry.page_size
    return [
        (b, start, 1, first, min(first + length, context), part)
        for part, first in enumerate(range(0, context, length))
    ]


def pack_sampling(rows: Seq[RowPlan], count: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The int32 and float32 arrays of the sampling program for `count` rows."""
    fields = sample_fields(count)
    ints = np.zeros(size(fields), np.int32)
    at = views(ints, fields)
    at["slot"][:] = slots
    floats = np.zeros((len(SAMPLE_FLOATS), count), np.float32)
    floats[1], floats[3] = 1.0, 1.0
    which = [b for b, row in enumerate(rows) if row.samples]
    drawn = [rows[b] for b in which]
    if drawn:
        at["seed"][which] = _words([row.draw.seed for row in drawn])
        at["slot"][which] = [row.slot for row in drawn]
        at["position"][which] = [row.position + row.length for row in drawn]
        at["top_k"][which] = [row.draw.top_k for row in drawn]
        at["hold_stop"][which] = [row.hold_stop for row in drawn]
        at["stateful"][which] = [row.draw.stateful for row in drawn]
        floats[:, which] = [[getattr(row.draw, name) for row in drawn] for name in SAMPLE_FLOATS]
    return ints, floats


def _words(seeds: list[int]) -> np.ndarray:
    """Each 64-bit seed as two 32-bit words."""
    return np.array(seeds, np.uint64).view(np.int32).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens [start, end) of a step that share an adapter."""

    placement: Placement
    start: int
    end: int


def segments(rows: Seq[RowPlan]) -> list[Segment]:
    """The segments of a step whose rows are sorted by adapter."""
    found: list[Segment] = []
    t = 0
    for row in rows:
        if row.placement is not None:
            last = found[-1] if found else None
            if last and last.placement is row.placement and last.end == t:
                found[-1] = Segment(row.placement, last.start, t + row.length)
            else:
                found.append(Segment(row.placement, t, t + row.length))
        t += row.length
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
