"""An open GGUF file: typed metadata, and tensors dequantised a block of rows at a time.

Reads that would leave the file, and values of another kind than asked for, are errors that name the
key or tensor, so a damaged file ends in a message. Host only: no jax; needs the `gguf` package.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from jslora.errors import ModelError

_BLOCK_ELEMENTS = 2**24
_DAMAGE = (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError)


class GgufFile:
    """Metadata by key and tensors by name.

    Attributes:
        shapes: tensor name → shape, outermost dimension first.

    Raises:
        ModelError: `gguf` is not installed, or the file is not a whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = _library()
        try:
            reader = _reader(self._gguf)(path)
        except _DAMAGE as error:
            raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from None
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file has none.

        Raises:
            ModelError: the value is not of that kind, or not finite.
        """
        if key not in self._fields:
            return default
        try:
            value = self._fields[key].contents()
        except _DAMAGE as error:
            raise ModelError(f"GGUF key {key} is unreadable: {error}") from None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ModelError(f"GGUF key {key} is {repr(value)[:60]}; expected {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """As `get`, for a key without which there is no model."""
        value = self.get(key, kind)
        if value is None:
            raise ModelError(f"the GGUF file lacks the key {key}")
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """The list at `key`, all of whose elements are of one kind."""
        values = self.need(key, list)
        for i, value in enumerate(values):
            if type(value) is not kind:
                found = repr(value)[:60]
                raise ModelError(f"GGUF key {key}[{i}] is {found}; expected {kind.__name__}")
        return values

    def read(self, name: str, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
        """A tensor as `dtype`, in float32 for no more than a block of rows at a time.

        Raises:
            ModelError: the `gguf` package cannot dequantise its type.
        """
        tensor, out = self._tensors[name], np.empty(self.shapes[name], dtype)
        data = tensor.data.reshape(out.shape[0], -1) if out.ndim > 1 else tensor.data[None]
        rows = out.reshape(data.shape[0], -1)
        step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            block = np.ascontiguousarray(data[start : start + step])
            try:
                rows[start : start + step] = self._gguf.dequantize(block, tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise ModelError(f"GGUF tensor {name}: type {kind} is not supported") from None
        return out


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "reading GGUF files needs the gguf package: pip install 'jslora[demo]'"
        ) from None
    return gguf


def _reader(library: ModuleType) -> Any:
    """The library's reader, which takes what is beyond the end of a file for nothing."""

    class Reader(library.GGUFReader):  # type: ignore[name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **kwargs: Any) -> Any:
            found = super()._get(int(offset), dtype, count, *order, **kwargs)
            if len(found) < int(count):
                raise ValueError(f"it ends before byte {int(offset) + found.itemsize * int(count)}")
            return found

    return Reader
