"""Every implementation on the device at hand against float64 on the host.

The pool is NaN wherever a case put nothing, and so is every input that has no business in a result;
it is so large that its far end is beyond 32 bits of numbers and of bytes, and cases lie at both
ends. What is compared is each token's own error, so one wrong row among many shows. A second run
must give the same bits.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jslora.adapters.quantize import quantize, to_words
from jslora.batch import Bucket, Placement, RowPlan, Segment
from jslora.bench import floor
from jslora.gpu import oracle
from jslora.gpu.cases import Plan, offsets, pack_rows, pack_work, place
from jslora.gpu.hard_cases import (
    MOST_COMPOSED,
    AttentionCase,
    LoraCase,
    Part,
    Where,
    attention_cases,
    lora_cases,
)
from jslora.gpu.session import Session
from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.programs import Catalog
from jslora.step import write_pages
from pallas_kernels.launch import Kernels
from pallas_kernels.lora import api as lora
from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.pieces import STORAGES, first_scale
from pallas_kernels.paged_attention import api as attention

LIMITS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Relative errors: tf32 products are near 3e-4, and must not pass for float32."""

FINISHES = (Finish.SUM, Finish.RESIDUAL, Finish.GATED, Finish.RESIDUAL)
"""What a step makes of the sums of each group of modules; checked beside the sums themselves."""

LAYERS, LAYER = 2, 1
SCALE = 0.75
CHUNK = 64
"""Pages in one write into the pool."""

Operation = Callable[..., jax.Array]


def run(session: Session, plan: Plan, kernels: Kernels) -> None:
    """All cases of both operations, in the pool's dtypes."""
    # The reference asks for no precision, and a GPU's default is tf32; the kernels must ask.
    asked = "highest" if kernels.lora == "reference" else None
    with jax.default_matmul_precision(asked):
        _run(session, plan, kernels)


def _run(session: Session, plan: Plan, kernels: Kernels) -> None:
    cases = len(lora_cases(plan)) + len(attention_cases(plan))
    session.emit("planned", what="correctness", points=cases * len(LIMITS))
    for dtype in ("bfloat16", "float32"):
        bench = Bench(replace(plan, dtype=dtype), kernels)
        for case in session.points(lora_cases(plan)):
            session.attempt(f"{case}, {dtype}", partial(check_lora, session, bench, case))
        for each in session.points(attention_cases(plan)):
            session.attempt(f"{each}, {dtype}", partial(check_attention, session, bench, each))


class Bench:
    """A poisoned pool, and what is needed to put pages into it."""

    def __init__(self, plan: Plan, kernels: Kernels) -> None:
        self.plan, self.kernels = plan, kernels
        pages = plan.wide_numbers // plan.page_numbers // LAYERS
        sizes = plan.sizes(pages, plan.step_rows)
        sizes = replace(sizes, max_rank=plan.wide_rank, max_composed=MOST_COMPOSED)
        self.catalog = Catalog(replace(plan.model, layers=LAYERS), sizes, kernels)
        self._stored = replace(self.catalog, sizes=replace(sizes, storages=STORAGES))
        self.first_page = LAYER * pages
        self.random = np.random.default_rng(0)
        self._write = jax.jit(write_pages, donate_argnums=0)
        self._compiled: dict[Hashable, Callable[..., jax.Array]] = {}
        shape = self.catalog.pool().shape
        self.pages = jnp.full(shape, jnp.nan, self.plan.dtype)

    def bucket(self, tokens: int, rows: int) -> Bucket:
        return Bucket(tokens, rows, self.catalog.buckets[0].pages)

    def catalog_of(self, storages: tuple[str, ...]) -> Catalog:
        """The programs for adapters that may be stored so."""
        return self._stored if storages == STORAGES else self.catalog

    def adding(
        self, operation: Operation, bucket: Bucket, group: int, finish: Finish,
        storages: tuple[str, ...],
    ) -> Operation:  # fmt: skip
        """The compiled LoRA operation of a group of modules."""
        key = operation, bucket, group, finish, storages
        widths = output_widths(self.catalog.config, group)
        if key not in self._compiled:
            shape = self.catalog_of(storages).programs.lora_shape(bucket)
            self._compiled[key] = jax.jit(partial(
                operation, modules=tuple(map(MODULES.index, GROUPS[group])), widths=widths,
                shape=shape, kernels=self.kernels, finish=finish,
            ))  # fmt: skip
        return self._compiled[key]

    def attending(self, operation: Operation, bucket: Bucket) -> Operation:
        """The compiled attention."""
        key = operation, bucket
        if key not in self._compiled:
            self._compiled[key] = jax.jit(partial(
                operation, scale=self.catalog.config.head_dim**-0.5, prefill=bucket.prefill,
                cut=self.catalog.geometry.attention, kernels=self.kernels,
            ))  # fmt: skip
        return self._compiled[key]

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32).astype(self.plan.item)

    def put(self, ids: np.ndarray, blob: np.ndarray) -> None:
        """Write pages of the layer under test; ids count from its own first page."""
        for at in range(0, len(ids), CHUNK):
            rows = np.full(CHUNK, self.pages.shape[0], np.int32)  # beyond the pool: dropped
            data = np.zeros((CHUNK, self.plan.page_numbers), self.plan.item)
            n = len(ids[at : at + CHUNK])
            rows[:n], data[:n] = self.first_page + ids[at : at + n], blob[at : at + n]
            self.pages = self._write(self.pages, rows, data)

    def poison(self, ids: np.ndarray) -> None:
        self.put(ids, np.full((len(ids), self.plan.page_numbers), np.nan, self.plan.item))


