"""The same LoRA work in the ways that others do it, written here in jax.numpy.

  one-hot   every token times every adapter that is loaded, all but its own masked; what the JAX
            engines do. Here only the batch's own adapters are loaded, which is kind to it.
  padded    the batch's adapters copied side by side, tokens grouped by adapter, batched products
  gather    each token's own adapter gathered for it
  merged    one adapter in the base weights: the base's own products, for one adapter at a time

All but "merged" pad every adapter to the highest rank of the mix and walk modules one by one, over
dense arrays of slots rather than pages. Times are of one layer's four groups of modules, and those
of "merged" are of its base products, to which the others come in addition.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from itertools import cycle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jslora.batch import Bucket
from jslora.bench import floor
from jslora.gpu import kernels as ours
from jslora.gpu.cases import (
    Mix,
    Plan,
    Regions,
    decode_bucket,
    mix_pages,
    one_layer,
    pack_work,
    place_mix,
    pool_pages,
    random_pool,
    share_out,
)
from jslora.gpu.session import Session
from jslora.gpu.timing import Call, measure
from jslora.model.config import GROUPS, MODULES, ModelConfig
from pallas_kernels.launch import Kernels


class Slots(NamedTuple):
    """A module's loaded adapters, padded to one rank R; ranks that are not there are zero."""

    a: Float[Array, "slots R in"]
    b: Float[Array, "slots R out"]


Layer = tuple[Slots, ...]
"""Of every module, in the order of `MODULES`."""
Baseline = Callable[[jax.Array, Slots, jax.Array, float], jax.Array]


def one_hot(
    x: Float[Array, "T in"], slots: Slots, slot: Int32[Array, " T"], scale: float
) -> Float[Array, "T out"]:
    own = jax.nn.one_hot(slot, slots.a.shape[0], dtype=jnp.float32)
    low = jnp.einsum("ti,sri->tsr", x, slots.a, preferred_element_type=jnp.float32)
    low = (scale * low * own[:, :, None]).astype(x.dtype)
    return jnp.einsum("tsr,sro->to", low, slots.b, preferred_element_type=jnp.float32)


def padded(
    x: Float[Array, "T in"], slots: Slots, slot: Int32[Array, " T"], scale: float
) -> Float[Array, "T out"]:
    """Tokens of an adapter stand together, as many for each; it is read off the first of them."""
    n = slots.a.shape[0]
    used, grouped = slot.reshape(n, -1)[:, 0], x.reshape(n, -1, x.shape[1])
    a, b = slots.a[used], slots.b[used]
    low = jnp.einsum("nti,nri->ntr", grouped, a, preferred_element_type=jnp.float32)
    low = (scale * low).astype(x.dtype)
    delta = jnp.einsum("ntr,nro->nto", low, b, preferred_element_type=jnp.float32)
    return delta.reshape(x.shape[0], -1)


def gather(
    x: Float[Array, "T in"], slots: Slots, slot: Int32[Array, " T"], scale: float
) -> Float[Array, "T out"]:
    low = jnp.einsum("ti,tri->tr", x, slots.a[slot], preferred_element_type=jnp.float32)
    low = (scale * low).astype(x.dtype)
    return jnp.einsum("tr,tro->to", low, slots.b[slot], preferred_element_type=jnp.float32)


BASELINES: dict[str, Baseline] = {"one-hot": one_hot, "padded": padded, "gather": gather}
MERGED, OURS = "merged", "jslora"


def run(session: Session, plan: Plan, kernels: Kernels) -> None:
    """Our kernels and all baselines side by side, point by point."""
    session.emit("planned", what="baseline", points=len(plan.baseline_points))
    contest = Contest(plan, kernels)
    for point in session.points(plan.baseline_points):
        session.attempt(
            f"baselines, batch {point[0]}, {point[1]}", partial(contest.run, session, *point)
        )


