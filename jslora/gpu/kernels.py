"""Each kernel alone, at one layer's shapes: how close it comes to the bytes it must move.

A timed call walks a chain of layers, so that the host's dispatch stays hidden, each at another
place of a large pool, so that no cache holds what it reads, as in a model whose other weights pass
through the cache between two steps. Times are of one layer: of all four groups of modules for LoRA,
of one call for attention.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jslora.batch import Bucket, RowPlan
from jslora.bench import floor
from jslora.gpu.cases import (
    Mix,
    Plan,
    Regions,
    decode_bucket,
    mix_pages,
    one_layer,
    pack_rows,
    pack_work,
    place_mix,
    pool_pages,
    random_pool,
    share_out,
)
from jslora.gpu.session import Session
from jslora.gpu.timing import measure
from jslora.lora import apply_lora
from jslora.model.config import GROUPS
from jslora.programs import Catalog
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Work
from pallas_kernels.paged_attention import api as attention
from pallas_kernels.paged_attention.rows import Rows

SCALE = 1e-3
"""Of the adapters: sums over random factors stay finite through any number of calls."""

Ys = tuple[Float[Array, "T out"], ...]


# LoRA --------------------------------------------------------------------------------------------


def run_lora(session: Session, plan: Plan, kernels: Kernels) -> None:
    """LoRA over batches, adapters and ranks; the mixes of one batch share a program."""
    points = [mix for batch in plan.batches for mix in mixes(plan, batch)]
    session.emit("planned", what="lora", points=len(points))
    most = max(mix_pages(plan, mix) for mix in points)
    catalog = one_layer(plan, most, max(plan.batches), kernels)
    pages = random_pool(pool_pages(plan), catalog)
    for batch in session.points(plan.batches):
        session.attempt(
            f"lora, batch {batch}",
            partial(_lora_batch, session, plan, catalog, pages, batch),
        )


def mixes(plan: Plan, batch: int) -> list[Mix]:
    """Every number of adapters that a batch has rows for, at all ranks."""
    return [
        Mix(adapters, ranks)
        for ranks in plan.ranks
        for adapters in plan.adapters
        if len(ranks) <= adapters <= batch
    ]


def _lora_batch(
    session: Session, plan: Plan, catalog: Catalog, pages: jax.Array, batch: int
) -> None:
    bucket = decode_bucket(catalog, batch)
    program = jax.jit(partial(chained_lora, catalog, bucket), donate_argnums=0)
    holder = Holder(inputs(plan, bucket), outputs(plan, bucket))
    calls, found = {}, mixes(plan, batch)
    for mix in found:
        placed = place_mix(catalog.config, mix, plan.page_numbers, SCALE)
        work = pack_work(share_out(placed, batch), bucket, catalog)
        regions = Regions.of(mix_pages(plan, mix), plan, pages.shape[0])
        calls[str(mix)] = holder.call(program, pages, regions.firsts(plan.chain), work)
    timings = measure(calls, plan.rounds, plan.sample_seconds)
    for mix in found:
        cost = floor.lora_layer(plan.model, mix.rows(batch, 1), plan.item.itemsize)
        session.emit(
            "lora", implementation=catalog.kernels.lora, batch=batch, mix=str(mix),
            adapters=mix.adapters, ranks=mix.ranks, **asdict(cost),
            **timings[str(mix)].record(plan.chain),
        )  # fmt: skip


@dataclass
class Holder:
    """Outputs that every call adds to and hands on to the next, as the step does."""

    xs: Ys
    ys: Ys

    def call(
        self, program: Callable, pages: jax.Array, firsts: list[jax.Array], work: Any
    ) -> Callable[[], Ys]:
        turns = cycle(firsts)

        def call() -> Ys:
            self.ys = program(self.ys, self.xs, pages, next(turns), work)
            return self.ys

        return call


def inputs(plan: Plan, bucket: Bucket) -> Ys:
    """Random inputs of each group of modules."""
    keys = jax.random.split(jax.random.key(1), len(GROUPS))
    widths = [plan.model.widths(group[0])[0] for group in GROUPS]
    return tuple(
        jax.random.normal(key, (bucket.tokens, width), plan.dtype)
        for key, width in zip(keys, widths, strict=True)
    )


def outputs(plan: Plan, bucket: Bucket) -> Ys:
    """Random base outputs of each group of modules, in float32."""
    keys = jax.random.split(jax.random.key(2), len(GROUPS))
    widths = [sum(plan.model.widths(module)[1] for module in group) for group in GROUPS]
    return tuple(
        jax.random.normal(key, (bucket.tokens, width), jnp.float32)
        for key, width in zip(keys, widths, strict=True)
    )


def chained_lora(
    catalog: Catalog,
    bucket: Bucket,
    ys: Ys,
    xs: Ys,
    pages: Float[Array, "pages S 2 K D"],
    first_pages: Int32[Array, " chain"],
    work: Work,
) -> Ys:
    """All groups of as many layers as there are first pages, one behind the other."""

    @jax.jit  # traced once, not once a layer
    def layer(ys: Ys, first: Int32[Array, ""]) -> Ys:
        add = partial(
            apply_lora, config=catalog.config, shape=catalog.programs.lora_shape(bucket),
            kernels=catalog.kernels, pages=pages, first_page=first, layer=jnp.int32(0), work=work,
        )  # fmt: skip
        return tuple(add(y, x, group=i) for i, (y, x) in enumerate(zip(ys, xs, strict=True)))

    for at in range(first_pages.shape[0]):
        ys = layer(ys, first_pages[at])
    return ys


# Attention ---------------------------------------------------------------------------------------


def run_attention(session: Session, plan: Plan, kernels: Kernels) -> None:
    """Attention over batches and contexts; the contexts of one batch share a program."""
    room = pool_pages(plan)
    catalog = one_layer(plan, room, max(plan.batches), kernels)
    pages = random_pool(room, catalog)
    for batch in session.points(plan.batches):
        session.attempt(
            f"attention, batch {batch}",
            partial(_attention_batch, session, plan, catalog, pages, batch),
        )


def _attention_batch(
    session: Session, plan: Plan, catalog: Catalog, pages: jax.Array, batch: int
) -> None:
    bucket, room = decode_bucket(catalog, batch), pages.shape[0]
    program = jax.jit(partial(chained_attention, catalog))
    shape = (bucket.tokens, plan.model.heads, plan.model.head_dim)
    q = jax.random.normal(jax.random.key(3), shape, plan.dtype)
    fitting = [n for n in plan.contexts if batch * -(-n // plan.page_size) <= room]
    calls = {}
    for context in fitting:
        each = -(-context // plan.page_size)
        plans = [
            RowPlan([1], False, context - 1, range(b * each, (b + 1) * each), b, True)
            for b in range(batch)
        ]
        turns = cycle(Regions.of(batch * each, plan, room).firsts(plan.chain))
        rows = pack_rows(plans, bucket, catalog)
        calls[str(context)] = lambda turns=turns, rows=rows: program(q, pages, next(turns), rows)
    timings = measure(calls, plan.rounds, plan.sample_seconds)
    for context in fitting:
        cost = floor.attention_layer(plan.model, [floor.Row(context)] * batch, plan.item.itemsize)
        session.emit(
            "attention", implementation=catalog.kernels.attention, batch=batch, context=context,
            **asdict(cost), **timings[str(context)].record(plan.chain),
        )  # fmt: skip


def chained_attention(
    catalog: Catalog,
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_pages: Int32[Array, " chain"],
    rows: Rows,
) -> Float[Array, "T N D"]:
    """As many layers as there are first pages; each attends with what the one before returned."""
    attend = jax.jit(partial(
        attention.paged_attention, scale=catalog.config.head_dim**-0.5, prefill=False,
        cut=catalog.geometry.attention, kernels=catalog.kernels,
    ))  # fmt: skip
    for at in range(first_pages.shape[0]):
        q = attend(q, pages, first_pages[at], rows)
    return q