@dataclass(eq=False)
class Shelf:
    """Pages of a layer, handed out from either end, or apart and in disorder from the middle."""

    pages: int

    def __post_init__(self) -> None:
        self.low, self.high, self.middle = 1, self.pages, self.pages // 2
        self.taken: list[np.ndarray] = []

    def take(self, count: int, where: Where) -> np.ndarray:
        if where == "bottom":
            found = np.arange(self.low, self.low + count)
            self.low += count
        elif where == "top":
            self.high -= count
            found = np.arange(self.high, self.high + count)
        else:
            self.middle -= 2 * count
            found = np.arange(self.middle + 2 * count, self.middle, -2)
        assert self.low <= self.middle and self.pages // 2 < self.high, (
            f"{self.pages} pages are too few"
        )
        self.taken.append(found)
        return found


# LoRA --------------------------------------------------------------------------------------------


def check_lora(
    session: Session, bench: Bench, case: LoraCase, operation: Operation = lora.add_lora
) -> None:
    """Record how far an implementation is off, and what else is wrong with it."""
    shelf = Shelf(bench.catalog.sizes.pages)
    parts: list[Segment] = []
    factors = []
    for part in case.parts:
        placement, own = lay(bench, shelf, part, f"{len(parts)}")
        parts.append(Segment(placement, part.start, part.end, part.scale))
        factors.append(own)
    bucket = bench.bucket(case.tokens, case.rows)
    work = pack_work(parts, bucket, bench.catalog_of(case.storages))
    worst, faults = 0.0, list[str]()
    for group in range(len(GROUPS)):
        error, wrong = _check_group(bench, case, bucket, factors, work, group, operation)
        worst, faults = max(worst, error), faults + wrong
    for taken in shelf.taken:
        bench.poison(taken)
    _emit(session, bench, "lora", bench.kernels.lora, case.name, worst, faults)


def output_widths(model: ModelConfig, group: int) -> tuple[int, ...]:
    return tuple(model.widths(module)[1] for module in GROUPS[group])


