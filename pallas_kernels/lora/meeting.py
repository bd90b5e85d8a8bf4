"""How low-rank products come together where several devices hold parts of every factor.

A device makes the products of its part of A. Either the parts are shares of the ranks: then all
devices' products are gathered, and B, of which a device has the rows of all ranks, takes them in
turn. Or they are columns: then the products are parts of sums, which are added up, and a device has
B for its own columns of the output. Only these products travel, a number for each token and rank.
Whatever a step left unwritten in the buffers travels with them, and is not read there either.
"""

from enum import Enum
from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Float


class Part(Enum):
    """What a device has of every A."""

    RANKS = "ranks"
    COLUMNS = "columns"


class Meeting(NamedTuple):
    """Between the `devices` of a mesh axis, within `jax.shard_map`."""

    axis: str
    devices: int
    part: Part

    @property
    def peers(self) -> int:
        """Devices whose products are side by side afterwards."""
        return self.devices if self.part is Part.RANKS else 1

    def meet(self, low: Float[Array, "*n"]) -> Float[Array, "peers *n"]:
        """Everyone's products."""
        if self.part is Part.RANKS:
            return lax.all_gather(low, self.axis)
        return lax.psum(low, self.axis)[None]

    def first_column(self, width: int) -> Array | None:
        """Where a device's own `width` columns of y begin; None if they are all of it."""
        return None if self.part is Part.RANKS else lax.axis_index(self.axis) * width
