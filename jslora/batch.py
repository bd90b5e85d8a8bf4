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
from typing import Any, NamedTuple, Protocol

import numpy as np

from jslora.model.config import MODULES


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


class WorkShape(Protocol):
    """How LoRA work is cut (`pallas_kernels.lora.Shape`)."""

    @property
    def tile(self) -> int: ...
    @property
    def blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the host must know of the compiled programs to fill their arrays.

    Attributes:
        slots: running sequences at most; also the slot of padding rows.
        page_numbers: numbers in one page of one layer.
        drop_page: a page beyond the pool in every layer, where padding writes go.
        query_tile: tokens in one prefill tile.
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
    query_tile: int
    rank_block: int
    max_rank: int
    row_lengths: tuple[tuple[int, int], ...]

    def items(self, bucket: Bucket, cut: WorkShape) -> int:
        """Most LoRA items one module can have: every row its own adapter of the highest rank."""
        tiles = bucket.tokens // cut.tile
        blocks = (bucket.rows + tiles) * -(-self.max_rank // self.rank_block)
        return tiles + -(-blocks // cut.blocks)

    def tiles(self, bucket: Bucket) -> int:
        """Most prefill tiles of a step."""
        return bucket.rows + bucket.tokens // self.query_tile


def int_fields(bucket: Bucket, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what lies in the int32 array of a step, in order."""
    T, B, M, U = bucket.tokens, bucket.rows, bucket.pages, geometry.tiles(bucket)
    return {
        "token": (T,), "fed_slot": (T,), "position": (T,), "write_page": (T,),
        "write_offset": (T,), "start": (B,), "length": (B,), "context": (B,), "last": (B,),
        "block_table": (B, M), "tile_row": (U,), "tile_start": (U,), "tile_length": (U,),
        "tiles": (1,),
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

    def cut(self, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks of every layer and module, [L, 7, n]: first piece of A and of B, ranks."""
        rows = np.asarray(geometry.row_lengths, np.int64)
        widths = np.gcd(rows, geometry.page_numbers)
        first = np.arange(0, int(self.rank.max()), geometry.rank_block)
        a = (self.a_offset[..., None] + first * rows[:, :1]) // widths[:, :1]
        b = (self.b_offset[..., None] + first * rows[:, 1:]) // widths[:, 1:]
        ranks = np.clip(self.rank[..., None] - first, 0, geometry.rank_block)
        return a, b, ranks


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row of a step.

    Attributes:
        tokens: ids the host knows; when `fed` the last one is read from the slot on the device.
        position: of the first token.
        pages: the sequence's block table, covering all positions up to the last token.
        slot: the sequence's slot.
        samples: whether the row's last token is the sequence's last, so that a token is drawn.
    """

    tokens: Seq[int]
    fed: bool
    position: int
    pages: Seq[int]
    slot: int
    samples: bool
    placement: Placement | None = None
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    hold_stop: bool = False
    stateful: bool = False

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
    t = tiles = 0
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
        if n > 1:
            for first in range(0, n, geometry.query_tile):
                at["tile_row"][tiles] = b
                at["tile_start"][tiles] = t + first
                at["tile_length"][tiles] = min(geometry.query_tile, n - first)
                tiles += 1
        t += n
    at["tiles"][0] = tiles
    assert t <= bucket.tokens and len(rows) <= bucket.rows, (
        f"{t} tokens, {len(rows)} rows: {bucket}"
    )
    return packed


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
        at["seed"][which] = _words([row.seed for row in drawn])
        at["slot"][which] = [row.slot for row in drawn]
        at["position"][which] = [row.position + row.length for row in drawn]
        at["top_k"][which] = [row.top_k for row in drawn]
        at["hold_stop"][which] = [row.hold_stop for row in drawn]
        at["stateful"][which] = [row.stateful for row in drawn]
        floats[:, which] = [[getattr(row, name) for row in drawn] for name in SAMPLE_FLOATS]
    return ints, floats


def _words(seeds: list[int]) -> np.ndarray:
    """Each 64-bit seed as two 32-bit words."""
    return np.array(seeds, np.uint64).view(np.int32).reshape(-1, 2)


class LoraArrays(NamedTuple):
    """The work lists of one composition of rows and adapters (see `pallas_kernels.lora.Work`)."""

    blocks: np.ndarray  # int32 [L, 7, I * blocks, 7]
    scale: np.ndarray  # float32 [L, 7, I * blocks]
    items: np.ndarray  # int32 [L, 7]
    split: np.ndarray  # int32 []
    page_list: np.ndarray  # int32 [P]


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


def pack_lora(
    parts: Seq[Segment], bucket: Bucket, geometry: Geometry, cut: WorkShape
) -> LoraArrays:
    """Cut the segments into tiles and items, for every layer and module at once."""
    L, M, capacity = geometry.layers, len(MODULES), geometry.items(bucket, cut) * cut.blocks
    # Zeroed memory that is never touched is never paid for: the capacity is the worst case.
    blocks = np.zeros((L, M, capacity, 7), np.int32)
    scale = np.zeros((L, M, capacity), np.float32)
    count = np.zeros((L, M), np.int32)
    page_list = np.zeros(geometry.pages, np.int32)
    listed: dict[str, int] = {}  # digest → where its pages begin in the list
    filled = 0
    split = not all(part.placement.is_run for part in parts)
    for part in parts:
        pages = part.placement.pages
        if part.placement.digest not in listed:
            page_list[filled : filled + len(pages)] = pages
            listed[part.placement.digest] = filled
            filled += len(pages)
    for tile in range(0, bucket.tokens, cut.tile):
        inside = [part for part in parts if part.start < tile + cut.tile and part.end > tile]
        if inside:
            found = [_blocks(part, tile, listed[part.placement.digest], split, geometry)
                     for part in inside]  # fmt: skip
            _append_tile(blocks, scale, count, found, cut.blocks)
    return LoraArrays(blocks, scale, count, np.asarray(split, np.int32), page_list)


def _blocks(
    part: Segment, tile: int, listed: int, split: bool, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """All blocks of a segment's adapter, int32 [L, 7, n, 7] and scales [L, 7, n]; ranks 0 pads."""
    placement = part.placement
    a, b, ranks = placement.cut(geometry)
    rows = np.asarray(geometry.row_lengths, np.int64)
    per_page = geometry.page_numbers // np.gcd(rows, geometry.page_numbers)  # [7, 2]
    first = 0 if split else placement.pages[0]
    found = np.empty((*ranks.shape, 7), np.int32)
    found[..., 0] = a + first * per_page[:, 0, None]
    found[..., 1] = b + first * per_page[:, 1, None]
    found[..., 2], found[..., 3] = part.start, part.end
    found[..., 4], found[..., 5], found[..., 6] = ranks, listed, tile
    return found, np.broadcast_to(placement.scale[..., None], ranks.shape)


def _append_tile(
    blocks: np.ndarray, scale: np.ndarray, count: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]], per_item: int,
) -> None:  # fmt: skip
    """Put one tile's blocks behind the others of each layer and module, whole items at a time."""
    new = np.concatenate([block for block, _ in found], axis=2)
    scales = np.concatenate([scale for _, scale in found], axis=2)
    real = new[..., 4] > 0
    order = np.argsort(~real, axis=2, kind="stable")  # the real ones first
    new = np.take_along_axis(new, order[..., None], axis=2)
    scales = np.take_along_axis(scales, order, axis=2)
    counts = real.sum(axis=2)
    room = min(-(-int(counts.max()) // per_item) * per_item, new.shape[2])
    ls, ms, at = np.nonzero(np.arange(room) < -(-counts // per_item)[..., None] * per_item)
    to = count[ls, ms] * per_item + at
    assert to.max(initial=0) < blocks.shape[2], f"{to.max()} LoRA blocks, room {blocks.shape[2]}"
    blocks[ls, ms, to] = new[ls, ms, at]
    scale[ls, ms, to] = scales[ls, ms, at]
    count += -(-counts // per_item).astype(np.int32)