def lay(
    bench: Bench, shelf: Shelf, part: Part, name: str
) -> tuple[Placement, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Draw an adapter's factors for one layer and put them into the pool."""
    plan, model = bench.plan, bench.catalog.config
    page, stored = plan.page_numbers, (part.storage, 8 * plan.item.itemsize)
    adapter = floor.Adapter(name, part.ranks)
    a_at, b_at, end = offsets(model, part.ranks, page, *stored)
    ids = shelf.take(-(-end // page), part.where)
    blob = np.full(len(ids) * page, np.nan, plan.item)
    factors = {}
    for i, module in enumerate(MODULES):
        rank = part.ranks[i]
        if rank and not part.bad:
            a, b = (bench.normal(rank, n) for n in model.widths(module))
            a, b = a / plan.item.type(a.shape[1] ** 0.5), b / plan.item.type(rank**0.5)
            factors[module] = (
                _store(blob, a_at[i], a, part.storage, page),
                _store(blob, b_at[i], b, part.storage, page),
            )
    bench.put(ids, blob.reshape(len(ids), -1))
    return place(model, adapter, page, ids.tolist(), SCALE, *stored), factors


def _store(blob: np.ndarray, first: int, rows: np.ndarray, storage: str, page: int) -> np.ndarray:
    """Put a factor into an adapter's blob; returns the numbers that are then there."""
    if storage == "full":
        blob[first : first + rows.size] = rows.ravel()
        return rows
    stored = quantize(rows, storage, blob.dtype)
    words = to_words(stored.integers, storage, blob.dtype)
    blob[first : first + words.size] = words.ravel()
    bits = 8 * blob.itemsize
    first = first_scale(first, len(rows), rows.shape[1], storage, bits, page)
    blob[first : first + stored.scales.size] = stored.scales.ravel()
    return stored.numbers


def _check_group(
    bench: Bench,
    case: LoraCase,
    bucket: Bucket,
    factors: Sequence[dict[str, tuple[np.ndarray, np.ndarray]]],
    work: Any,
    group: int,
    operation: Operation,
) -> tuple[float, list[str]]:
    """(worst error of a token, what else is wrong) of the modules that read one input."""
    model, modules = bench.catalog.config, GROUPS[group]
    widths = output_widths(model, group)
    x = np.full((case.tokens, model.widths(modules[0])[0]), np.nan, bench.plan.item)
    for part in case.parts:
        x[part.start : part.end] = bench.normal(part.end - part.start, x.shape[1])
    y = bench.random.standard_normal((case.tokens, sum(widths)), np.float32)
    add = bench.adding(operation, bucket, group, Finish.SUM, case.storages)
    arguments = x, bench.pages, jnp.int32(bench.first_page), jnp.int32(LAYER), work
    after, again = (np.asarray(add(jnp.asarray(y), *arguments)) for _ in range(2))
    wanted = np.zeros(y.shape)
    for part, own in zip(case.parts, factors, strict=True):
        for at, module in zip(np.cumsum([0, *widths]), modules, strict=False):
            if module in own:
                tokens, columns = (
                    slice(part.start, part.end),
                    slice(at, at + own[module][1].shape[1]),
                )
                scale = SCALE * part.scale
                wanted[tokens, columns] += oracle.delta(x[tokens], *own[module], scale)
    touched = np.flatnonzero(np.any(wanted, axis=1))
    error = oracle.worst(after - y, wanted, touched)
    faults = list(_faults(case, modules, y, after, again, touched))
    if FINISHES[group] is not Finish.SUM:
        finishing = bench.adding(operation, bucket, group, FINISHES[group], case.storages)
        finished, wrong = _check_finish(bench, case, finishing, y + wanted, y, arguments, group)
        error, faults = max(error, finished), faults + wrong
    return error, faults


def _check_finish(
    bench: Bench,
    case: LoraCase,
    operation: Operation,
    sums: np.ndarray,
    y: np.ndarray,
    arguments: tuple,
    group: int,
) -> tuple[float, list[str]]:
    """The same of what the step makes of the sums, in all rows but those of a bad adapter."""
    stream = None
    if FINISHES[group] is Finish.RESIDUAL:
        stream = bench.normal(*sums.shape)
        wanted = stream.astype(np.float64) + sums
    else:
        wanted = oracle.gated(sums)
    device = None if stream is None else jnp.asarray(stream)
    found = np.asarray(operation(jnp.asarray(y), *arguments, stream=device))
    again = np.asarray(operation(jnp.asarray(y), *arguments, stream=device))
    same = np.array_equal(found, again, equal_nan=True)
    where = "+".join(GROUPS[group])
    faults = [] if same else [f"{where}, {FINISHES[group].value}: a second run gave other bits"]
    return oracle.worst(found, wanted, np.flatnonzero(~_bad(case))), faults


def _bad(case: LoraCase) -> np.ndarray:
    """Tokens whose adapter is no numbers."""
    bad = np.zeros(case.tokens, bool)
    for part in case.parts:
        bad[part.start : part.end] |= part.bad and any(part.ranks)
    return bad


def _faults(
    case: LoraCase,
    modules: tuple[str, ...],
    before: np.ndarray,
    after: np.ndarray,
    again: np.ndarray,
    touched: np.ndarray,
) -> Iterator[str]:
    """What is wrong beside the error of rows that have a sound adapter."""
    bad = _bad(case)
    same = ~bad
    same[touched] = False
    where = "+".join(modules)
    if changed := int(np.sum(np.any(after[same] != before[same], axis=1))):
        yield f"{where}: {changed} rows without an adapter changed"
    if np.isfinite(after[bad]).any():
        yield f"{where}: weights that are no numbers were hidden"
    if not np.array_equal(after, again, equal_nan=True):
        yield f"{where}: a second run gave other bits"


# Attention ---------------------------------------------------------------------------------------


def check_attention(
    session: Session,
    bench: Bench,
    case: AttentionCase,
    operation: Operation = attention.paged_attention,
) -> None:
    """The same for attention."""
    model, bucket = bench.catalog.config, bench.bucket(case.tokens, case.batch)
    q = np.full((case.tokens, model.heads, model.head_dim), np.nan, bench.plan.item)
    wanted, free = np.zeros(q.shape), _both_ends(bench)
    plans: list[RowPlan] = []
    t = 0
    for slot, (length, context) in enumerate(case.rows):
        ids = np.array([next(free) for _ in range(-(-context // bench.plan.page_size))])
        kv = _put_context(bench, ids, context)
        q[t : t + length] = bench.normal(length, model.heads, model.head_dim)
        wanted[t : t + length] = oracle.attend(q[t : t + length], kv, model.head_dim**-0.5)
        plans.append(RowPlan([1] * length, False, context - length, ids.tolist(), slot, True))
        t += length
    attend = bench.attending(operation, bucket)
    arguments = jnp.asarray(q), bench.pages, jnp.int32(bench.first_page)
    rows = pack_rows(plans, bucket, bench.catalog)
    found, again = (np.asarray(attend(*arguments, rows))[:t] for _ in range(2))
    for row in plans:
        bench.poison(np.array(row.pages))
    faults = [] if np.array_equal(found, again) else ["a second run gave other bits"]
    error = oracle.worst(found, wanted, np.arange(t))
    _emit(session, bench, "attention", bench.kernels.attention, case.name, error, faults)


def _both_ends(bench: Bench) -> Iterator[int]:
    """Pages of a layer: the last, the first, then all others in disorder."""
    pages = bench.catalog.sizes.pages
    yield from (pages - 1, 1)
    yield from 2 + bench.random.permutation(pages - 3)


def _put_context(bench: Bench, ids: np.ndarray, context: int) -> np.ndarray:
    """Draw keys and values of a row and put them into its pages, NaN behind the last."""
    model, plan = bench.catalog.config, bench.plan
    kv = bench.normal(context, 2, model.kv_heads, model.head_dim)
    blob = np.full((len(ids) * plan.page_size, *kv.shape[1:]), np.nan, plan.item)
    blob[:context] = kv
    bench.put(ids, blob.reshape(len(ids), -1))
    return kv


def _emit(
    session: Session,
    bench: Bench,
    operation: str,
    implementation: str,
    case: str,
    error: float,
    faults: list[str],
) -> None:
    limit = LIMITS[bench.plan.dtype]
    session.emit(
        "correctness", operation=operation, implementation=implementation, case=case,
        dtype=bench.plan.dtype, error=error, limit=limit, faults=faults,
        ok=error <= limit and not faults,
    )  # fmt: skip
