"""How much memory the server takes, decided once before anything is allocated. Host only: no jax.

What is left of a device's memory after its part of the weights, per-slot state and a reserve for
temporaries, times `memory_fraction`, becomes pages; never more than every row at full length plus
`host_cache_bytes` of adapters could use, and in coarse steps, so that a restart finds its compiled
programs in the cache. All devices have as many pages, and a page of each device holds its own kv
heads.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from jslora.adapters.storages import check_rows
from jslora.config import EngineConfig
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig
from jslora.split import ONE_DEVICE, Split
from pallas_kernels.lora.pieces import row_words, scale_groups

COARSE = 256
_STATE_BYTES = 4  # of a counted token in a slot's state
_SCALE_BYTES = 4  # of an output channel of a quantised linear layer
_USUAL_RANK = 16  # of the adapters by which the split is chosen


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, on each device; `pages` includes the null page.

    Attributes:
        page_bytes: one page in all layers.
        host_cache: of each host.
        max_model_len: longest sequence, in tokens.
        split: how the model and its adapters are divided over the devices.
        reason: why adapters are divided so; empty on one device.
    """

    available: int
    weights: int
    slots: int
    page_bytes: int
    pages: int
    page_size: int
    host_cache: int
    max_model_len: int
    split: Split = ONE_DEVICE
    reason: str = ""

    @property
    def pool(self) -> int:
        return self.pages * self.page_bytes

    def report(self) -> str:
        """The plan as a table for people."""
        tokens = (self.pages - 1) * self.page_size
        rows = [
            ("memory available to the device", gib(self.available)),
            ("weights", gib(self.weights)),
            ("per-slot sampling state", gib(self.slots)),
            ("pool (KV cache and adapters)", gib(self.pool)),
            (
                f"  {self.pages} pages of {self.page_size} tokens",
                gib(self.page_bytes),
            ),
            ("  tokens, were no adapter loaded", f"{tokens:,}"),
            ("host memory for packed adapters, at most", gib(self.host_cache)),
            ("longest sequence", f"{self.max_model_len:,} tokens"),
        ]
        if self.split.devices > 1:
            rows.insert(0, ("devices; what follows is of each", str(self.split.devices)))
        lines = [f"{name:<44}{value:>14}" for name, value in rows]
        if self.split.devices > 1:
            lines.append(f"adapters are {lora_name(self.split)}: {self.reason}")
        return "\n".join(lines)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def plan_memory(
    config: EngineConfig, model: ModelConfig, available: int, processes: int = 1
) -> MemoryPlan:
    """Divide `available` bytes of each device's memory.

    Args:
        processes: that the devices belong to, as many to each.

    Raises:
        ConfigError: `max_model_len` is over the model's, or not even one page fits; or rows of the
            model cannot be stored as `adapters.storage` says.
        ModelError: the model cannot be split over the devices.
    """
    length = max_model_len(config, model)
    width = config.model.item_bytes
    size, devices = config.pool.page_size, config.mesh.model
    weights = _weight_bytes(model, devices, width, config.model.quantize)
    slots = config.scheduler.max_running * model.vocab_size * _STATE_BYTES
    page_bytes = model.layers * Split(devices).page_numbers(model, size) * width
    longest = -(-length // size)
    pages = config.pool.pages
    if pages is None:
        useful = config.scheduler.max_running * longest
        useful += -(-config.adapters.host_cache_bytes // (page_bytes * devices // processes))
        affordable = int((available - weights - slots) * config.pool.memory_fraction) // page_bytes
        pages = min(useful, affordable)
        pages = pages // COARSE * COARSE if pages >= COARSE else pages
    if pages - 1 < 1:
        raise ConfigError(
            f"{gib(available)} of memory leave no page beside {gib(weights)} of weights"
        )
    check_rows(config.adapters, model, Split(devices), 8 * width)
    split, reason = choose_split(config, model, pages)
    check_rows(config.adapters, model, split, 8 * width)
    return MemoryPlan(
        available, weights, slots, page_bytes, pages, size,
        config.adapters.host_cache_bytes, length, split, reason,
    )  # fmt: skip


def choose_split(config: EngineConfig, model: ModelConfig, pages: int) -> tuple[Split, str]:
    """How adapters are divided over the devices, and why.

    Raises:
        ModelError: the model cannot be split so.
    """
    devices, wanted = config.mesh.model, config.mesh.lora
    plain, full = Split(devices), Split(devices, fully=True)
    if devices == 1:
        return plain, ""
    if wanted != "auto":
        split = full if wanted == "fully_sharded" else plain
        split.local(model)
        return split, "mesh.lora asks for it"
    rank, storage = min(_USUAL_RANK, config.adapters.max_rank), config.adapters.storage
    bits = 8 * config.model.item_bytes
    rows = [row for module in MODULES for row in plain.rows(model, module)]
    words = sum(row_words(row, storage, bits) + scale_groups(row, storage) for row in rows)
    each = -(-rank * words // Split(devices).page_numbers(model, config.pool.page_size))
    needed = config.scheduler.max_running * each
    shape = f"{config.scheduler.max_running} adapters of rank {rank} on every module"
    if 2 * needed <= pages:
        return plain, f"{shape} take {needed} of {pages} pages, no more than half"
    if model.hidden % devices:
        return plain, f"{devices} devices do not divide the hidden width {model.hidden}"
    return full, f"{shape} would take {needed} of {pages} pages unsharded, over half"


def lora_name(split: Split) -> str:
    """The value of `mesh.lora` for a split."""
    return "fully_sharded" if split.fully else "no_collective"


def _weight_bytes(model: ModelConfig, devices: int, width: int, quantize: str) -> int:
    """Of one device: its part of what is split, and the rest whole."""
    split = Split(devices)
    local = split.local(model)
    if split.splits_vocabulary(model):
        local = replace(local, vocab_size=model.vocab_size // devices)
    if quantize == "none":
        return local.parameters * width
    widths = [local.widths(module) for module in MODULES]
    linear = model.layers * sum(wide_in * wide_out for wide_in, wide_out in widths)
    scales = model.layers * sum(wide_out for _, wide_out in widths)
    return (local.parameters - linear) * width + linear + _SCALE_BYTES * scales


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence served.

    Raises:
        ConfigError: the configuration asks for more than the model was made for.
    """
    asked = config.model.max_model_len
    if asked is not None and asked > model.max_positions:
        raise ConfigError(
            f"model.max_model_len is {asked}; the model was made for {model.max_positions}"
        )
    return asked or model.max_positions


def host_memory_available() -> int:
    """Bytes this process may still take: the machine's, or its control group's if that is less."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available
