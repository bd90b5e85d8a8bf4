"""Compile one case for the GPU of `target`, and record what the compiler says of it.

Runs in a process of its own (`child`): the compiler's flags are environment variables, and a
compiler that aborts takes its process along. Nothing is executed, so arrays are shapes only.

A layer's launches are the difference between two programs of different numbers of layers, over the
difference of these, so whatever happens once a step is not counted.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jslora import sharding
from jslora.aot import hlo, launches, ptxas
from jslora.aot.cases import BASE_LAYERS, MODELS, POOL_BYTES, Case
from jslora.aot.record import Record
from jslora.aot.target import H100
from jslora.batch import Bucket
from jslora.bench.floor import Row, step_floor
from jslora.lora import apply_lora
from jslora.model.config import GROUPS, MODULES, ModelConfig, from_hf
from jslora.model.weights import shapes
from jslora.programs import Catalog, Sizes, choose_kernels
from jslora.sharding import AXIS, Job, whole_array
from jslora.split import Split
from pallas_kernels.launch import OFF
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.rows import Rows

DTYPE = jnp.dtype("bfloat16")


@dataclass(frozen=True)
class Workshop:
    """Where the assembler's words and jax-triton's PTX appear, and the real assembler's folder."""

    words: Path
    ptx: Path
    toolkit: Path

    def assembled(self) -> list[ptxas.Assembled]:
        """All kernels assembled since the last call."""
        found = ptxas.read_words(self.words)
        for path in sorted(self.ptx.glob("*/*.ptx")):
            found += ptxas.assemble(path, self.toolkit)
            path.unlink()
        return found


@dataclass(frozen=True)
class Program:
    """A function to compile; the arguments are what it takes on all devices together."""

    name: str
    function: Callable[..., Any]
    donated: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, str]


@dataclass(frozen=True)
class Compiled:
    """A compiled program, what it launches, and how long compiling took."""

    executable: Any
    launches: list[launches.Launch]
    donated: int  # bytes on one device
    seconds: float


def device_mesh(devices: int) -> Mesh:
    """A mesh of GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topology, (devices,), (AXIS,))


def compile_case(case: Case, shop: Workshop) -> Iterator[tuple[Record, Any]]:
    """The records of a case, each with its executable."""
    mesh = device_mesh(case.devices)
    if case.what == "step":
        yield _compile_step(case, mesh, shop)
        return
    catalog = make_catalog(case, case.layers)
    programs = _kernel_programs if case.what == "kernels" else _other_programs
    for program in programs(case, catalog, mesh):
        compiled = _compile(program, mesh, prod(catalog.pool().shape))
        figures = _figures(compiled, catalog, shop.assembled())
        if case.what == "kernels":
            kernels = Counter(i.label for i in compiled.launches if i.kind == "kernel")
            figures["per_layer"] = {f"kernel {k}": n for k, n in kernels.items()}
        else:
            figures["outside"] = len(compiled.launches)
            _, figures["collectives_outside"] = _collectives(compiled, compiled, 1)
        yield Record(
            name=f"{case.name} {program.name}", what=case.what.removesuffix("s"),
            phase=case.phase, rows=case.rows, tokens=case.tokens, kernels=case.kernels, **figures,
        ), compiled.executable  # fmt: skip


def _compile_step(case: Case, mesh: Mesh, shop: Workshop) -> tuple[Record, Any]:
    small, large = (
        _compile(_step_program(case, layers, mesh), mesh, _pool(case, layers))
        for layers in (BASE_LAYERS, case.layers)
    )
    apart = case.layers - BASE_LAYERS
    per_layer, outside = _difference(small, large, lambda i: True, apart)
    inner, outer = _collectives(small, large, apart)
    moved = [sum(launch.bytes for launch in program.launches) for program in (small, large)]
    bytes_per_layer = (moved[1] - moved[0]) / apart
    record = Record(
        name=case.name, what="step", phase=case.phase, rows=case.rows, tokens=case.tokens,
        kernels=case.kernels, per_layer=per_layer, outside=sum(outside.values()),
        collectives=inner, collectives_outside=outer,
        bytes_per_layer=bytes_per_layer,
        bytes_outside=moved[1] - bytes_per_layer * case.layers,
        floor_per_layer=(_floor(case, case.layers) - _floor(case, BASE_LAYERS)) / apart,
        **_figures(large, make_catalog(case, case.layers), shop.assembled()),
    )  # fmt: skip
    return record, large.executable


def _floor(case: Case, layers: int) -> int:
    """The fewest bytes of a step, pages that kernels read left out: nothing was attended before."""
    catalog = make_catalog(case, layers)
    bucket, part = _bucket(case, catalog), catalog.split.local(catalog.config)
    tokens = bucket.tokens // bucket.rows
    rows = [Row(context=tokens, tokens=tokens)] * bucket.rows
    found = step_floor(part, rows, DTYPE.itemsize).base.bytes
    if case.quantize != "none":  # a byte a number
        widths = (part.widths(module) for module in MODULES)
        found -= (DTYPE.itemsize - 1) * layers * sum(i * o for i, o in widths)
    return found


def _difference(
    small: Compiled, large: Compiled, which: Callable[[launches.Launch], bool], apart: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Launches of a layer by "kind label", of collectives with their bytes; and those outside."""
    counts = [
        Counter(
            f"{i.kind} {i.label}" + f" {launches.put_out(i)}" * (i.kind == "collective")
            for i in program.launches
            if which(i)
        )
        for program in (small, large)
    ]
    names = sorted(counts[1] | counts[0])
    layer = {name: (counts[1][name] - counts[0][name]) / apart for name in names}
    outside = {name: counts[0][name] - BASE_LAYERS * layer[name] for name in names}
    return {k: n for k, n in layer.items() if n}, {k: n for k, n in outside.items() if n}


