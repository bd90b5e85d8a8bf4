"""The LoRA kernels in the Triton language (see `segments` for what they walk).

Places in the pool are counted in blocks of COLUMNS numbers, in 32 bits, and become 64-bit where
addresses are made of them. ROW, PIECE and PAGE are the lengths of a factor's row, of the pieces it
lies in, and of a page, in such blocks. `where` holds the layer's first page and the layer. Fields
are loaded where they are used: registers are scarcer than loads.
"""

import triton
import triton.language as tl

# The fields of a pair and of an address, as in `segments.Pair` and `segments.Address`.
START = tl.constexpr(0)
TOKENS = tl.constexpr(1)
CHAIN = tl.constexpr(2)
PRODUCTS = tl.constexpr(3)
STRIDE = tl.constexpr(4)
LISTED = tl.constexpr(5)
SPLIT = tl.constexpr(6)
PAIR = tl.constexpr(8)
A = tl.constexpr(0)
B = tl.constexpr(1)
RANK = tl.constexpr(2)
ADDRESS = tl.constexpr(3)


@triton.jit
def shrink(
    where, pairs, count, table, page_list, pool, x, low,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    ROW: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr,
    SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write the low-rank products; an item is a pair, a module, and a part of the columns."""
    part: tl.constexpr = (ROW + SPLITS - 1) // SPLITS
    token = tl.arange(0, SPAN)
    lane = tl.arange(0, COLUMNS)
    for w in range(tl.program_id(0), tl.load(count) * (len(MODULES) * SPLITS), PROGRAMS):
        split = w % SPLITS
        module = w // SPLITS % len(MODULES)
        i = w // (SPLITS * len(MODULES))
        pair = pairs + i * PAIR
        at = (tl.load(where + 1) * ALL_MODULES + _pick(MODULES, module)) * PAIRS + i
        address = table + at * ADDRESS
        first = tl.minimum(split * part, ROW)
        end = tl.minimum(first + part, ROW)
        for from_rank in range(0, tl.load(address + RANK), RANKS):
            rank = from_rank + tl.arange(0, RANKS)
            real = rank < tl.load(address + RANK)
            ours = (token < tl.load(pair + TOKENS))[:, None]
            mine = x + (tl.load(pair + START) + token).to(tl.int64)[:, None] * (ROW * COLUMNS)
            starts = tl.load(address + A) * PIECE + rank * ROW
            # Blocks that follow each other in the pool take one loop: a row's, or a piece's.
            if ROW == PIECE:
                run = ROW
                first_run = 0
                end_run = 1
            else:
                run = tl.where(tl.load(pair + SPLIT) == 1, PIECE, ROW)
                first_run = first // run
                end_run = (end + run - 1) // run
            total = tl.zeros((SPAN, RANKS), tl.float32)
            for r in range(first_run, end_run):
                place = _place(where, page_list, pair, starts + r * run, real, PAGE) - r * run
                numbers = pool + place.to(tl.int64)[:, None] * COLUMNS + lane[None, :]
                for c in range(tl.maximum(first, r * run), tl.minimum(end, (r + 1) * run)):
                    columns = c * COLUMNS + lane[None, :]
                    inputs = tl.load(mine + columns, mask=ours, other=0.0)
                    factor = tl.load(numbers + c * COLUMNS, mask=real[:, None], other=0.0)
                    total = tl.dot(inputs, tl.trans(factor), total, input_precision="ieee")
            base = (split * len(MODULES) + module) * LOW + tl.load(pair + PRODUCTS) // PEERS
            stride = tl.load(pair + STRIDE) // PEERS
            products = low + base + token[:, None] * stride + rank[None, :]
            tl.store(products, total, mask=ours & real[None, :])


@triton.jit
def expand(
    where, pairs, count, table, scale, page_list, pool, low, y,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Add to y, in its place."""
    _expand(
        where, pairs, count, table, scale, page_list, pool, low, y, y,
        MODULES, ALL_MODULES, PAIRS, TILES, ROWS, PIECES, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
        SPLITS, LOW, PEERS, PROGRAMS, "sum",
    )  # fmt: skip


@triton.jit
def expand_into(
    where, pairs, count, table, scale, page_list, pool, low, y, out,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """Make something else of the sums: `out` is the stream ("residual"), or new ("gated")."""
    _expand(
        where, pairs, count, table, scale, page_list, pool, low, y, out,
        MODULES, ALL_MODULES, PAIRS, TILES, ROWS, PIECES, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
        SPLITS, LOW, PEERS, PROGRAMS, FINISH,
    )  # fmt: skip


@triton.jit
def _expand(
    where, pairs, count, table, scale, page_list, pool, low, y, out,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """An item is a span of tokens and a column block of `out`; it walks the span's chain.

    TILES are the column blocks at which modules begin, and at which the last one ends. Where y is
    wider (WIDTH), they count from where this device's own begin in it, the third of `where`.
    """
    wide: tl.constexpr = TILES[1] if FINISH == "gated" else WIDTH
    tiles: tl.constexpr = TILES[1] if FINISH == "gated" else TILES[len(MODULES)]
    token = tl.arange(0, SPAN)
    lane = tl.arange(0, COLUMNS)
    for w in range(tl.program_id(0), tl.load(count) * tiles, PROGRAMS):
        tile = w % tiles
        head = w // tiles
        result, ranks = _sums(
            where, pairs, table, scale, page_list, pool, low, y, head, tile,
            MODULES, ALL_MODULES, PAIRS, TILES, ROWS, PIECES, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
            SPLITS, LOW, PEERS, FINISH,
        )  # fmt: skip
        if FINISH == "gated":
            up, _ = _sums(
                where, pairs, table, scale, page_list, pool, low, y, head, tile + tiles,
                MODULES, ALL_MODULES, PAIRS, TILES, ROWS, PIECES, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
                SPLITS, LOW, PEERS, FINISH,
            )  # fmt: skip
            result = result / (1 + tl.exp(-result)) * up
        ours = token < tl.load(pairs + head * PAIR + TOKENS)
        ours = ours & (tl.load(pairs + head * PAIR + CHAIN) > 0)
        if FINISH == "sum":
            ours = ours & (ranks > 0)
        mine = (tl.load(pairs + head * PAIR + START) + token).to(tl.int64)[:, None]
        column = tile if TILES[len(MODULES)] == WIDTH else tile + tl.load(where + 2)
        at = out + mine * (wide * COLUMNS) + column * COLUMNS + lane[None, :]
        if FINISH == "residual":
            before = tl.load(at, mask=ours[:, None], other=0.0)
            result = before.to(tl.float32) + result.to(before.dtype).to(tl.float32)
        tl.store(at, result.to(out.dtype.element_ty), mask=ours[:, None])


@triton.jit
def _sums(
    where, pairs, table, scale, page_list, pool, low, y, head, tile,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A block of base output with the deltas of a chain, and the ranks of these."""
    token = tl.arange(0, SPAN)
    lane = tl.arange(0, COLUMNS)
    module = 0
    for n in tl.static_range(1, len(MODULES)):
        module += (tile >= TILES[n]).to(tl.int32)
    column = tile - _pick(TILES, module)
    lists = (tl.load(where + 1) * ALL_MODULES + _pick(MODULES, module)) * PAIRS
    all_ranks = 0
    delta = tl.zeros((SPAN, COLUMNS), tl.float32)
    for i in range(head, head + tl.load(pairs + head * PAIR + CHAIN)):
        pair = pairs + i * PAIR
        address = table + (lists + i) * ADDRESS
        share = tl.load(address + RANK)
        ranks = share * PEERS
        all_ranks += ranks
        for from_rank in range(0, ranks, RANKS):
            rank = from_rank + tl.arange(0, RANKS)
            real = rank < ranks
            mask = (token < tl.load(pair + TOKENS))[:, None] & real[None, :]
            at = module * LOW + tl.load(pair + PRODUCTS) // PEERS
            made = rank
            if PEERS > 1:  # by one of them after the other, each its share
                made += rank // share * (SPLITS * len(MODULES) * LOW - share)
            stride = tl.load(pair + STRIDE) // PEERS
            products = low + at + token[:, None] * stride + made[None, :]
            product = tl.load(products, mask=mask, other=0.0)
            for split in tl.static_range(1, SPLITS):
                part = tl.load(products + split * len(MODULES) * LOW, mask=mask, other=0.0)
                product += part
            starts = tl.load(address + B) * _pick(PIECES, module) + rank * _pick(ROWS, module)
            place = _place(where, page_list, pair, starts + column, real, PAGE)
            numbers = pool + place.to(tl.int64)[:, None] * COLUMNS + lane[None, :]
            factor = tl.load(numbers, mask=real[:, None], other=0.0)
            scaled = (product * tl.load(scale + lists + i)).to(factor.dtype)
            delta = tl.dot(scaled, factor, delta, input_precision="ieee")
    mine = (tl.load(pairs + head * PAIR + START) + token).to(tl.int64)[:, None]
    own = tile if TILES[len(MODULES)] == WIDTH else tile + tl.load(where + 2)
    at = y + mine * (WIDTH * COLUMNS) + own * COLUMNS + lane[None, :]
    ours = token < tl.load(pairs + head * PAIR + TOKENS)
    if FINISH == "sum":
        ours = ours & (all_ranks > 0)
    return delta + tl.load(at, mask=ours[:, None], other=0.0), all_ranks


@triton.jit
def _place(where, page_list, pair, block, real, PAGE: tl.constexpr):
    """Where in the pool each rank's block lies, counted in blocks.

    `block` counts from the layer's page 0, or, when the pair is split, from the adapter's own
    start, so that its page must be looked up.
    """
    page = block // PAGE
    split = tl.load(pair + SPLIT) == 1
    page = tl.load(page_list + tl.load(pair + LISTED) + page, mask=real & split, other=page)
    return (tl.load(where) + page) * PAGE + block % PAGE


@triton.jit
def _pick(CHOICES: tl.constexpr, index):
    """One of a few numbers known at compile time."""
    picked = CHOICES[0]
    for n in tl.static_range(1, len(CHOICES)):
        picked = tl.where(index >= n, CHOICES[n], picked)
    return picked
