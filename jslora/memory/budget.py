"""How much memory the server takes, decided once before anything is allocated. Host only: no jax.

What is left of the device's memory after weights, per-slot state and a reserve for temporaries,
times `memory_fraction`, becomes pages; never more than every row at full length plus
`host_cache_bytes` of adapters could use, and in coarse steps, so that a restart finds its compiled
programs in the cache.
"""

from dataclasses import dataclass
from pathlib import Path

from jslora.config import EngineConfig
from jslora.errors import ConfigError
from jslora.model.config import ModelConfig

COARSE = 256
_STATE_BYTES = 4  # of a counted token in a slot's state


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose; `pages` includes the null page.

    Attributes:
        page_bytes: one page in all layers.
        max_model_len: longest sequence, in tokens.
    """

    available: int
    weights: int
    slots: int
    page_bytes: int
    pages: int
    page_size: int
    host_cache: int
    max_model_len: int

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
        return "\n".join(f"{name:<44}{value:>14}" for name, value in rows)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def plan_memory(config: EngineConfig, model: ModelConfig, available: int) -> MemoryPlan:
    """Divide `available` bytes of device memory.

    Raises:
        ConfigError: `max_model_len` is over the model's, or not even one page fits.
    """
    length = max_model_len(config, model)
    width = 2 if config.model.dtype == "bfloat16" else 4
    size = config.pool.page_size
    weights = model.parameters * width
    slots = config.scheduler.max_running * model.vocab_size * _STATE_BYTES
    page_bytes = model.layers * size * 2 * model.kv_heads * model.head_dim * width
    longest = -(-length // size)
    pages = config.pool.pages
    if pages is None:
        useful = config.scheduler.max_running * longest
        useful += -(-config.adapters.host_cache_bytes // page_bytes)
        affordable = int((available - weights - slots) * config.pool.memory_fraction) // page_bytes
        pages = min(useful, affordable)
        pages = pages // COARSE * COARSE if pages >= COARSE else pages
    if pages - 1 < 1:
        raise ConfigError(
            f"{gib(available)} of memory leave no page beside {gib(weights)} of weights"
        )
    return MemoryPlan(
        available, weights, slots, page_bytes, pages, size,
        config.adapters.host_cache_bytes, length,
    )  # fmt: skip


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
