"""Run with four virtual devices: steps with adapters, split over them and on one, are equal.

The reference on one device is what it and the Pallas kernels, interpreted, must equal on four.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jslora.adapters.layout import PackedAdapter, pack
from jslora.adapters.peft import Adapter, Factors
from jslora.batch import Bucket, Placement, RowPlan, StepRows, pack_step, segments
from jslora.blocks import pack_blocks
from jslora.model.config import MODULES, ModelConfig
from jslora.model.weights import shapes
from jslora.programs import Catalog, Sizes
from jslora.sharding import AXIS, POOL, local_config, over_devices, weight_spec, whole_array
from jslora.spans import pack_spans
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Work
from pallas_kernels.lora.reference import BlockShape, BlockWork
from pallas_kernels.lora.segments import SegmentWork

DEVICES = 4
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=40, hidden=48, layers=2, heads=8, kv_heads=4,
    head_dim=16, feed_forward=128, max_positions=64, qkv_bias=True, qk_norm=True,
)  # fmt: skip
SIZES = Sizes(
    pages=64, page_size=8, max_running=8, max_step_tokens=32, max_model_len=64, max_rank=8,
    dtype=jnp.dtype("float32"),
)  # fmt: skip
BY_OUTPUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
FUSED = {"qkv": MODULES[:3], "qkv_bias": MODULES[:3], "gate_up": ("gate_proj", "up_proj")}


def make_adapter(rng: np.random.Generator, ranks: dict[str, int]) -> Adapter:
    factors = {}
    for layer in range(CONFIG.layers):
        for module, rank in ranks.items():
            wide_in, wide_out = CONFIG.widths(module)
            a, b = rng.normal(size=(rank, wide_in)), rng.normal(size=(wide_out, rank))
            pair = (a.astype(np.float32), b.astype(np.float32))
            factors[layer, module] = Factors(*pair, np.float32(0.1))
    return Adapter(factors, f"{rng.integers(2**60)}", None, 0, ())


def part_of(adapter: Adapter, device: int, devices: int) -> Adapter:
    """One device's columns of B, or of A where the base is split by inputs."""
    parts = {}
    for (layer, module), (a, b, scale) in (
        (key, (f.a, f.b, f.scale)) for key, f in adapter.factors.items()
    ):
        if module in BY_OUTPUT:
            b = np.split(b, devices, axis=0)[device]
        else:
            a = np.split(a, devices, axis=1)[device]
        parts[layer, module] = Factors(a, b, scale)
    return Adapter(parts, adapter.digest, None, 0, ())


def arrange(name: str, leaf: np.ndarray, devices: int) -> np.ndarray:
    """Fused columns shard by shard."""
    modules = FUSED.get(name.rpartition(".")[2])
    if modules is None:
        return leaf
    ends = np.cumsum([CONFIG.widths(module)[1] for module in modules])[:-1]
    parts = [np.split(part, devices, axis=-1) for part in np.split(leaf, ends, axis=-1)]
    return np.concatenate([part[d] for d in range(devices) for part in parts], axis=-1)


def fill(pool: np.ndarray, packed: PackedAdapter, pages: tuple[int, ...], total: int) -> None:
    """Write an adapter's pages into one device's pool."""
    for layer in range(CONFIG.layers):
        for page, numbers in zip(pages, packed.blob[layer], strict=True):
            pool[layer * total + page] = numbers.reshape(pool.shape[1:])


def make_mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


@cache
def make_catalog(devices: int, kernels: str) -> Catalog:
    config, axis = local_config(CONFIG, devices), AXIS if devices > 1 else None
    return Catalog(config, SIZES, Kernels(kernels, kernels, "cpu"), axis)


@cache
def jitted_step(devices: int, kernels: str, bucket: Bucket) -> Callable[..., Any]:
    """One for all runs alike, as compiling is what takes long."""
    programs = make_catalog(devices, kernels).programs
    step: Any = partial(programs.step, bucket)
    if devices > 1:
        names: dict[str, Any] = {name: weight_spec(name) for name in shapes(CONFIG)}
        specs = programs.weights(names)
        step = over_devices(step, specs, make_mesh(devices))
    return jax.jit(step)


