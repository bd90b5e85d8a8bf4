"""From a configuration to a running core: fetch, plan memory, load weights, compile, register.

Each stage reports its progress; everything that can be checked cheaply is checked before anything
slow begins.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jslora import __version__
from jslora.adapters.cache import PackedCache
from jslora.adapters.hosts import ALONE, Hosts
from jslora.adapters.peft import Limits as AdapterLimits
from jslora.adapters.reader import Reader
from jslora.adapters.storages import check_blocks, storages
from jslora.adapters.store import AdapterStore
from jslora.child import end_with_group
from jslora.config import EngineConfig
from jslora.core import Emit, EngineCore
from jslora.device import Device
from jslora.distributed.leader import Leader
from jslora.distributed.shelf import Shelf
from jslora.errors import ConfigError, JsloraError
from jslora.fetch import load_config, resolve
from jslora.memory.budget import MemoryPlan, host_memory_available, plan_memory
from jslora.model.checkpoint import Checkpoint, file_facts
from jslora.model.config import ModelConfig, from_hf
from jslora.model.weights import dummy_weights, load_weights
from jslora.program_cache import keep_programs
from jslora.programs import Catalog, Sizes, choose_kernels
from jslora.progress import Progress
from jslora.request import EngineInfo
from jslora.runner import Runner
from jslora.schedule.plan import Limits
from jslora.sharding import lies, make_mesh, prepare_devices
from jslora.split import Split
from pallas_kernels import launch
from pallas_kernels.launch import Kernels

log = logging.getLogger(__name__)


def model_folder(config: EngineConfig, progress: Progress) -> Path | None:
    """The local folder of the configured model, fetched and converted if need be; None if dummy."""
    if config.model.source == "dummy":
        return None
    return resolve(config.model.source, config.cache_dir, progress)


def read_model_config(config: EngineConfig, folder: Path | None) -> ModelConfig:
    """The model's dimensions, from its folder or, for a dummy, from the configuration."""
    if folder is None:
        assert config.model.architecture is not None, "a dummy without architecture was accepted"
        return from_hf(config.model.architecture)
    return load_config(folder)


def memory_plan(
    config: EngineConfig, model: ModelConfig, agree: Callable[[int], int] = int
) -> MemoryPlan:
    """What `--check` prints: the division of each device's memory.

    The first that asks jax for devices; on a CPU there are then as many as the mesh needs.

    Args:
        agree: makes of the bytes that this process has those that all have.

    Raises:
        ConfigError: as `plan_memory`, or the machine cannot have the kind of weights asked for.
        ModelError: as `plan_memory`.
    """
    processes = config.distributed.num_processes
    prepare_devices(config.mesh.model // processes)
    if config.model.quantize == "fp8" and launch.platform() == "cpu":
        raise ConfigError("model.quantize: fp8 needs a GPU; a CPU can have int8, or none")
    return plan_memory(config, model, agree(available_memory(config)), processes)


def available_memory(config: EngineConfig) -> int:
    """Bytes that the fullest of this process's devices has left."""
    count = config.mesh.model // config.distributed.num_processes
    stats = [device.memory_stats() or {} for device in jax.local_devices()[:count]]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats)
    return host_memory_available() // count


def build_device(
    config: EngineConfig, model: ModelConfig, plan: MemoryPlan, folder: Path | None,
    progress: Progress,
) -> Device:  # fmt: skip
    """This process's part of the mesh, ready to carry out calls; every process must make one.

    Raises:
        ConfigError: there are too few devices, or the kernels that are asked for cannot be had.
        ModelError: the model's files are wrong.
    """
    keep_programs(config.cache_dir)
    sizes = Sizes(
        pages=plan.pages,
        page_size=plan.page_size,
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_model_len=plan.max_model_len,
        max_rank=config.adapters.max_rank,
        max_composed=config.adapters.max_composed,
        dtype=jnp.dtype(config.model.dtype),
        quantize=config.model.quantize,
        storages=storages(config.adapters),
    )
    mesh = make_mesh(plan.split.devices)
    catalog = Catalog(model, sizes, _kernels(config, model, plan.split), plan.split)
    weights = _weights(catalog, mesh, folder, config.cache_dir / "weights", progress)
    return Device(catalog, mesh, weights, progress)


def build_store(
    config: EngineConfig, model: ModelConfig, plan: MemoryPlan, hosts: Hosts
) -> AdapterStore:
    """The adapters of this process's devices."""
    adapters, (numbers, dtype, limits, devices) = config.adapters, _packing(config, model, plan)
    return AdapterStore(
        adapters.roots, model, numbers, dtype, limits, adapters.host_cache_bytes,
        config.model.served_name, _cache(config, model, plan), plan.split, devices, hosts,
        adapters.storage, adapters.storage_of,
    )  # fmt: skip


def build_shelf(config: EngineConfig, model: ModelConfig, plan: MemoryPlan) -> Shelf:
    """The same of a follower, who knows no names."""
    adapters, (numbers, dtype, limits, devices) = config.adapters, _packing(config, model, plan)
    cache, host_bytes = _cache(config, model, plan), adapters.host_cache_bytes
    reader = Reader(model, numbers, dtype, limits, host_bytes, cache, plan.split, devices)
    return Shelf(adapters.roots, reader, cache, host_bytes)


def _packing(
    config: EngineConfig, model: ModelConfig, plan: MemoryPlan
) -> tuple[int, np.dtype, AdapterLimits, range]:
    """Numbers in a page of one device, their type, adapters' limits, and whose parts to pack."""
    own = plan.split.devices // jax.process_count()
    first = jax.process_index() * own
    limits = AdapterLimits(config.adapters.max_rank, config.adapters.max_file_bytes, plan.pages - 2)
    numbers = plan.split.page_numbers(model, plan.page_size)
    return numbers, np.dtype(jnp.dtype(config.model.dtype)), limits, range(first, first + own)


