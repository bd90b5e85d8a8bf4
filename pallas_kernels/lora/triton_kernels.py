"""The LoRA kernels in the Triton language (see `segments` for what they walk).

Places in the pool are counted in blocks of COLUMNS words, in 32 bits, and become 64-bit where
addresses are made of them. `where` holds the layer's first page and the layer. Fields are loaded
where they are used: registers are scarcer than loads.

STORAGES has of each way in which weights may be stored its number, how many numbers are packed in a
word, and how many groups of columns, each with a scale, a block touches at most. ROWS has of each,
behind each other, how long a row of words is, the pieces it lies in, both in blocks, how many
groups a row has, how many columns a group, and of how many blocks scales begin on a multiple (see
`tiles.Rows`); each is one number for each module where an item may be of several.
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
STORAGE = tl.constexpr(7)
PAIR = tl.constexpr(8)
A = tl.constexpr(0)
B = tl.constexpr(1)
RANK = tl.constexpr(2)
ADDRESS = tl.constexpr(3)

# Places in an entry of STORAGES, and among the LENGTHS of each in ROWS.
NUMBER = tl.constexpr(0)
PACKED = tl.constexpr(1)
TOUCHED = tl.constexpr(2)
ROW = tl.constexpr(0)
PIECE = tl.constexpr(1)
GROUPS = tl.constexpr(2)
GROUP = tl.constexpr(3)
BOUNDARY = tl.constexpr(4)
LENGTHS = tl.constexpr(5)


@triton.jit
def shrink(
    where, pairs, count, table, page_list, pool, x, low,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    STORAGES: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write the low-rank products; an item is a pair, a module, and a part of the columns."""
    for w in range(tl.program_id(0), tl.load(count) * (len(MODULES) * SPLITS), PROGRAMS):
        split = w % SPLITS
        module = w // SPLITS % len(MODULES)
        i = w // (SPLITS * len(MODULES))
        pair = pairs + i * PAIR
        at = (tl.load(where + 1) * ALL_MODULES + _pick(MODULES, module)) * PAIRS + i
        for n in tl.static_range(len(STORAGES)):
            _shrink(
                where, pair, table + at * ADDRESS, page_list, pool, x, low, module, split,
                len(MODULES), STORAGES, ROWS, n, PAGE, SPAN, RANKS, COLUMNS, SPLITS, LOW, PEERS,
            )  # fmt: skip


