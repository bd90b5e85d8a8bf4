"""The baselines compute what our reference does, so that their times can be compared with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.batch import Segment
from jslora.gpu import baselines, kernels
from jslora.gpu.cases import TINY, Mix, decode_bucket, one_layer, pack_work, place_mix, share_out
from jslora.gpu.correctness import SCALE, Bench, Shelf, lay
from jslora.gpu.hard_cases import Part
from jslora.gpu.session import Session
from jslora.lora import apply_lora
from jslora.model.config import GROUPS, MODULES
from pallas_kernels.launch import Kernels

REFERENCE = Kernels("reference", "reference", "cpu")
BATCH = 8
# Two rows each for adapters of ranks 3, 6, 1 and 6.
RANKS = (3, 6, 1, 6)


@pytest.fixture(scope="module")
def layer() -> tuple[Bench, list[Segment], baselines.Layer]:
    """The same adapters in pages and in padded slots."""
    bench = Bench(TINY, REFERENCE)
    shelf, parts, found = Shelf(bench.catalog.sizes.pages), [], []
    for i, rank in enumerate(RANKS):
        part = Part(2 * i, 2 * i + 2, (rank,) * len(MODULES))
        placement, factors = lay(bench, shelf, part, f"{i}")
        parts.append(Segment(placement, part.start, part.end))
        found.append(factors)

    def slots(module: str) -> baselines.Slots:
        wide, out = TINY.model.widths(module)
        a, b = np.zeros((4, 6, wide), np.float32), np.zeros((4, 6, out), np.float32)
        for i, factors in enumerate(found):
            a[i, : RANKS[i]], b[i, : RANKS[i]] = factors[module]
        return baselines.Slots(jnp.asarray(a), jnp.asarray(b))

    return bench, parts, tuple(slots(module) for module in MODULES)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_baseline_equals_the_reference(
    name: str, layer: tuple[Bench, list[Segment], baselines.Layer]
) -> None:
    bench, parts, slots = layer
    bucket = bench.bucket(BATCH, BATCH)
    xs, ys = kernels.inputs(TINY, bucket), kernels.outputs(TINY, bucket)
    work = pack_work(parts, bucket, bench.catalog)
    add = partial(
        apply_lora, config=bench.catalog.config, shape=bench.catalog.programs.lora_shape(bucket),
        kernels=REFERENCE, pages=bench.pages, first_page=jnp.int32(bench.first_page),
        layer=jnp.int32(1), work=work,
    )  # fmt: skip
    slot = jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3], jnp.int32)
    for group, (y, x) in enumerate(zip(ys, xs, strict=True)):
        wanted = np.asarray(add(y, x, group=group) - y)
        found = [
            np.asarray(baselines.BASELINES[name](x, slots[MODULES.index(module)], slot, SCALE))
            for module in GROUPS[group]
        ]
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=2e-5)


def test_a_chain_adds_every_layer_of_a_stack() -> None:
    """All the layers, to all outputs; a second walk of equal layers adds as much again."""
    plan, mix = TINY, Mix(4, (2, 8))
    (layers,) = baselines.draw_stacks(plan, mix)
    assert len(layers) == plan.chain
    small = baselines.draw_stacks(plan, Mix(1, (2,)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(small)) == plan.cold_bytes
    bucket = decode_bucket(one_layer(plan, 64, BATCH, REFERENCE), BATCH)
    xs, ys = kernels.inputs(plan, bucket), kernels.outputs(plan, bucket)
    slot = jnp.arange(BATCH, dtype=jnp.int32) // 2
    run = partial(baselines.chained, plan.model, baselines.gather)
    once, twice = run(ys, xs, layers, slot), run(ys, xs, [*layers, *layers], slot)
    for before, one, two in zip(ys, once, twice, strict=True):
        assert float(jnp.abs(one - before).max()) > 0
        np.testing.assert_allclose(two - before, 2 * (one - before), atol=1e-5)


def test_ranks_that_are_not_there_are_zero() -> None:
    stack = baselines.draw_stacks(TINY, Mix(4, (2, 8)))[0]
    a = np.asarray(stack[0][0].a)
    assert a.shape == (4, 8, 64)
    assert (a[0, 2:] == 0).all() and (a[2, 2:] == 0).all() and (a[1] != 0).all()


def test_a_point_times_everyone() -> None:
    records: list[dict] = []
    session = Session("s", records.append, 60)
    baselines.Contest(TINY, REFERENCE).run(session, BATCH, Mix(2, (2, 8)))
    names = [record["name"] for record in records]
    assert names == ["jslora", "one-hot", "padded", "gather", "merged"]
    assert all(record["seconds"] > 0 and record["mix"] == "2 x 2-8" for record in records)


def test_rows_of_a_mix_match_the_slots_that_baselines_use() -> None:
    mix = Mix(4, (2, 8))
    parts = share_out(place_mix(TINY.model, mix, TINY.page_numbers, 1.0), BATCH)
    owners = [int(p.placement.digest[1:]) for p in parts for _ in range(p.start, p.end)]
    assert owners == (np.arange(BATCH) * mix.adapters // BATCH).tolist()
