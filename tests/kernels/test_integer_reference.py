"""The reference over integers is, bit by bit, the reference over the numbers they stand for."""

import re

import ml_dtypes
import numpy as np
import pytest
from lora_cases import SUMS, Pool, compiled, draw_inputs, everywhere, pack_work, run, setup

from jslora.batch import Bucket

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ALL = ("full", "int8", "int4")
SMALL = setup(2, 128, 4, 2, 64, 384, pages=512, page_size=8, storages=ALL)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("where", ["bottom", "split"])
@pytest.mark.parametrize("bucket", [Bucket(8, 8, 8), Bucket(64, 8, 8)])
def test_integers_are_the_numbers_they_stand_for(
    bucket: Bucket, where: str, storage: str, dtype: np.dtype
) -> None:
    pool = Pool(dtype, SMALL)
    placement, numbers = pool.place(everywhere(21), where, storage)
    exact, _ = pool.lay(numbers, where)
    for layer in (0, 1):
        of_integers, of_numbers = (
            run("reference", bucket, pool, [(place, numbers, 1, bucket.tokens)], layer)[2]
            for place in (placement, exact)
        )
        for found, right in zip(of_integers, of_numbers, strict=True):
            np.testing.assert_array_equal(found, right)


def test_nothing_copies_the_pool() -> None:
    """Neither in its own dtype nor in that of its bits."""
    pool, bucket = Pool(BF16, SMALL), Bucket(8, 8, 8)
    parts = [(*pool.place(everywhere(8), "split", name), n, n + 1) for n, name in enumerate(ALL)]
    xs, ys = draw_inputs(pool, bucket, parts)
    work, shape = pack_work("reference", pool, parts, bucket)
    add = compiled("reference", SMALL, shape, SUMS)
    pages = pool.rows.reshape(-1, *SMALL.page_shape)
    text = add.lower(ys, xs, [None] * 4, pages, np.int32(0), work).compile().as_text()
    made = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* ([\w-]+)\(", text)
    as_large = {
        (kind, what) for kind, shape, what in made
        if np.prod([int(n) for n in shape.split(",")]) == pages.size
    }  # fmt: skip
    assert {kind for kind, _ in as_large} == {"bf16"}
    assert {what for _, what in as_large} <= {"parameter", "bitcast", "get-tuple-element"}
