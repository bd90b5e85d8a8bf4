"""The host tier: packed blobs in memory, by digest, the least recently used first to leave.

Not safe for threads by itself: its store's lock is held around every call. Host only: no jax.
"""

from collections import OrderedDict

import numpy as np
from jaxtyping import Float


class HostTier:
    """Never more than `limit` bytes of blobs."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._blobs: OrderedDict[str, Float[np.ndarray, "d L n E"]] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._blobs

    def __len__(self) -> int:
        return len(self._blobs)

    def get(self, digest: str) -> Float[np.ndarray, "d L n E"] | None:
        if digest in self._blobs:
            self._blobs.move_to_end(digest)
        return self._blobs.get(digest)

    def put(self, digest: str, blob: Float[np.ndarray, "d L n E"]) -> None:
        """Keep a blob, in place of as many others as it takes; one that is there already stays."""
        assert blob.nbytes <= self.limit, f"{blob.nbytes} of {self.limit} bytes"
        if self.get(digest) is not None:
            return
        self._blobs[digest] = blob
        self.bytes += blob.nbytes
        while self.bytes > self.limit:
            _, oldest = self._blobs.popitem(last=False)
            self.bytes -= oldest.nbytes

    def drop(self, digest: str) -> None:
        blob = self._blobs.pop(digest, None)
        if blob is not None:
            self.bytes -= blob.nbytes