class Run:
    """The steps of a model with its adapters on one device or several."""

    def __init__(
        self, weights: dict[str, np.ndarray], adapters: list[Adapter], devices: int, kernels: str
    ):
        self.catalog, self.mesh = make_catalog(devices, kernels), make_mesh(devices)
        shape, g = self.catalog.pool().shape, self.catalog.geometry
        pools, self.placements, free = [np.zeros(shape, np.float32) for _ in range(devices)], [], 20
        for adapter in adapters:
            for device, pool in enumerate(pools):
                part = part_of(adapter, device, devices)
                packed = pack(part, self.catalog.config, g.page_numbers, np.dtype(np.float32))
                pages = tuple(range(free, free + packed.n_pages))
                fill(pool, packed, pages, g.pages)
            tables = (packed.a_offset, packed.b_offset, packed.rank, packed.scale)
            self.placements.append(Placement(adapter.digest, pages, *tables))
            free += packed.n_pages
        assert free <= g.pages, f"{free} pages for adapters and rows, {g.pages} in the pool"
        self.pages = jax.device_put(np.concatenate(pools, axis=3), NamedSharding(self.mesh, POOL))
        self.weights = {
            name: jax.device_put(
                arrange(name, leaf, devices), NamedSharding(self.mesh, weight_spec(name))
            )
            for name, leaf in weights.items()
        }

    def step(self, rows: list[RowPlan], bucket: Bucket) -> np.ndarray:
        """Run the rows; activations of all their tokens."""
        programs, g = self.catalog.programs, self.catalog.geometry
        shape, parts = programs.lora_shape(bucket), segments(StepRows.of(rows))
        work: Work
        if isinstance(shape, BlockShape):
            work = BlockWork(*pack_blocks(parts, bucket, g, shape))
        else:
            work = SegmentWork(*pack_spans(parts, bucket, g, shape))
        run = jitted_step(self.mesh.size, self.catalog.kernels.lora, bucket)
        last_token = np.zeros(SIZES.max_running, np.int32)
        self.pages, _, x = run(
            programs.weights(self.weights), self.pages, last_token,
            pack_step(StepRows.of(rows), bucket, g), work,
        )  # fmt: skip
        return np.asarray(x)[: sum(row.length for row in rows)]


def plans(run: Run, tokens: list[list[int]], positions: list[int]) -> list[RowPlan]:
    """Rows with the first adapter, the second, and none."""
    return [
        RowPlan(
            tokens=row, fed=False, position=position, pages=(1 + 2 * b, 2 + 2 * b), slot=b,
            samples=True, placement=placement,
        )
        for b, (row, position, placement) in enumerate(
            zip(tokens, positions, [*run.placements, None], strict=True)
        )
    ]  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm")
        else rng.normal(size=shape, scale=shape[0] ** -0.5).astype(np.float32)
        for name, shape in shapes(CONFIG).items()
    }
    adapters = [
        make_adapter(rng, dict.fromkeys(MODULES, 4)),
        make_adapter(rng, {"o_proj": 3, "down_proj": 8, "k_proj": 1}),
    ]
    other = make_adapter(rng, {"q_proj": 1})
    one, plain = (Run(weights, given, 1, "reference") for given in (adapters, [other, other]))
    four = {name: Run(weights, adapters, DEVICES, name) for name in ("reference", "pallas")}
    for run in four.values():
        assert whole_array(run.catalog.pool(), POOL, run.mesh).shape == run.pages.shape

    lengths = [9, 5, 7]
    prompts = [[int(token) for token in rng.integers(0, 40, n)] for n in lengths]
    for tokens, positions, bucket in (
        (prompts, [0, 0, 0], Bucket(32, 8, 8)),
        ([[1], [2], [3]], lengths, Bucket(8, 8, 8)),
    ):
        alone, without = (r.step(plans(r, tokens, positions), bucket) for r in (one, plain))
        with_adapter = sum(len(row) for row in tokens[:2])
        assert np.abs(without - alone)[:with_adapter].max(axis=1).min() > 0.01
        for name, run in four.items():
            split = run.step(plans(run, tokens, positions), bucket)
            np.testing.assert_allclose(split, alone, rtol=1e-4, atol=1e-4, err_msg=name)
    print(*four, "equal")


if __name__ == "__main__":
    main()
