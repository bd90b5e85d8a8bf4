"""A safetensors file in memory → named arrays that view it, without a copy; or its header alone.

The library's own `deserialize` copies every tensor while it holds the interpreter lock, about 45 ms
per 100 MB in which the engine thread stands still; this reads the header and makes views. As in
the library the tensors must cover the data exactly, without gaps or overlaps; beyond it a name may
stand only once, and the header's size, the number of tensors and the dtypes are bounded.
Host only: no jax.
"""

import json
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jslora.errors import AdapterRejected
from jslora.logs import printable

MAX_HEADER = 2**20
MAX_TENSORS = 8192
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_FIELDS = {"dtype", "shape", "data_offsets"}
# Bits of the exponent, which are all set in numbers that are not finite.
_EXPONENTS: dict[np.dtype, np.uint16 | np.uint32] = {
    DTYPES["F32"]: np.uint32(0x7F800000),
    DTYPES["F16"]: np.uint16(0x7C00),
    DTYPES["BF16"]: np.uint16(0x7F80),
}


class Span(NamedTuple):
    """A tensor's place: bytes from `first` to before `last` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.last - self.first


def view(data: bytes, span: Span) -> np.ndarray:
    """The tensor at `span` of a whole file, read-only and not copied."""
    return np.frombuffer(data, span.dtype, math.prod(span.shape), span.first).reshape(span.shape)


def all_finite(tensor: np.ndarray) -> bool:
    """Whether no number of a contiguous tensor of one of `DTYPES` is infinite or a NaN.

    NumPy's own `isfinite` takes ten times as long over bfloat16.
    """
    exponent = _EXPONENTS[tensor.dtype]
    return not ((tensor.view(exponent.dtype) & exponent) == exponent).any()


def header_end(data: bytes, total: int) -> int:
    """Where the header of a file of `total` bytes ends, which begins with `data`.

    Raises:
        AdapterRejected: the file is too short for its header, or the header is too large.
    """
    size = int.from_bytes(data[:8], "little")
    if total < 8 or size > total - 8:
        raise AdapterRejected(f"the safetensors file is cut off: it has {total} bytes")
    if size > MAX_HEADER:
        raise AdapterRejected(f"the safetensors header has {size} bytes; at most {MAX_HEADER}")
    return 8 + size


def parse_header(data: bytes, total: int) -> dict[str, Span]:
    """Where the tensors of a file of `total` bytes lie; `data` is its start, header and all.

    Raises:
        AdapterRejected: it is not a safetensors file of float32, float16 and bfloat16 tensors
            within the bounds; see https://github.com/huggingface/safetensors for the format.
    """
    start = header_end(data, total)
    header = _header(data[8:start])
    spans = {name: _span(name, entry, start) for name, entry in header.items()}
    end = start
    for name, span in sorted(spans.items(), key=lambda item: item[1][2:]):
        if span.first != end:
            raise _refused(name, f"starts at byte {span.first - start}, not at {end - start}")
        end = span.last
    if end != total:
        raise AdapterRejected(
            f"the tensors take {end - start} bytes; the file holds {total - start}"
        )
    return spans


def _header(text: bytes) -> dict[str, Any]:
    """Name → entry, the metadata left out."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"the safetensors header is not JSON: {printable(error)}") from None
    if not isinstance(header, dict):
        raise AdapterRejected("the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise AdapterRejected("the safetensors header's __metadata__ is not a map of strings")
    if len(header) > MAX_TENSORS:
        raise AdapterRejected(f"the file holds {len(header)} tensors; at most {MAX_TENSORS}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _span(name: str, entry: object, start: int) -> Span:
    """The place of a header entry's tensor; its offsets count from `start`."""
    if not name.isascii():
        raise _refused(name, "has a name that is not ASCII")
    # The library passes over further fields, so they are no reason to refuse a file.
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        raise _refused(name, "lacks one of dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _refused(name, f"has dtype {printable(code)}; {', '.join(DTYPES)} are read")
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused(name, "has a shape or offsets that are not sizes")
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize:
        raise _refused(name, f"of shape {shape} and dtype {code} cannot take {last - first} bytes")
    return Span(dtype, tuple(shape), start + first, start + last)


def _refused(name: str, reason: str) -> AdapterRejected:
    return AdapterRejected(f"tensor {printable(name)} {reason}")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