def _cache(config: EngineConfig, model: ModelConfig, plan: MemoryPlan) -> PackedCache:
    numbers, dtype, _, devices = _packing(config, model, plan)
    folder, limit = config.cache_dir / "adapters", config.adapters.disk_cache_bytes
    return PackedCache(folder, model, numbers, dtype, limit, plan.split, devices)


def build_core(
    config: EngineConfig, folder: Path | None, emit: Emit, progress: Progress, *,
    check_ledger: bool = False, lost: Callable[[str], None] = end_with_group,
) -> tuple[EngineCore, EngineInfo]:  # fmt: skip
    """Start an engine core; of a group of processes, the leader's.

    Args:
        lost: called from any thread with the reason for which the group has ended; the process is
            of no use then.

    Raises:
        ConfigError, ModelError: the configuration or the model's files are wrong.
    """
    leader = _lead(config, folder, lost)
    model = read_model_config(config, folder)
    plan = memory_plan(config, model, leader.agree if leader else int)
    device = build_device(config, model, plan, folder, progress)
    store = build_store(config, model, plan, leader.hosts if leader else ALONE)
    _register(store, config, progress)
    runner = Runner(leader.group(device) if leader else device)
    core = EngineCore(
        runner, store, _limits(config, model, plan), emit,
        section=config.scheduler, lookahead=config.scheduler.lookahead,
        prefix_cache=config.pool.prefix_cache,
        pinned=set(config.adapters.pinned), drain_seconds=config.adapters.drain_seconds,
        check_ledger=check_ledger,
    )  # fmt: skip
    info = EngineInfo(
        model_name=config.model.served_name,
        max_model_len=plan.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        page_size=plan.page_size,
        pages=plan.pages,
        fingerprint=_fingerprint(config),
        device=jax.devices()[0].device_kind,
        adapters=tuple(core.adapters.registered().values()),
    )
    return core, info


def _lead(config: EngineConfig, folder: Path | None, lost: Callable[[str], None]) -> Leader | None:
    """The other processes, all there; None if there are none."""
    group = config.distributed
    if group.process_id > 0:
        raise ConfigError(
            f"distributed.process_id is {group.process_id}: only process 0 is an engine; start "
            "the others with scripts/serve.py"
        )
    return Leader(config, folder, lost) if group.num_processes > 1 else None


def _limits(config: EngineConfig, model: ModelConfig, plan: MemoryPlan) -> Limits:
    return Limits(
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_queued=config.scheduler.max_queued,
        max_queued_tokens=config.scheduler.max_queued_tokens,
        max_model_len=plan.max_model_len,
        page_size=plan.page_size,
        max_rank=config.adapters.max_rank,
        max_composed=config.adapters.max_composed,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )


def _kernels(config: EngineConfig, model: ModelConfig, split: Split) -> Kernels:
    wanted, platform = config.kernels, launch.platform()
    try:
        kernels = choose_kernels(model, config.pool.page_size, wanted, platform, split)
    except NotImplementedError as error:
        raise ConfigError(f"kernels: {config.kernels} cannot be had: {error}") from None
    if kernels.lora != "reference":
        page = split.page_numbers(model, config.pool.page_size)
        check_blocks(config.adapters, model, split, 8 * config.model.item_bytes, page)
    log.info(
        "kernels on %s: lora %s, attention %s", kernels.platform, kernels.lora, kernels.attention
    )
    return kernels


def _weights(
    catalog: Catalog, mesh: Mesh, folder: Path | None, kept: Path, progress: Progress
) -> dict[str, jax.Array]:
    """The model's leaves, of each of which this process reads what its devices hold.

    Args:
        kept: where they are kept as they are over several devices.
    """
    model, dtype, devices = catalog.config, catalog.sizes.dtype, catalog.split.devices
    quantize, specs = catalog.sizes.quantize, catalog.weight_specs

    def place(name: str, shape: tuple[int, ...]) -> Sharding:
        return lies(mesh, specs[name])

    if folder is None:
        return dummy_weights(model, dtype, place, shards=devices, quantize=quantize)
    if devices == 1 and quantize == "none":  # as good as in the files
        return load_weights(folder, model, dtype, place, devices, progress)
    checkpoint = Checkpoint(kept, [file_facts(folder), repr(model)], mesh, catalog.leaves, specs)
    weights = checkpoint.restore()
    if weights is None:
        weights = load_weights(folder, model, dtype, place, devices, progress, quantize)
        checkpoint.save(weights)
    return weights


def _register(store: AdapterStore, config: EngineConfig, progress: Progress) -> None:
    """Register the configured adapters; a bad one is reported and left out."""
    if config.adapters.preload == "none":
        return
    found = store.discover()
    for name in sorted(config.adapters.storage_of.keys() - found.keys()):
        log.warning("adapters.storage_of names %s, of which the roots have no folder yet", name)
    names = list(found) if config.adapters.preload == "all" else config.adapters.preload
    progress("adapters", 0, len(names), "")
    for done, name in enumerate(names, start=1):
        try:
            store.register(name)
        except JsloraError as error:
            log.warning("adapter %s is not served: %s", name, error.message)
        progress("adapters", done, len(names), name)


def _fingerprint(config: EngineConfig) -> str:
    """Eight characters that change with the version and the configuration, secrets left out."""
    text = config.model_dump_json(exclude={"auth", "cache_dir", "distributed"})
    return f"jslora-{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
