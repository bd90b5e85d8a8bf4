"""Arrays as what changed since the last array of the same name, shape and type.

Most of a step's numbers are those of the step before. Both sides keep the last array of each kind;
the sender finds what differs, bit for bit, and sends that, or the whole where that is smaller.
Invariants: both sides see the same arrays in the same order, so that they keep the same ones; and
arrays are never written after they were given or made, so that they are kept without a copy.
Host only: no jax.
"""

import math

import msgspec
import numpy as np

MAX_NUMBERS = 2**26
"""Of one array; what claims to be larger is refused before memory is taken for it."""

_WORDS = {"<i4": np.uint32, "<u4": np.uint32, "<f4": np.uint32, "|b1": np.uint8, "|u1": np.uint8}
"""Types that travel, and what their bits are compared and sent as."""

_Key = tuple[str, tuple[int, ...], str]


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """An array, or what of it differs from the last of its kind.

    Attributes:
        where: flat uint32 indices of the numbers that changed; None if all are here.
        numbers: their bits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    where: bytes | None
    numbers: bytes


class Encoder:
    """The sending side."""

    def __init__(self) -> None:
        self._last: dict[_Key, np.ndarray] = {}

    def encode(self, name: str, array: np.ndarray) -> Delta:
        """What to send of an array, which must not be written any more."""
        dtype = array.dtype.str
        words = np.ascontiguousarray(array).reshape(-1).view(_WORDS[dtype])
        key = name, array.shape, dtype
        last, self._last[key] = self._last.get(key), words
        if last is not None:
            where = np.flatnonzero(words != last)
            if where.size * (4 + words.itemsize) < words.nbytes:
                changed = words[where].tobytes()
                return Delta(name, array.shape, dtype, where.astype(np.uint32).tobytes(), changed)
        return Delta(name, array.shape, dtype, None, words.tobytes())


class Decoder:
    """The receiving side."""

    def __init__(self) -> None:
        self._last: dict[_Key, np.ndarray] = {}

    def decode(self, delta: Delta) -> np.ndarray:
        """The array that was given to the sender.

        Raises:
            ValueError: it is none that an `Encoder` would have sent.
        """
        if delta.dtype not in _WORDS or not 0 <= math.prod(delta.shape) <= MAX_NUMBERS:
            raise ValueError(f"{delta.name}: no array is {delta.shape} of {delta.dtype}")
        kind, key = _WORDS[delta.dtype], (delta.name, delta.shape, delta.dtype)
        numbers = np.frombuffer(delta.numbers, kind)
        if delta.where is not None:
            numbers = self._changed(key, np.frombuffer(delta.where, np.uint32), numbers)
        if numbers.size != math.prod(delta.shape):
            raise ValueError(f"{delta.name}: {numbers.size} numbers in {delta.shape}")
        self._last[key] = numbers
        return numbers.view(np.dtype(delta.dtype)).reshape(delta.shape)

    def _changed(self, key: _Key, where: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        last = self._last.get(key)
        if last is None or where.size != numbers.size or (where >= last.size).any():
            raise ValueError(f"{key[0]}: {where.size} changes of an array that is not known")
        whole = last.copy()
        whole[where] = numbers
        return whole