@triton.jit
def _shrink(
    where, pair, address, page_list, pool, x, low, module, split,
    MODULES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """An item of a pair whose weights are stored in the Nth way; nothing of any other."""
    row: tl.constexpr = ROWS[N * LENGTHS + ROW]
    piece: tl.constexpr = ROWS[N * LENGTHS + PIECE]
    groups: tl.constexpr = ROWS[N * LENGTHS + GROUPS]
    group: tl.constexpr = ROWS[N * LENGTHS + GROUP]
    packed: tl.constexpr = STORAGES[N][PACKED]
    part: tl.constexpr = (row + SPLITS - 1) // SPLITS
    token = tl.arange(0, SPAN)
    lane = tl.arange(0, COLUMNS)
    first = tl.minimum(split * part, row)
    end = tl.minimum(first + part, row)
    for from_rank in range(0, _ranks(pair, address, STORAGES, N), RANKS):
        rank = from_rank + tl.arange(0, RANKS)
        real = rank < tl.load(address + RANK)
        ours = (token < tl.load(pair + TOKENS))[:, None]
        mine = x + (tl.load(pair + START) + token).to(tl.int64)[:, None] * (row * packed * COLUMNS)
        start = tl.load(address + A) * piece
        starts = start + rank * row
        if packed > 1:
            scales = _scales(
                where, page_list, pair, pool, start + tl.load(address + RANK) * row, rank, real,
                groups, ROWS[N * LENGTHS + BOUNDARY], PAGE, COLUMNS,
            )  # fmt: skip
        # Blocks that follow each other in the pool take one loop: a row's, or a piece's.
        if row == piece:
            run = row
            first_run = 0
            end_run = 1
        else:
            run = tl.where(tl.load(pair + SPLIT) == 1, piece, row)
            first_run = first // run
            end_run = (end + run - 1) // run
        total = tl.zeros((SPAN, RANKS), tl.float32)
        for r in range(first_run, end_run):
            place = _place(where, page_list, pair, starts + r * run, real, PAGE) - r * run
            at = pool + place.to(tl.int64)[:, None] * COLUMNS + lane[None, :]
            for c in range(tl.maximum(first, r * run), tl.minimum(end, (r + 1) * run)):
                if packed == 1:
                    inputs = tl.load(mine + c * COLUMNS + lane[None, :], mask=ours, other=0.0)
                    factor = tl.load(at + c * COLUMNS, mask=real[:, None], other=0.0)
                    total = tl.dot(inputs, tl.trans(factor), total, input_precision="ieee")
                else:
                    words = tl.load(at + c * COLUMNS, mask=real[:, None], other=0.0)
                    for nth in tl.static_range(packed):
                        column = nth * row + c
                        columns = mine + column * COLUMNS + lane[None, :]
                        inputs = tl.load(columns, mask=ours, other=0.0)
                        factor = _numbers(
                            words, nth, column, scales, real, groups, group,
                            packed, STORAGES[N][TOUCHED], COLUMNS,
                        )  # fmt: skip
                        total = tl.dot(inputs, tl.trans(factor), total, input_precision="ieee")
        base = (split * MODULES + module) * LOW + tl.load(pair + PRODUCTS) // PEERS
        stride = tl.load(pair + STRIDE) // PEERS
        products = low + base + token[:, None] * stride + rank[None, :]
        tl.store(products, total, mask=ours & real[None, :])


@triton.jit
def expand(
    where, pairs, count, table, scale, page_list, pool, low, y,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Add to y, in its place."""
    _expand(
        where, pairs, count, table, scale, page_list, pool, low, y, y,
        MODULES, ALL_MODULES, PAIRS, TILES, STORAGES, ROWS, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
        SPLITS, LOW, PEERS, PROGRAMS, "sum",
    )  # fmt: skip


@triton.jit
def expand_into(
    where, pairs, count, table, scale, page_list, pool, low, y, out,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr, PROGRAMS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """Make something else of the sums: `out` is the stream ("residual"), or new ("gated")."""
    _expand(
        where, pairs, count, table, scale, page_list, pool, low, y, out,
        MODULES, ALL_MODULES, PAIRS, TILES, STORAGES, ROWS, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
        SPLITS, LOW, PEERS, PROGRAMS, FINISH,
    )  # fmt: skip


@triton.jit
def _expand(
    where, pairs, count, table, scale, page_list, pool, low, y, out,
    MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, PAIRS: tl.constexpr,
    TILES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
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
            MODULES, ALL_MODULES, PAIRS, TILES, STORAGES, ROWS, PAGE, WIDTH, SPAN, RANKS, COLUMNS,
            SPLITS, LOW, PEERS, FINISH,
        )  # fmt: skip
        if FINISH == "gated":
            up, _ = _sums(
                where, pairs, table, scale, page_list, pool, low, y, head, tile + tiles,
                MODULES, ALL_MODULES, PAIRS, TILES, STORAGES, ROWS, PAGE, WIDTH, SPAN, RANKS,
                COLUMNS, SPLITS, LOW, PEERS, FINISH,
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
    TILES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
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
        all_ranks += tl.load(address + RANK) * PEERS
        for n in tl.static_range(len(STORAGES)):
            delta = _delta(
                where, pair, address, tl.load(scale + lists + i), page_list, pool, low, module,
                column, delta,
                len(MODULES), STORAGES, ROWS, n, PAGE, SPAN, RANKS, COLUMNS, SPLITS, LOW, PEERS,
            )  # fmt: skip
    mine = (tl.load(pairs + head * PAIR + START) + token).to(tl.int64)[:, None]
    own = tile if TILES[len(MODULES)] == WIDTH else tile + tl.load(where + 2)
    at = y + mine * (WIDTH * COLUMNS) + own * COLUMNS + lane[None, :]
    ours = token < tl.load(pairs + head * PAIR + TOKENS)
    if FINISH == "sum":
        ours = ours & (all_ranks > 0)
    return delta + tl.load(at, mask=ours[:, None], other=0.0), all_ranks


@triton.jit
def _delta(
    where, pair, address, scale, page_list, pool, low, module, column, delta,
    MODULES: tl.constexpr, STORAGES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """`delta`, and that of a pair if its weights are stored in the Nth way."""
    packed: tl.constexpr = STORAGES[N][PACKED]
    rows: tl.constexpr = ROWS[N * LENGTHS + ROW]
    pieces: tl.constexpr = ROWS[N * LENGTHS + PIECE]
    all_groups: tl.constexpr = ROWS[N * LENGTHS + GROUPS]
    group: tl.constexpr = ROWS[N * LENGTHS + GROUP]
    boundaries: tl.constexpr = ROWS[N * LENGTHS + BOUNDARY]
    token = tl.arange(0, SPAN)
    lane = tl.arange(0, COLUMNS)
    row = _pick(rows, module)
    within = column
    if packed > 1:
        within = column % row
    share = tl.load(address + RANK)
    for from_rank in range(0, _ranks(pair, address, STORAGES, N) * PEERS, RANKS):
        rank = from_rank + tl.arange(0, RANKS)
        real = rank < share * PEERS
        mask = (token < tl.load(pair + TOKENS))[:, None] & real[None, :]
        at = module * LOW + tl.load(pair + PRODUCTS) // PEERS
        made = rank
        if PEERS > 1:  # by one of them after the other, each its share
            made += rank // share * (SPLITS * MODULES * LOW - share)
        stride = tl.load(pair + STRIDE) // PEERS
        products = low + at + token[:, None] * stride + made[None, :]
        product = tl.load(products, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            product += tl.load(products + split * MODULES * LOW, mask=mask, other=0.0)
        start = tl.load(address + B) * _pick(pieces, module)
        place = _place(where, page_list, pair, start + rank * row + within, real, PAGE)
        words = pool + place.to(tl.int64)[:, None] * COLUMNS + lane[None, :]
        factor = tl.load(words, mask=real[:, None], other=0.0)
        if packed > 1:
            groups = _pick(all_groups, module)
            scales = _scales(
                where, page_list, pair, pool, start + share * PEERS * row, rank, real, groups,
                _pick(boundaries, module), PAGE, COLUMNS,
            )  # fmt: skip
            factor = _numbers(
                factor, column // row, column, scales, real, groups, _pick(group, module),
                packed, STORAGES[N][TOUCHED], COLUMNS,
            )  # fmt: skip
        scaled = (product * scale).to(factor.dtype)
        delta = tl.dot(scaled, factor, delta, input_precision="ieee")
    return delta


@triton.jit
def _ranks(pair, address, STORAGES: tl.constexpr, N: tl.constexpr):
    """Ranks of a pair whose weights are stored in the Nth way, 0 of any other."""
    ranks = tl.load(address + RANK)
    if len(STORAGES) > 1:
        ranks = tl.where(tl.load(pair + STORAGE) == STORAGES[N][NUMBER], ranks, 0)
    return ranks


@triton.jit
def _scales(
    where, page_list, pair, pool, end, rank, real, groups, boundary,
    PAGE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where each rank's scales begin, behind a factor's rows; one rank's lie in one page."""
    begin = (end + boundary - 1) // boundary * boundary
    at = rank * groups
    place = _place(where, page_list, pair, begin + at // COLUMNS, real, PAGE)
    return pool + place.to(tl.int64) * COLUMNS + at % COLUMNS


@triton.jit
def _numbers(
    words, nth, column, scales, real, groups, group,
    PACKED: tl.constexpr, TOUCHED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The nth numbers in words, which are those of a column block.

    Of the scales of the groups that a block touches, one after the other is put in.
    """
    word: tl.constexpr = words.dtype.primitive_bitwidth
    bits: tl.constexpr = word // PACKED
    if word == 16:
        whole = words.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        whole = words.to(tl.int32, bitcast=True)
    integers = (whole << (32 - bits * (1 + nth))) >> (32 - bits)
    first = column * COLUMNS // group
    scale = tl.load(scales + first, mask=real, other=0.0).to(tl.float32)[:, None]
    if TOUCHED > 1:
        mine = (column * COLUMNS + tl.arange(0, COLUMNS)) // group
        for n in tl.static_range(1, TOUCHED):
            later = tl.load(scales + first + n, mask=real & (first + n < groups), other=0.0)
            scale = tl.where((mine >= first + n)[None, :], later.to(tl.float32)[:, None], scale)
    return (integers.to(tl.float32) * scale).to(words.dtype)


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