class Contest:
    """The pool that our kernels read, and the programs that do not change with the mix."""

    def __init__(self, plan: Plan, kernels: Kernels) -> None:
        self.plan = plan
        most = max(mix_pages(plan, mix) for _, mix in plan.baseline_points)
        self.catalog = one_layer(plan, most, max(plan.batches), kernels)
        self.pages = random_pool(pool_pages(plan), self.catalog)
        self._ours = cache(self._our_program)
        self._merged = cache(partial(merged, plan))

    def run(self, session: Session, batch: int, mix: Mix) -> None:
        """Time one point."""
        plan, calls = self.plan, self._calls(batch, mix)
        cost = floor.lora_layer(plan.model, mix.rows(batch, 1), plan.item.itemsize)
        for name, timing in measure(calls, plan.rounds, plan.sample_seconds).items():
            session.emit(
                "baseline", name=name, implementation=self.catalog.kernels.lora, batch=batch,
                mix=str(mix), adapters=mix.adapters, ranks=mix.ranks, **asdict(cost),
                **timing.record(plan.chain),
            )  # fmt: skip

    def _calls(self, batch: int, mix: Mix) -> dict[str, Call]:
        plan, bucket = self.plan, decode_bucket(self.catalog, batch)
        xs, ys = ours.inputs(plan, bucket), ours.outputs(plan, bucket)
        placed = place_mix(self.catalog.config, mix, plan.page_numbers, ours.SCALE)
        work = pack_work(share_out(placed, batch), bucket, self.catalog)
        firsts = Regions.of(mix_pages(plan, mix), plan, self.pages.shape[0]).firsts(plan.chain)
        holder, pages = ours.Holder(xs, ys), self.pages
        calls: dict[str, Call] = {OURS: holder.call(self._ours(bucket), pages, firsts, work)}
        slot = jnp.asarray(np.arange(batch) * mix.adapters // batch, jnp.int32)
        stacks = draw_stacks(plan, mix)
        for name, baseline in BASELINES.items():
            program = jax.jit(partial(chained, plan.model, baseline), donate_argnums=0)
            calls[name] = _call(
                program, tuple(x[:batch] for x in xs),
                tuple(jnp.array(y[:batch]) for y in ours.outputs(plan, bucket)), stacks, slot,
            )  # fmt: skip
        return calls | {MERGED: self._merged(batch)}

    def _our_program(self, bucket: Bucket) -> Callable:
        return jax.jit(partial(ours.chained_lora, self.catalog, bucket), donate_argnums=0)


def _call(
    program: Callable, xs: ours.Ys, ys: ours.Ys, stacks: list[list[Layer]], slot: jax.Array
) -> Call:
    """Each call walks another stack of layers, and adds to what the last one returned."""
    turns, held = cycle(stacks), [ys]

    def call() -> ours.Ys:
        held[0] = program(held[0], xs, next(turns), slot)
        return held[0]

    return call


def chained(
    model: ModelConfig,
    baseline: Baseline,
    ys: ours.Ys,
    xs: ours.Ys,
    layers: list[Layer],
    slot: Int32[Array, " T"],
) -> ours.Ys:
    """All modules of the layers, one behind the other."""
    for layer in layers:
        after = []
        for group, (y, x) in enumerate(zip(ys, xs, strict=True)):
            deltas = [
                baseline(x, layer[MODULES.index(module)], slot, ours.SCALE)
                for module in GROUPS[group]
            ]
            after.append(y + jnp.concatenate(deltas, axis=1))
        ys = tuple(after)
    return ys


def draw_stacks(plan: Plan, mix: Mix) -> list[list[Layer]]:
    """As many stacks of `plan.chain` layers as are cold when the first comes again."""
    ranks = np.array([adapter.ranks[0] for adapter in mix.of()])
    numbers = ranks.size * ranks.max() * sum(sum(plan.model.widths(m)) for m in MODULES)
    count = max(1, -(-plan.cold_bytes // (int(numbers) * plan.item.itemsize * plan.chain)))
    true = jnp.asarray(np.arange(ranks.max()) < ranks[:, None])
    keys = iter(jax.random.split(jax.random.key(4), count * plan.chain * len(MODULES) * 2))
    draw = _drawing(plan.dtype)

    def slots(module: str) -> Slots:
        wide, out = plan.model.widths(module)
        return Slots(draw(next(keys), true, wide), draw(next(keys), true, out))

    return [
        [tuple(slots(module) for module in MODULES) for _ in range(plan.chain)]
        for _ in range(count)
    ]


@cache
def _drawing(dtype: str) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Draws factors of all slots; those beyond an adapter's rank are zero."""

    @partial(jax.jit, static_argnums=2)
    def draw(key: jax.Array, true: jax.Array, width: int) -> jax.Array:
        drawn = jax.random.normal(key, (*true.shape, width), dtype)
        return jnp.where(true[:, :, None], drawn, 0).astype(dtype)

    return draw


def merged(plan: Plan, batch: int) -> Call:
    """The base products of as many layers, whose weights hold the adapter's already."""
    keys = iter(jax.random.split(jax.random.key(5), (plan.chain + 1) * len(GROUPS)))
    draw = partial(jax.random.normal, dtype=plan.dtype)
    shapes = [
        (plan.model.widths(group[0])[0], sum(plan.model.widths(m)[1] for m in group))
        for group in GROUPS
    ]
    xs = [draw(next(keys), (batch, wide)) for wide, _ in shapes]
    layers = [[draw(next(keys), shape) for shape in shapes] for _ in range(plan.chain)]

    @jax.jit
    def products(
        xs: list[jax.Array], layers: list[list[jax.Array]]
    ) -> list[list[Float[Array, "T out"]]]:
        dot = partial(jnp.einsum, "ti,io->to", preferred_element_type=jnp.float32)
        return [[dot(x, w) for x, w in zip(xs, layer, strict=True)] for layer in layers]

    return lambda: products(xs, layers)
