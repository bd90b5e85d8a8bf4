"""A block of ranks of one factor, read from the pool within a Pallas kernel, however it is stored.

Inside the kernels the pool is rows of one column block each, so an address is a block's number;
Pallas makes the offset in numbers from it, with 64 bits where the pool needs them. Traced numbers
are divided by `lax.div` and `lax.rem`, and a choice between numbers known at compile time is a sum
of steps: the lowering of `//` and of `jnp.where` on scalars cannot be relied upon. Words that hold
integers are loaded, viewed as integers of the same width, and nothing else.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.lora.segments import Pair
from pallas_kernels.lora.tiles import Rows

Scalar = Int32[Array, ""]
Ref = Any
"""An array in device memory, as kernels are given it; Pallas has no public type for that."""


class Factor(NamedTuple):
    """A block of ranks of one factor of pair `i`, and all it takes to read its columns.

    `starts` counts column blocks: from the layer's page 0, or, when the pair is split, from the
    adapter's own start. Ranks that are not `real` are neither looked up nor read.

    Attributes:
        rank: numbers of these ranks.
        scales: block of the pool, and number in it, where each rank's scales begin, all of which
            lie in one page; nothing if weights are stored in full.
        rows: how rows lie; fields may be traced, but not `packed`, `page` and `touched`.
    """

    pool: Ref
    page_list: Ref
    first_page: Scalar
    pairs: Ref
    i: Scalar
    rank: Int32[Array, " ranks"]
    real: Bool[Array, " ranks"]
    starts: Int32[Array, " ranks"]
    scales: tuple[Int32[Array, " ranks"], Int32[Array, " ranks"]] | None
    rows: Rows

    @staticmethod
    def of(
        pool: Ref, page_list: Ref, first_page: Scalar, pairs: Ref, i: Scalar, start: Scalar,
        rank: Int32[Array, " ranks"], ranks: Scalar, rows: Rows,
    ) -> "Factor":  # fmt: skip
        """That of `ranks` rows, the first of which begins in piece `start`."""
        first, real = start * rows.piece, rank < ranks
        starts = first + rank * rows.row
        factor = Factor(pool, page_list, first_page, pairs, i, rank, real, starts, None, rows)
        if rows.packed == 1:
            return factor
        boundary = jnp.int32(rows.boundary)
        begin = ceil(first + ranks * rows.row, boundary) * boundary
        block, lane = divide(rank * rows.groups, pool.shape[1])
        return factor._replace(scales=(factor._lies(begin + block), lane))

    def place(self, column: Scalar) -> Int32[Array, " ranks"]:
        """The block of the pool that holds each rank's words of a column block."""
        return self._lies(self.starts + column)

    def words(self, place: Int32[Array, " ranks"]) -> Float[Array, "ranks columns"]:
        """What lies in these blocks, zero where a rank is not real."""
        at = self.pool.at[place[:, None], self._lane[None, :]]
        mask = jnp.broadcast_to(self.real[:, None], (len(self.real), self.pool.shape[1]))
        return plgpu.load(at, mask=mask, other=0)

    def numbers(
        self, words: Float[Array, "ranks columns"], nth: Scalar | int, column: Scalar
    ) -> Float[Array, "ranks columns"]:
        """The nth numbers in these words, which are those of a column block."""
        if self.rows.packed == 1:
            return words
        word_bits = 8 * words.dtype.itemsize
        bits = word_bits // self.rows.packed
        whole = lax.bitcast_convert_type(words, f"int{word_bits}").astype(jnp.int32)
        above = jnp.broadcast_to(jnp.int32(32 - bits * (1 + nth)), whole.shape)
        integers = lax.shift_right_arithmetic(
            lax.shift_left(whole, above), jnp.full_like(whole, 32 - bits)
        )
        return (integers.astype(jnp.float32) * self._scale(column)).astype(words.dtype)

    def _scale(self, column: Scalar) -> Float[Array, "ranks #columns"]:
        """Those of a column block; of the groups it touches, one after the other is put in."""
        rows, width = self.rows, self.pool.shape[1]
        first = lax.div(column * width, jnp.int32(rows.group))
        scale = self._load_scale(first)[:, None]
        if rows.touched > 1:
            group = lax.div(column * width + self._lane, jnp.full_like(self._lane, rows.group))
            for n in range(1, rows.touched):
                later = self._load_scale(first + n)[:, None]
                scale = jnp.where((group >= first + n)[None, :], later, scale)
        return scale

    def _load_scale(self, group: Scalar) -> Float[Array, " ranks"]:
        """Each rank's scale of a group, zero where there is none."""
        assert self.scales is not None, "weights stored in full have no scales"
        place, lane = self.scales
        block, lane = divide(lane + group, self.pool.shape[1])
        mask = self.real & (group < self.rows.groups)
        return plgpu.load(self.pool.at[place + block, lane], mask=mask, other=0).astype(jnp.float32)

    def _lies(self, block: Int32[Array, " ranks"]) -> Int32[Array, " ranks"]:
        """Where blocks of the factor's own count are in the pool."""
        page, rest = divide(block, self.rows.page)
        listed = self.page_list.at[pair_field(self.pairs, self.i, "pages") + page]
        split = pair_field(self.pairs, self.i, "split") == 1
        page = plgpu.load(listed, mask=self.real & split, other=page)
        return (self.first_page + page) * self.rows.page + rest

    @property
    def _lane(self) -> Int32[Array, " columns"]:
        return jnp.arange(self.pool.shape[1])


def pair_field(pairs: Ref, i: Scalar, field: str) -> Scalar:
    """A field of a pair; loaded where it is used, for registers are scarcer than loads."""
    return pairs[i, Pair._fields.index(field)]


def pick(choices: Sequence[int], index: Scalar) -> Scalar:
    """One of a few numbers known at compile time."""
    steps = enumerate(pairwise(choices), start=1)
    return sum((as_int(index >= n) * (b - a) for n, (a, b) in steps), jnp.int32(choices[0]))


def divide(a: Array, b: int) -> tuple[Array, Array]:
    """Quotient and remainder of numbers that are not negative."""
    if b == 1:
        return a, jnp.zeros_like(a)
    return lax.div(a, jnp.full_like(a, b)), lax.rem(a, jnp.full_like(a, b))


def ceil(a: Scalar, b: Scalar | int) -> Scalar:
    """The quotient, rounded up."""
    return lax.div(a + (b - 1), jnp.int32(b))


def as_int(condition: Bool[Array, ""]) -> Scalar:
    return condition.astype(jnp.int32)
