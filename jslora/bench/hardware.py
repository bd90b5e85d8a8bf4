"""Devices and models to simulate: what the vendors say, and what was found to be reached of it.

Host only: no jax.
"""

from dataclasses import dataclass
from types import MappingProxyType

from jslora.bench.floor import H100, H200, Device
from jslora.bench.steptime import FloorTimes, Parts, Roofline, Shares, StepTime
from jslora.errors import ConfigError
from jslora.model.config import ModelConfig

LLAMA_7B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32000, hidden=4096, layers=32, heads=32,
    kv_heads=32, head_dim=128, feed_forward=11008, max_positions=4096,
)  # fmt: skip
LLAMA_13B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32000, hidden=5120, layers=40, heads=40,
    kv_heads=40, head_dim=128, feed_forward=13824, max_positions=4096,
)  # fmt: skip
LLAMA3_8B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden=4096, layers=32, heads=32,
    kv_heads=8, head_dim=128, feed_forward=14336, max_positions=8192, rope_theta=500000.0,
)  # fmt: skip

MODELS = MappingProxyType({"7b": LLAMA_7B, "13b": LLAMA_13B, "llama3-8b": LLAMA3_8B})

# The vendors' data sheets; dense 16-bit products with 32-bit sums.
A10G = Device("A10G", bandwidth=600e9, flops=70e12)
A100_40 = Device("A100 40 GB", bandwidth=1.555e12, flops=312e12)
A100_80 = Device("A100 80 GB", bandwidth=2.039e12, flops=312e12)

# Found by `calibrate.fit_device` from two of S-LoRA's runs each: its engine's, not ours. Memory's
# share was given.
ON_A10G = Shares(
    overhead=0.00428, memory=0.8, compute=0.384, lora_overhead=0.00212, lora_compute=0.346
)
ON_A100_40 = Shares(
    overhead=0.0269, memory=0.8, compute=0.461, lora_overhead=0.00324, lora_compute=0.252
)
ON_A100_80 = Shares(
    overhead=0.0304, memory=0.8, compute=0.429, lora_overhead=0.00336, lora_compute=0.299
)

_MEMORY_SHARE = 0.9  # of a device's bytes: the rest is for activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device and its link.

    Attributes:
        memory: bytes.
        transfer: bytes/s from the host.
        shares: of an engine that was measured on it; None if there is none.
    """

    device: Device
    memory: float
    transfer: float
    shares: Shares | None = None

    def step_time(self, model: ModelConfig, factor: float | None = None) -> StepTime:
        """The model of a step: `factor` times the floor, or as the measured engine.

        Raises:
            ConfigError: no engine was measured and no factor is given.
        """
        if factor is not None:
            return FloorTimes(Parts(model), self.device, factor)
        if self.shares is None:
            raise ConfigError(f"{self.device.name}: no engine was measured; give a floor factor")
        return Roofline(Parts(model), self.device, self.shares)

    def pages(self, model: ModelConfig, page_size: int) -> int:
        """Pages that its memory holds beside the model's 16-bit weights.

        Raises:
            ConfigError: not one.
        """
        page = 4 * model.layers * page_size * model.kv_heads * model.head_dim
        found = int(_MEMORY_SHARE * self.memory - 2 * model.parameters) // page
        if found < 2:
            raise ConfigError(f"{self.device.name} does not hold the model's weights")
        return found


HARDWARE = MappingProxyType(
    {
        "a10g": Hardware(device=A10G, memory=24e9, transfer=12e9, shares=ON_A10G),
        "a100-40": Hardware(device=A100_40, memory=40e9, transfer=24e9, shares=ON_A100_40),
        "a100-80": Hardware(device=A100_80, memory=80e9, transfer=24e9, shares=ON_A100_80),
        "h100": Hardware(device=H100, memory=80e9, transfer=50e9),
        "h200": Hardware(device=H200, memory=141e9, transfer=50e9),
    }
)
"""By name; links are PCIe 4 with 8 lanes (A10G) or 16, and PCIe 5 with 16."""
