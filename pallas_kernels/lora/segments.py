"""The work list that GPU kernels walk: which tokens get which adapter's delta, and where it lies.

A pair is an adapter and a span of consecutive tokens, at most `SegmentShape.span` of them. The
shrink kernel writes a pair's low-rank product into a flat float32 buffer, where the host said; the
expand kernel adds to the base output what the pairs of one span make, in the list's order, so that
several adapters over the same tokens are exact and deterministic. The spans cover every token of
the step once: those without an adapter are in pairs of rank 0, which read nothing of the pool,
because what follows a sum (`finish`) is done for them too.

Programs are as many as the device takes at once and stride over the list, whose length is an
argument: no grid is sized for the worst case, ranks are looped over up to the true rank of each
adapter in each layer and module, and a column block is read from the page that holds it. Where
adapters may be stored in several ways there is a loop for each, of which a pair takes its own.
Integers are taken out of their words and scaled in registers; the expand kernel's column blocks
that share words are read by different programs, the words from memory once and then from a cache.

Invariants: numbers beyond an adapter's rank, tokens beyond a span, columns beyond a row are masked
where they are loaded, both operands of every product and the result; a weight that is not finite
reaches its own pair's tokens only. A column block of the pool has a 32-bit number, and a 64-bit
offset.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class SegmentShape(NamedTuple):
    """How a bucket's work is cut.

    Attributes:
        span: tokens of a pair at most, a power of two and at least 16 (a matrix unit's rows).
        splits: parts that the sum over a row of A is cut in; the expand kernel adds them in order.
        low: numbers of the low-rank product of one module and one split at most.
        peers: devices that share the ranks of a module. All places in the low-rank product are
            multiples of it, so that a device's share is laid out alike, in `1 / peers` of the room.
        storages: those that adapters may have (`pieces.STORAGES`).
    """

    span: int
    splits: int
    low: int
    peers: int = 1
    storages: tuple[str, ...] = ("full",)

    @property
    def share(self) -> int:
        """Numbers that one of the peers makes."""
        return self.low // self.peers


def segment_shape(
    tokens: int, max_rank: int, *, prefill: bool, peers: int = 1,
    storages: tuple[str, ...] = ("full",),
) -> SegmentShape:  # fmt: skip
    """Decode has little work for many processors, so a row's sum is split; prefill has enough."""
    ranks = -(-max_rank // peers) * peers
    span, splits = (64, 1) if prefill else (16, 8)
    return SegmentShape(span, splits, tokens * ranks, peers, storages)


def sum_splits(
    low: Float[Array, " splits*n"], shape: SegmentShape
) -> tuple[Float[Array, " n"], SegmentShape]:
    """The parts of low-rank products added up, before they are sent to other devices."""
    return low.reshape(shape.splits, -1).sum(axis=0), shape._replace(splits=1)


class Pair(NamedTuple):
    """The integer fields of a pair, in the order they are packed.

    Attributes:
        start, tokens: the span.
        chain: pairs of the span if this is its first, which the others follow; 0 in those.
        low: where its low-rank product begins; that of a token and rank lies
            `token * stride + rank` behind.
        stride: the adapter's highest rank in any layer and module, of all devices together.
        pages: where its pages begin in the page list.
        split: 1 when its pages do not follow each other.
        storage: how its weights are stored, as a place in `pieces.STORAGES`.
    """

    start: Int32[Array, ""]
    tokens: Int32[Array, ""]
    chain: Int32[Array, ""]
    low: Int32[Array, ""]
    stride: Int32[Array, ""]
    pages: Int32[Array, ""]
    split: Int32[Array, ""]
    storage: Int32[Array, ""]


class Address(NamedTuple):
    """The integer fields of a pair in one layer and module, in the order they are packed.

    `a` and `b` are where the factors start, in pieces of the width (`piece_width`) of their rows of
    words, counted from the layer's page 0, or, when the pair is `split`, from the adapter's own
    start. Where devices share the ranks, `rank` is one's share, and B has the rows of all in turn.
    """

    a: Int32[Array, ""]
    b: Int32[Array, ""]
    rank: Int32[Array, ""]


class SegmentWork(NamedTuple):
    """The work list of one step, for every layer and each of its linear modules."""

    pairs: Int32[Array, "I 8"]
    total: Int32[Array, "1"]  # pairs in the list, the rest is padding
    table: Int32[Array, "L modules I 3"]
    scale: Float[Array, "L modules I"]
    page_list: Int32[Array, " P"]
