"""The safetensors reader against the safetensors library, on valid and on damaged files."""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_folders import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from jslora.adapters.tensors import MAX_HEADER, MAX_TENSORS, parse_header, view
from jslora.errors import AdapterRejected

VALID = save(
    {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([[1.5, -2]], np.float16),
        "c": np.arange(5).astype(ml_dtypes.bfloat16),
        "d": np.zeros((0, 4), np.float32),
    },
    metadata={"format": "pt"},
)
OURS_ALONE = re.compile("has dtype|not ASCII|stands twice|at most")


def parse(data: bytes) -> dict[str, np.ndarray]:
    return {name: view(data, span) for name, span in parse_header(data, len(data)).items()}


def _agrees_with_the_library(data: bytes) -> bool:
    """Parse, and hold the answer against the library's; some bounds are ours alone."""
    try:
        found = parse(data)
    except AdapterRejected as error:
        if not OURS_ALONE.search(error.message):
            with pytest.raises(SafetensorError):
                deserialize(data)
        return False
    expected = dict(deserialize(data))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert list(tensor.shape) == expected[name]["shape"]
        assert tensor.tobytes() == bytes(expected[name]["data"])
        assert not tensor.flags.writeable
    return True


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_valid_files_are_read_as_by_the_library(dtype: str) -> None:
    assert _agrees_with_the_library(VALID)
    written = tensors(dtype=dtype)
    data = save(written)
    assert _agrees_with_the_library(data)
    for name, tensor in parse(data).items():
        assert tensor.dtype == written[name].dtype
        np.testing.assert_array_equal(tensor, written[name])


@settings(deadline=None, max_examples=1500)
@given(st.data())
def test_damaged_files_are_refused_or_read_as_by_the_library(data: st.DataObject) -> None:
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "drop", "insert"])):
            case "flip" if damaged:
                damaged[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del damaged[at:]
            case "drop":
                del damaged[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    _agrees_with_the_library(bytes(damaged))


ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
VALUES = st.one_of(
    st.none(),
    st.integers(-1, 40),
    st.integers(2**62, 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 30) | st.just(2**63) | st.booleans(), max_size=3),
    st.sampled_from(["F32", "F16", "BF16", "F64", "I8"]),
)


@settings(deadline=None, max_examples=1000)
@given(
    entries=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "\ud800", ""]),
        st.fixed_dictionaries({}, optional=dict.fromkeys([*ENTRY, "extra"], VALUES)).map(
            lambda changes: {**ENTRY, **changes}
        ),
        max_size=3,
    ),
    held=st.integers(0, 48),
)
def test_any_header_is_refused_or_read_as_by_the_library(
    entries: dict[str, Any], held: int
) -> None:
    _agrees_with_the_library(_file(entries, b"x" * held))


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_further_fields_are_passed_over_as_by_the_library() -> None:
    assert _agrees_with_the_library(_file({"a": {**ENTRY, "more": 1}}, b"x" * 24))


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**ENTRY, **changes}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut off: it has 0 bytes"),
        (b"\x00" * 7, "is cut off"),
        (b"\x40" + b"\x00" * 7 + b"{}", "is cut off"),
        (b"\xff" * 16, "is cut off"),
        (_file(b" " * (MAX_HEADER + 1)), "header has 1048577 bytes; at most 1048576"),
        (_file(b""), "is not JSON"),
        (_file(b"{"), "is not JSON"),
        (_file(b"\xff{}"), "is not JSON"),
        (_file(b"[" * 100000), "is not JSON"),
        (_file(b"[]"), "not a JSON object"),
        (_file(b'{"a": 1, "a": 1}'), "stands twice"),
        (_file({"__metadata__": {"a": 1}}), "not a map of strings"),
        (_file({f"t{i}": 0 for i in range(MAX_TENSORS + 1)}), "holds 8193 tensors; at most 8192"),
        (_file({"a": 5}), "tensor a lacks one of"),
        (_file({"a": {"dtype": "F32", "shape": [2, 3]}}), "tensor a lacks one of"),
        (_file({"ä": ENTRY}), "not ASCII"),
        (_file(_entry(dtype="F64")), "tensor a has dtype F64; F32, F16, BF16 are read"),
        (_file(_entry(dtype=["F32"])), "tensor a has dtype"),
        (_file(_entry(shape=[2, -3])), "shape or offsets that are not sizes"),
        (_file(_entry(shape=[2, True])), "shape or offsets that are not sizes"),
        (_file(_entry(shape=[1] * 9)), "shape or offsets that are not sizes"),
        (_file(_entry(data_offsets=[0])), "shape or offsets that are not sizes"),
        (_file(_entry(shape=[2, 4])), "cannot take 24 bytes"),
        (_file(_entry(shape=[2**40, 2**40])), "cannot take 24 bytes"),
        (_file(_entry(data_offsets=[24, 0])), "cannot take -24 bytes"),
        (_file(_entry(data_offsets=[4, 28])), "starts at byte 4, not at 0"),
        (_file({"a": ENTRY, "b": ENTRY}), "starts at byte 0, not at 24"),
        (_file({"a": ENTRY}, b"x" * 23), "take 24 bytes; the file holds 23"),
        (_file({"a": ENTRY}, b"x" * 25), "take 24 bytes; the file holds 25"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        parse(data)
    assert not _agrees_with_the_library(data)
