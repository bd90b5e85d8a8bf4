"""One adapter's contents, as all need them who compute with it. Host only: no jax."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """An adapter's contents as they are stored; two with the same digest are equal.

    Attributes:
        a_offset, b_offset, rank, scale: see `PackedAdapter`.
        n_pages: pages it takes on the device; the same ids in every layer.
        packed_bytes: size of its blob, of all devices of this process.
        storage: one of `pieces.STORAGES`.
        error: see `AdapterInfo.output_error`.
    """

    digest: str
    a_offset: Int32[np.ndarray, "L 7"]
    b_offset: Int32[np.ndarray, "L 7"]
    rank: Int32[np.ndarray, "L 7"]
    scale: Float32[np.ndarray, "L 7"]
    n_pages: int
    packed_bytes: int
    storage: str = "full"
    error: float = 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def stored_digest(digest: str, storage: str) -> str:
    """The digest of a version: its contents', and another for each way of rounding them."""
    if storage == "full":
        return digest
    return hashlib.sha256(f"{digest}:{storage}".encode()).hexdigest()
