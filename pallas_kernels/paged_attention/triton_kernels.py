"""The paged attention kernels in the Triton language (see `rows` and `tiles` for what they walk).

Scores are to base 2: SCALE has the factor that brings them there. Rows of the pool are counted with
32-bit numbers, and become 64-bit where they are turned into addresses.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    first_page, table, parts, items, count, q, pages, out, sums, stats,
    SCALE: tl.constexpr, TABLE: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, POSITIONS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Attend tiles of items: an item, a kv head, and some of the item's tokens."""
    lane = tl.arange(0, TILE)
    d = tl.arange(0, DIM)[None, :]
    offset = tl.arange(0, POSITIONS)
    layer = tl.load(first_page)
    for w in range(tl.program_id(0), tl.load(count) * (KV_HEADS * SPLITS), PROGRAMS):
        item = items + w // (KV_HEADS * SPLITS) * 6
        kv_head = w // SPLITS % KV_HEADS
        row = tl.load(item)
        before = w % SPLITS * TOKENS
        start = tl.load(item + 1) + before
        left = tl.load(item + 2) - before
        first = tl.load(item + 3)
        end = tl.where(left > 0, tl.load(item + 4) - tl.maximum(left - TOKENS, 0), first)
        part = tl.load(item + 5)
        tokens = tl.minimum(left, TOKENS)

        in_token = lane // LANES
        head = kv_head * GROUP + lane % LANES
        ours = (in_token < tokens) & (lane % LANES < GROUP)
        at = ((start + in_token) * HEADS + head)[:, None] * DIM + d
        query = tl.load(q + at, mask=ours[:, None], other=0.0)
        sees = end - tokens + 1 + in_token

        acc = tl.zeros((TILE, DIM), tl.float32)
        high = tl.full((TILE,), -1e30, tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        for from_position in range(first, end, POSITIONS):
            position = from_position + offset
            there = position < end
            page = tl.load(table + row * TABLE + position // PAGE_SIZE, mask=there, other=0)
            line = ((layer + page) * PAGE_SIZE + position % PAGE_SIZE).to(tl.int64)
            keys = pages + (line * (2 * KV_HEADS) + kv_head)[:, None] * DIM + d
            key = tl.load(keys, mask=there[:, None], other=0.0)
            value = tl.load(keys + KV_HEADS * DIM, mask=there[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
            visible = there[None, :] & (position[None, :] < sees[:, None])
            scores = tl.where(visible, scores, -1e30)
            new_high = tl.maximum(high, tl.max(scores, 1))
            weights = tl.exp2(scores - new_high[:, None])
            scaling = tl.exp2(high - new_high)
            total = total * scaling + tl.sum(weights, 1)
            acc = acc * scaling[:, None]
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
            high = new_high

        whole = tl.load(parts + row) <= 1
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + at, result, mask=(ours & whole)[:, None])
        if PARTS > 1:
            ours = ours & (whole == 0)
            at = (row * PARTS + part) * HEADS + head
            tl.store(sums + at[:, None] * DIM + d, acc, mask=ours[:, None])
            tl.store(stats + at, high, mask=ours)
            tl.store(stats + ROWS * PARTS * HEADS + at, total, mask=ours)


@triton.jit
def merge(
    parts, start, sums, stats, out,
    ROWS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):  # fmt: skip
    """One head of one row: the parts' sums, brought to a common maximum, over their weights."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    count = tl.load(parts + row)
    if count > 1:
        part = tl.arange(0, PADDED_PARTS)
        d = tl.arange(0, DIM)
        there = part < count
        at = (row * PARTS + part) * HEADS + head
        high = tl.load(stats + at, mask=there, other=-1e30)
        total = tl.load(stats + ROWS * PARTS * HEADS + at, mask=there, other=0.0)
        acc = tl.load(sums + at[:, None] * DIM + d[None, :], mask=there[:, None], other=0.0)
        scaling = tl.exp2(high - tl.max(high, 0))
        result = tl.sum(acc * scaling[:, None], 0) / tl.sum(total * scaling, 0)
        result = result.to(out.dtype.element_ty)
        tl.store(out + (tl.load(start + row) * HEADS + head) * DIM + d, result)
