"""Digests of sampled tokens, by which processes notice that they do not compute the same.

Every process adds the tokens of each step, in order; after so many steps a window is full and has a
digest. Windows after a reset are other windows, because steps before it may be unread somewhere.

What is compared is what each process sampled from logits that all devices made together. So a
process that fell behind, lost a step or sampled otherwise is noticed, but wrong weights or adapter
pages on one host are not: they give the same wrong tokens everywhere. Those are guarded against
before: the model's files by `agreement`, an adapter's contents by their digest (`hosts`), and the
pages that it lies on by the numbered, hashed orders to write it (`transfers`, over `channel`).
Host only: no jax.
"""

import hashlib

import numpy as np


class SampledTokens:
    """The windows of one process; not safe for threads by itself."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.resets = self._steps = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, tokens: np.ndarray) -> tuple[int, int, str] | None:
        """(resets, window, digest), if the step filled a window."""
        self._digest.update(np.ascontiguousarray(tokens, "<i4").data)
        self._steps += 1
        if self._steps % self._every:
            return None
        digest, self._digest = self._digest.hexdigest(), hashlib.blake2b(digest_size=16)
        return self.resets, self._steps // self._every, digest

    def reset(self) -> None:
        self.resets += 1
        self._steps, self._digest = 0, hashlib.blake2b(digest_size=16)


class Comparison:
    """What all processes' windows were; each is compared once all have told it."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._told: dict[tuple[int, int], dict[int, str]] = {}
        self._resets = 0

    def add(self, process: int, resets: int, window: int, digest: str) -> str | None:
        """Take a window; what differs, in words, if something does."""
        if resets < self._resets:
            return None  # from before a reset that not all had read up to
        told = self._told.setdefault((resets, window), {})
        told[process] = digest
        if len(told) < self._processes:
            return None
        del self._told[resets, window]
        leaders = told[0]
        others = sorted(number for number, found in told.items() if found != leaders)
        return f"processes {others} sampled other tokens than process 0" if others else None

    def reset(self, resets: int) -> None:
        """Windows from before so many resets will not be complete any more."""
        self._resets = resets
        self._told = {key: told for key, told in self._told.items() if key[0] >= resets}
