"""Rounding to integers: as near as groups allow, and found again in the words that hold them."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jslora.adapters.quantize import Changes, Quantized, from_words, quantize, to_words
from pallas_kernels.lora.pieces import BITS, LARGEST, scale_groups

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
STORED = sorted(BITS)
TINY = float(np.finfo(np.float32).tiny)

storages, dtypes = st.sampled_from(STORED), st.sampled_from([BF16, F32])
floats = st.floats(-(2.0**99), 2.0**99, width=32) | st.just(0.0) | st.integers(-9, 9).map(float)


@settings(deadline=None, max_examples=200)
@given(st.data(), storages, dtypes)
def test_no_number_is_off_by_more_than_its_group_allows(
    data: st.DataObject, storage: str, dtype: np.dtype
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.sampled_from([8, 48, 96, 256])))
    rows = data.draw(arrays(np.float32, shape, elements=floats))
    found, largest = quantize(rows, storage, dtype), LARGEST[storage]
    groups = scale_groups(shape[1], storage)
    assert found.scales.shape == (shape[0], groups) and found.scales.dtype == dtype
    assert found.integers.dtype == np.int8 and abs(found.integers.astype(int)).max() <= largest
    scales = found.scales.astype(np.float64)
    assert ((scales == 0) | (scales >= TINY)).all()
    given_, numbers = (
        a.astype(np.float64).reshape(shape[0], groups, -1) for a in (rows, found.numbers)
    )
    most = abs(given_).max(axis=2)
    # At most 0.76 of the largest number is told from it; the dtype itself is off by a 256th.
    allowed = (0.25 * most if storage == "int4" else 0) + 0.6 * most / largest + 2 * TINY * largest
    assert (abs(numbers - given_).max(axis=2) <= allowed + most / 200).all()


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.0075), ("int4", 0.105)])
def test_normal_numbers_are_off_by_so_much(storage: str, most: float) -> None:
    rows = np.random.default_rng(0).normal(size=(32, 4096)).astype(np.float32)
    off = quantize(rows, storage, BF16).numbers.astype(np.float32) - rows
    assert most / 2 < math.sqrt(np.square(off).mean()) < most


@settings(deadline=None)
@given(st.data(), storages, dtypes)
def test_a_column_is_found_in_its_lane(data: st.DataObject, storage: str, dtype: np.dtype) -> None:
    bits, most = BITS[storage], LARGEST[storage]
    k = 8 * dtype.itemsize // bits
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9).map(lambda n: n * k)))
    integers = data.draw(arrays(np.int8, shape, elements=st.integers(-most, most)))
    words = to_words(integers, storage, dtype)
    assert words.shape == (shape[0], shape[1] // k) and words.dtype == dtype
    np.testing.assert_array_equal(from_words(words, storage), integers)
    row, column = (data.draw(st.integers(0, n - 1)) for n in shape)
    lane, word = divmod(column, shape[1] // k)
    held = int(words.view(f"u{dtype.itemsize}")[row, word]) >> (bits * lane) & (2**bits - 1)
    assert held == int(integers[row, column]) % 2**bits


@pytest.mark.parametrize("storage", STORED)
def test_parts_of_a_row_are_rounded_as_if_alone(storage: str) -> None:
    rows = np.random.default_rng(1).normal(size=(3, 768)).astype(np.float32)
    whole = quantize(rows, storage, BF16, parts=4)
    for n, part in enumerate(np.split(rows, 4, axis=1)):
        alone = quantize(part, storage, BF16)
        np.testing.assert_array_equal(np.split(whole.integers, 4, axis=1)[n], alone.integers)
        np.testing.assert_array_equal(np.split(whole.scales, 4, axis=1)[n], alone.scales)


def test_the_product_is_rounded_once() -> None:
    """127 times the smallest number above 1 needs more bits than bfloat16 has."""
    scale = np.array([[1 + 2**-7]], BF16)
    assert Quantized(np.array([[127]], np.int8), scale).numbers == BF16.type(127 * (1 + 2**-7))


def test_the_error_is_that_of_the_products() -> None:
    random = np.random.default_rng(2)
    changes, changed, total = Changes(), 0.0, 0.0
    for rank, scale in ((3, 0.5), (8, 2.0)):
        a, b = random.normal(size=(rank, 64)), random.normal(size=(rank, 96))
        given_ = [x.astype(np.float32) for x in (a, b)]
        rounded = [quantize(x, "int8", BF16).numbers for x in given_]
        changes.add(given_, rounded, np.float32(scale))
        before, after = (y.astype(float).T @ x.astype(float) for x, y in (given_, rounded))
        changed += scale**2 * np.square(before - after).sum()
        total += scale**2 * np.square(before).sum()
    assert changes.error == pytest.approx(math.sqrt(changed / total), rel=1e-4)


@pytest.mark.parametrize("exponents", [(0, 0), (60, 60), (-60, -60), (126, -126), (-20, 100)])
def test_the_error_does_not_depend_on_how_large_weights_are(exponents: tuple[int, int]) -> None:
    """Squares of their squares are beyond what float32 holds."""
    random = np.random.default_rng(3)
    given_ = [np.clip(random.normal(size=(4, 64)), -1.9, 1.9).astype(np.float32) for _ in range(2)]
    rounded = [quantize(x, "int8", F32).numbers for x in given_]
    plain, found = Changes(), Changes()
    plain.add(given_, rounded, np.float32(1))
    sized = [
        [np.ldexp(x, power) for x, power in zip(side, exponents, strict=True)]
        for side in (given_, rounded)
    ]
    found.add(*sized, np.float32(2.0**100))
    assert found.error == pytest.approx(plain.error, rel=1e-4) and found.error > 1e-3


def test_nothing_changes_nothing() -> None:
    changes = Changes()
    zeros = [np.zeros((2, 32), np.float32)] * 2
    changes.add(zeros, zeros, np.float32(1))
    assert changes.error == 0 and not quantize(zeros[0], "int4", F32).numbers.any()
