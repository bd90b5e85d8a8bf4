"""How the GPU kernels tile their work: what one program attends at once, and how many there are.

The figures are for an H100: 132 processors with 64 warps and 64 Ki registers each. Compiled for
one, the kernels spill no registers unless one token's queries of a kv head exceed TILE_BYTES.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Rows

PROGRAMS = 132 * 8
"""Meant to be twice as many as run at once, so that the last even out the load; not timed."""
INTERPRETED_PROGRAMS = 2
"""An interpreter runs programs one after the other; several, so that they stride."""
STAGES = 3
"""Page ids are fetched two blocks ahead, the pages that they name one block ahead."""
LEAST = 16
"""Rows and columns of the smallest product of a tensor core."""
WARPS = 4
"""One group for Hopper's tensor cores."""
TILE_BYTES = 16 << 10
"""Queries of a tile at most: the sums of as many values take half the registers of four warps."""
POSITIONS = 64
"""Positions of a block at most: the scores of more would crowd the registers."""
BLOCK_BYTES = {2: 16 << 10, 4: 4 << 10}
"""Keys of a block at most, by the size of a number: four programs' blocks should fit a processor.

Products of float32 numbers are not for tensor cores, and hold their factors in registers.
"""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of an item that share a kv head, and the keys and values that they meet at once.

    Row r is query head r % lanes of the kv head, of token r // lanes.

    Attributes:
        group: query heads of a kv head, N / K.
        lanes: `group` rounded up to a power of two.
        tokens: of an item; those beyond the item's are masked, as are heads beyond the group.
        splits: tiles that an item is split in.
        rows: of the tile, a power of two.
        positions: of a block of keys and values.
    """

    group: int
    lanes: int
    tokens: int
    splits: int
    rows: int
    positions: int


def make_tile(q: jax.Array, pages: jax.Array, cut: Cut, *, prefill: bool) -> Tile:
    """The tile of a step with queries [T, N, D] and a pool [pages, S, 2, K, D]."""
    head_bytes = q.shape[2] * pages.dtype.itemsize
    group = q.shape[1] // pages.shape[3]
    lanes = power_of_two(group)
    wanted = power_of_two(cut.query_tile) if prefill else 1
    tokens = min(wanted, max(1, TILE_BYTES // (head_bytes * lanes)))
    rows = max(LEAST, tokens * lanes)
    block = BLOCK_BYTES[pages.dtype.itemsize] // head_bytes
    positions = max(LEAST, min(POSITIONS, block))
    return Tile(group, lanes, tokens, wanted // tokens, rows, positions)


def outputs(
    q: jax.Array, rows: Rows, cut: Cut
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What the first kernel writes: the output, and what is still to be merged.

    Of every part of a row and every head: the sum of the weighted values [B, parts, N, D], and the
    maximum of the scores and the sum of the weights [2, B, parts, N].
    """
    B, (_, N, D) = rows.context.shape[0], q.shape
    return (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, cut.parts, N, D), jnp.float32),
        jax.ShapeDtypeStruct((2, B, cut.parts, N), jnp.float32),
    )


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