def _collectives(
    small: Compiled, large: Compiled, apart: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Those of a layer by "name bytes", and those outside; the same program twice has no layers."""
    layer, outside = (
        {name.removeprefix("collective "): n for name, n in found.items()}
        for found in _difference(small, large, lambda i: i.kind == "collective", apart)
    )
    return layer, outside


def _compile(program: Program, mesh: Mesh, pool: int) -> Compiled:
    begun = time.monotonic()
    with jax.set_mesh(mesh):
        jitted = jax.jit(program.function, donate_argnums=program.donated, keep_unused=True)
        lowered = jitted.lower(*program.arguments)
    executable = lowered.compile(compiler_options=program.options)
    seconds, text = time.monotonic() - begun, executable.as_text()
    assert text, f"{program.name} was compiled to nothing that can be read"
    donated = sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves([program.arguments[i] for i in program.donated])
    )
    return Compiled(executable, launches.find(hlo.parse(text), pool), donated, seconds)


def _figures(
    compiled: Compiled, catalog: Catalog, assembled: list[ptxas.Assembled]
) -> dict[str, Any]:
    """What a record says of one program alone."""
    memory = compiled.executable.memory_analysis()
    ours = {i.label for i in compiled.launches if i.kind == "kernel"}
    weights = weight_dims(catalog.split.local(catalog.config))
    layer_pages = catalog.geometry.pages * catalog.geometry.page_numbers
    pool_copies, weight_copies = [], []
    for launch, shape in launches.arrays(compiled.launches):
        text = f"{launch.instruction.name} {shape}"
        if shape.size >= layer_pages:
            pool_copies.append(text)
        elif tuple(sorted(dim for dim in shape.dims if dim > 1)) in weights:
            weight_copies.append(text)
    return dict(
        loops=[i.instruction.name for i in compiled.launches if i.kind == "loop"],
        pool_copies=pool_copies, weight_copies=weight_copies,
        temporaries=memory.temp_size_in_bytes, aliased=memory.alias_size_in_bytes,
        donated=compiled.donated, seconds=compiled.seconds,
        launched=sorted(ours), assembled=_ours(assembled, ours),
        most_registers=max((kernel.registers for kernel in assembled), default=0),
    )  # fmt: skip


def _ours(assembled: list[ptxas.Assembled], ours: set[str]) -> dict[str, list[int]]:
    """[registers, bytes spilled] at most, of kernels of ours and of any that spills.

    XLA appends a number to the names of kernels that differ.
    """
    found: dict[str, list[int]] = {}
    for kernel in assembled:
        name = next((own for own in sorted(ours) if _is(kernel.name, own)), kernel.name)
        if name in ours or kernel.spills:
            registers, spills = found.get(name, [0, 0])
            found[name] = [max(registers, kernel.registers), max(spills, kernel.spills)]
    return found


def _is(name: str, own: str) -> bool:
    head, _, number = name.rpartition("_")
    return name == own or (head == own and number.isdigit())


def weight_dims(config: ModelConfig) -> set[tuple[int, ...]]:
    """Sorted dimensions of every matrix of weights, and of the parts that fused ones have."""
    leaves = {tuple(sorted(shape)) for shape in shapes(config).values() if len(shape) == 2}
    return leaves | {tuple(sorted(config.widths(module))) for module in MODULES}


# Programs ------------------------------------------------------------------------------------


def make_catalog(case: Case, layers: int) -> Catalog:
    """The programs of one device of a case, with the pool at its production size."""
    config = from_hf({**MODELS[case.model], "num_hidden_layers": layers})
    split = Split(case.devices, case.fully)
    page = split.page_numbers(config, case.page_size) * DTYPE.itemsize
    sizes = Sizes(
        pages=POOL_BYTES[case.model] // (page * layers),
        page_size=case.page_size,
        max_running=case.rows,
        max_step_tokens=case.tokens,
        max_model_len=case.positions,
        max_rank=case.max_rank,
        max_composed=case.max_composed,
        dtype=DTYPE,
        storages=case.storages,
        quantize=case.quantize,
    )
    kernels = choose_kernels(config, case.page_size, case.kernels, "cuda", split)
    if not case.lora:
        kernels = replace(kernels, lora=OFF)
    return Catalog(config, sizes, kernels, split)


def _bucket(case: Case, catalog: Catalog) -> Bucket:
    """The largest of the phase."""
    mixed = case.phase == "mixed"
    return max(bucket for bucket in catalog.buckets if bucket.prefill == mixed)


def _pool(case: Case, layers: int) -> int:
    return prod(make_catalog(case, layers).pool().shape)


def _step_program(case: Case, layers: int, mesh: Mesh) -> Program:
    catalog = make_catalog(case, layers)
    (job,) = catalog.step_jobs(_bucket(case, catalog)).values()
    return _program(job.over(mesh), catalog)


def _program(job: Job, catalog: Catalog) -> Program:
    options = catalog.kernels.compiler_options
    return Program(job.name, job.function, job.donated, job.arguments, options)


def _kernel_programs(case: Case, catalog: Catalog, mesh: Mesh) -> Iterator[Program]:
    """LoRA of each group of modules, and attention."""
    config, bucket, programs = catalog.config, _bucket(case, catalog), catalog.programs
    layer, pages = jax.ShapeDtypeStruct((), jnp.int32), catalog.pool()
    work, T, options = catalog.work(bucket), bucket.tokens, catalog.kernels.compiler_options
    for index, modules in enumerate(GROUPS):
        wide_in = config.widths(modules[0])[0]
        wide_out = sum(config.widths(module)[1] for module in modules)
        arguments: tuple[Any, ...] = (
            jax.ShapeDtypeStruct((T, wide_out), jnp.float32),
            jax.ShapeDtypeStruct((T, wide_in), DTYPE),
            pages, layer, layer, work,
        )  # fmt: skip
        lora = partial(
            _lora, group=index, config=config, shape=programs.lora_shape(bucket),
            kernels=catalog.kernels,
        )  # fmt: skip
        name = "lora " + ",".join(module.removesuffix("_proj") for module in modules)
        yield Program(name, lora, (0,), _everywhere(arguments, mesh), options)
    q = jax.ShapeDtypeStruct((T, config.heads, config.head_dim), DTYPE)
    attention = partial(
        paged_attention, scale=config.head_dim**-0.5, prefill=bucket.prefill,
        cut=catalog.geometry.attention, kernels=catalog.kernels,
    )  # fmt: skip
    arguments = (q, pages, layer, _rows(bucket, catalog))
    yield Program("attention", attention, (), _everywhere(arguments, mesh), options)


def _other_programs(case: Case, catalog: Catalog, mesh: Mesh) -> Iterator[Program]:
    """Every program that is no step, each at its largest size."""
    steps = {key for bucket in catalog.buckets for key in catalog.step_jobs(bucket)}
    jobs = [job for key, job in catalog.jobs().items() if key not in steps]
    largest: dict[str, Job] = {}
    for job in sorted(jobs, key=lambda job: [int(n) for n in job.name.split() if n.isdigit()]):
        largest[" ".join(word for word in job.name.split() if not word.isdigit())] = job
    for name, job in largest.items():
        yield replace(_program(job.over(mesh), catalog), name=name)


def _lora(
    y: Any, x: Any, pages: Any, first_page: Any, layer: Any, work: Any, **fixed: Any
) -> jax.Array:
    return apply_lora(y, x, pages=pages, first_page=first_page, layer=layer, work=work, **fixed)


def _rows(bucket: Bucket, catalog: Catalog) -> Rows:
    """The abstract rows of a bucket, as the step unpacks them."""
    packed = catalog.step_jobs(bucket)[bucket].arguments[3]
    return jax.eval_shape(partial(catalog.programs.inputs, bucket), packed).rows


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays that every device has whole."""
    return jax.tree.map(lambda leaf: whole_array(leaf, sharding.WHOLE, mesh), tree)
