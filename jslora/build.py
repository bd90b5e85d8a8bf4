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

from jslora import __version__
from jslora.adapters.cache import PackedCache
from jslora.adapters.peft import Limits as AdapterLimits
from jslora.adapters.store import AdapterStore
from jslora.config import EngineConfig
from jslora.core import Emit, EngineCore
from jslora.errors import ConfigError, JsloraError
from jslora.fetch import load_config, resolve
from jslora.memory.budget import MemoryPlan, host_memory_available, plan_memory
from jslora.model.config import ModelConfig, from_hf
from jslora.model.weights import dummy_weights, load_weights
from jslora.programs import Catalog, Sizes, choose_kernels, page_numbers
from jslora.progress import Progress
from jslora.request import EngineInfo
from jslora.runner import Runner
from jslora.schedule.plan import Limits
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


def memory_plan(config: EngineConfig, model: ModelConfig) -> MemoryPlan:
    """What `--check` prints: the division of this device's memory."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        available = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        available = host_memory_available()
    return plan_memory(config, model, available)


def build_core(
    config: EngineConfig, folder: Path | None, emit: Emit, progress: Progress, *,
    check_ledger: bool = False,
) -> tuple[EngineCore, EngineInfo]:  # fmt: skip
    """Start an engine core.

    Raises:
        ConfigError, ModelError: the configuration or the model's files are wrong.
    """
    cache = config.cache_dir / "xla"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = read_model_config(config, folder)
    plan = memory_plan(config, model)
    dtype = jnp.dtype(config.model.dtype)
    kernels = _kernels(config, model)
    weights = _weights(config, model, folder, dtype, progress)
    sizes = Sizes(
        pages=plan.pages,
        page_size=plan.page_size,
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_model_len=plan.max_model_len,
        max_rank=config.adapters.max_rank,
        dtype=dtype,
    )
    runner = Runner(Catalog(model, sizes, kernels), weights, progress)
    numbers = page_numbers(model, plan.page_size)
    store = AdapterStore(
        config.adapters.roots,
        model,
        numbers,
        np.dtype(dtype),
        AdapterLimits(config.adapters.max_rank, config.adapters.max_file_bytes, plan.pages - 2),
        config.adapters.host_cache_bytes,
        config.model.served_name,
        PackedCache(
            config.cache_dir / "adapters",
            model,
            numbers,
            np.dtype(dtype),
            config.adapters.disk_cache_bytes,
        ),
    )
    limits = Limits(
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_queued=config.scheduler.max_queued,
        max_queued_tokens=config.scheduler.max_queued_tokens,
        max_model_len=plan.max_model_len,
        page_size=plan.page_size,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )
    _register(store, config, progress)
    core = EngineCore(
        runner, store, limits, emit,
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


def _kernels(config: EngineConfig, model: ModelConfig) -> Kernels:
    try:
        kernels = choose_kernels(model, config.pool.page_size, config.kernels, launch.platform())
    except NotImplementedError as error:
        raise ConfigError(f"kernels: {config.kernels} cannot be had: {error}") from None
    log.info(
        "kernels on %s: lora %s, attention %s", kernels.platform, kernels.lora, kernels.attention
    )
    return kernels


def _weights(
    config: EngineConfig, model: ModelConfig, folder: Path | None, dtype: jnp.dtype,
    progress: Progress,
) -> dict[str, jax.Array]:  # fmt: skip
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] = lambda name, shape: device  # noqa: E731
    if folder is None:
        return dummy_weights(model, dtype, place)
    return load_weights(folder, model, dtype, place, progress=progress)


def _register(store: AdapterStore, config: EngineConfig, progress: Progress) -> None:
    """Register the configured adapters; a bad one is reported and left out."""
    if config.adapters.preload == "none":
        return
    found = store.discover()
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
    text = config.model_dump_json(exclude={"auth", "cache_dir"})
    return f"jslora-{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
