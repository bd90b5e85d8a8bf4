"""A safetensors file in memory → named arrays that view it, without a copy.

The library's own `deserialize` copies every tensor while it holds the interpreter lock, about 45 ms
per 100 MB in which the engine thread stands still; this reads the header and makes views. As in
the library the tensors must cover the data exactly, without gaps or overlaps; beyond it a name may
stand only once, and the header's size, the number of tensors and the dtypes are bounded.
Host only: no jax.
"""

import json
import math
from typing import Any

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


def parse(data: bytes) -> dict[str, np.ndarray]:
    """Read-only arrays over `data`, by name.

    Raises:
        AdapterRejected: `data` is not a safetensors file of float32, float16 and bfloat16 tensors
            within the bounds; see https://github.com/huggingface/safetensors for the format.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise AdapterRejected(f"the safetensors file is cut off: it has {len(data)} bytes")
    if size > MAX_HEADER:
        raise AdapterRejected(f"the safetensors header has {size} bytes; at most {MAX_HEADER}")
    header = _header(data[8 : 8 + size])
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise AdapterRejected(f"tensor {printable(name)} starts at byte {first}, not at {end}")
        end = last
    if end != len(data) - 8 - size:
        raise AdapterRejected(
            f"the tensors take {end} bytes; the file holds {len(data) - 8 - size}"
        )
    return {
        name: np.frombuffer(data, dtype, math.prod(shape), 8 + size + first).reshape(shape)
        for name, (dtype, shape, first, _) in spans.items()
    }


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


def _span(name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of a header entry."""
    shown = printable(name)
    if not name.isascii():
        raise AdapterRejected(f"tensor {shown} has a name that is not ASCII")
    # The library passes over further fields, so they are no reason to refuse a file.
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise AdapterRejected(f"tensor {shown} lacks one of dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise AdapterRejected(
            f"tensor {shown} has dtype {printable(entry['dtype'])}; {', '.join(DTYPES)} are read"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterRejected(f"tensor {shown} has a shape or offsets that are not sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise AdapterRejected(
            f"tensor {shown} of shape {shape} and dtype {entry['dtype']} cannot take "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
