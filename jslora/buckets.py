"""The short list of step shapes that are compiled at start-up, and the choice among them.

A step whose rows all have one token runs in a decode bucket (T = B); any other runs in a mixed
bucket with the most rows. The smallest has 8 rows: XLA:CPU's one-row bf16 products are many times
slower than eight-row ones. The smallest mixed one is for a short prompt, or what the prefix cache
left of one, beside rows that decode. Host only: no jax.
"""

from jslora.batch import Bucket

SMALLEST = 8


def make_buckets(max_rows: int, max_tokens: int, pages: int) -> list[Bucket]:
    """Powers of two up to the limits, each rounded up to one; mixed ones hold all rows."""
    rows = [SMALLEST]
    while rows[-1] < max_rows:
        rows.append(2 * rows[-1])
    tokens = [2 * rows[-1]]
    while tokens[-1] < max_tokens:
        tokens.append(2 * tokens[-1])
    decode = [Bucket(n, n, pages) for n in rows]
    return decode + [Bucket(n, rows[-1], pages) for n in tokens]


def choose(buckets: list[Bucket], lengths: list[int]) -> Bucket:
    """The smallest bucket for rows of these lengths; none is an error of the scheduler's."""
    total, rows = sum(lengths), len(lengths)
    decode = max(lengths) == 1
    fits = [
        bucket
        for bucket in buckets
        if bucket.prefill != decode and bucket.tokens >= total and bucket.rows >= rows
    ]
    assert fits, f"no bucket for {rows} rows with {total} tokens among {buckets}"
    return min(fits)
