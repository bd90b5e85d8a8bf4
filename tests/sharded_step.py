"""Run with four virtual devices: steps with adapters, split over them and on one, are equal.

The reference on one device is what it must equal on four, with adapters divided in either way; and
the Pallas kernels, interpreted.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jslora.adapters.layout import pack
from jslora.adapters.peft import Adapter, Factors
from jslora.batch import Applied, Bucket, Placement, RowPlan, StepRows, pack_step, segments
from jslora.model.config import MODULES, ModelConfig
from jslora.model.weights import dummy_weights
from jslora.programs import Catalog, Sizes
from jslora.sharding import POOL, lies, make_mesh, whole_array
from jslora.split import Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Work
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork

DEVICES = 4
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=40, hidden=64, layers=2, heads=8, kv_heads=4,
    head_dim=16, feed_forward=128, max_positions=64, qkv_bias=True, qk_norm=True,
)  # fmt: skip
SIZES = Sizes(
    pages=64, page_size=8, max_running=8, max_step_tokens=32, max_model_len=64, max_rank=16,
    dtype=jnp.dtype("float32"), max_composed=2,
)  # fmt: skip
MIXED, DECODE = Bucket(32, 8, 8), Bucket(8, 8, 8)


def make_adapter(rng: np.random.Generator, ranks: dict[str, int]) -> Adapter:
    factors = {}
    for layer in range(CONFIG.layers):
        for module, rank in ranks.items():
            wide_in, wide_out = CONFIG.widths(module)
            a, b = rng.normal(size=(rank, wide_in)), rng.normal(size=(wide_out, rank))
            pair = (a.astype(np.float32), b.astype(np.float32))
            factors[layer, module] = Factors(*pair, np.float32(0.1))
    return Adapter(factors, f"{rng.integers(2**60)}", None, 0, ())


@cache
def compiled_step(catalog: Catalog, bucket: Bucket) -> Any:
    """One for all runs alike, as compiling is what takes long; here a whole step in one program."""
    (job,) = catalog.step_jobs(bucket).values()
    job = job.over(make_mesh(catalog.split.devices))
    return jax.jit(job.function, donate_argnums=job.donated).lower(*job.arguments).compile()


class OneProgram(Kernels):
    """A step is one program, as on a GPU, though its kernels are interpreted."""

    one_program = True


class Run:
    """The steps of a model with its adapters on one device or several."""

    def __init__(
        self, adapters: list[Adapter], split: Split, kernels: str, quantize: str = "none"
    ) -> None:
        self.mesh = make_mesh(split.devices)
        self.catalog = _catalog(split, kernels, quantize)
        c, g = self.catalog, self.catalog.geometry
        pool = whole_array(c.pool(), POOL, self.mesh)
        assert pool.shape[3] == CONFIG.kv_heads
        parts = np.zeros((split.devices, *c.pool().shape), np.float32)
        self.placements, free = [], 20
        for adapter in adapters:
            packed = pack(adapter, CONFIG, g.page_numbers, np.dtype(np.float32), split)
            pages = tuple(range(free, free + packed.n_pages))
            for layer in range(CONFIG.layers):
                at = layer * g.pages + np.array(pages)
                parts[:, at] = packed.blob[:, layer].reshape(*parts[:, at].shape)
            tables = (packed.a_offset, packed.b_offset, packed.rank, packed.scale)
            self.placements.append(Placement(adapter.digest, pages, *tables))
            free += packed.n_pages
        assert free <= g.pages, f"{free} pages for adapters and rows, {g.pages} in the pool"
        self.pages = jax.device_put(np.concatenate(parts, axis=3), lies(self.mesh, POOL))
        self.weights = c.programs.weights(_leaves(split.devices, quantize))

    def step(self, rows: list[RowPlan], bucket: Bucket) -> np.ndarray:
        """Run the rows; activations of all their tokens."""
        catalog, columns = self.catalog, StepRows.of(rows)
        lists = catalog.pack_work(segments(columns), bucket)
        blocks = isinstance(catalog.programs.lora_shape(bucket), BlockShape)
        work: Work = BlockWork(*lists) if blocks else SegmentWork(*lists)
        packed = pack_step(columns, bucket, catalog.geometry)
        last_token, run = np.zeros(SIZES.max_running, np.int32), compiled_step(catalog, bucket)
        self.pages, _, x = run(self.weights, self.pages, last_token, packed, work)
        return np.asarray(x)[: sum(row.length for row in rows)]


@cache
def _leaves(devices: int, quantize: str) -> dict[str, jax.Array]:
    mesh, specs = make_mesh(devices), _catalog(Split(devices), "reference", quantize).weight_specs
    return dummy_weights(
        CONFIG, jnp.float32, lambda name, _: lies(mesh, specs[name]), shards=devices,
        quantize=quantize,
    )  # fmt: skip


@cache
def _catalog(split: Split, kernels: str, quantize: str = "none") -> Catalog:
    sizes = replace(SIZES, quantize=quantize)
    return Catalog(CONFIG, sizes, OneProgram(kernels, kernels, "cpu"), split)


def plans(run: Run, tokens: list[list[int]], positions: list[int]) -> list[RowPlan]:
    """Rows with the first adapter, the second, both, and none."""
    first, second = (Applied(placement) for placement in run.placements)
    rows = [(first,), (second,), (first, second._replace(scale=0.5)), ()]
    return [
        RowPlan(
            tokens=row, fed=False, position=position, pages=(1 + 2 * b, 2 + 2 * b), slot=b,
            samples=True, applied=applied,
        )
        for b, (row, position, applied) in enumerate(zip(tokens, positions, rows, strict=True))
    ]  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(0)
    adapters = [
        make_adapter(rng, dict.fromkeys(MODULES, 5)),
        make_adapter(rng, {"o_proj": 3, "down_proj": 8, "k_proj": 1}),
    ]
    other = make_adapter(rng, {"q_proj": 1})
    one = Run(adapters, Split(), "reference")
    plain = Run([other, other], Split(), "reference")
    four = {
        name: Run(adapters, Split(DEVICES, fully), kernels)
        for name, fully, kernels in (
            ("no_collective", False, "reference"),
            ("fully_sharded", True, "reference"),
            ("fully_sharded, pallas", True, "pallas"),
        )
    }
    lengths = [9, 5, 6, 4]
    prompts = [[int(token) for token in rng.integers(0, 40, n)] for n in lengths]
    right = one.step(plans(one, prompts, [0] * 4), MIXED)
    without = plain.step(plans(plain, prompts, [0] * 4), MIXED)
    with_adapter = sum(lengths[:3])
    assert np.abs(without - right)[:with_adapter].max(axis=1).min() > 0.01
    for name, run in four.items():
        found = run.step(plans(run, prompts, [0] * 4), MIXED)
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4, err_msg=name)
    # Every device rounds the activations that it has, so that all come near, and no more.
    for split in (Split(), Split(DEVICES)):
        run = Run(adapters, split, "reference", "int8")
        found = run.step(plans(run, prompts, [0] * 4), MIXED)
        apart = np.linalg.norm(found - right) / np.linalg.norm(right)
        assert 0.001 < apart < 0.05, (split, apart)
    tokens, run = [[1], [2], [3], [4]], four["fully_sharded"]
    right, found = (r.step(plans(r, tokens, lengths), DECODE) for r in (one, run))
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
    print("equal")


if __name__ == "__main__":
    main()
