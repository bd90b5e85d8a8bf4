"""What is compiled: models, phases, implementations, devices. Host only: no jax."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jslora.errors import ConfigError
from pallas_kernels.lora.pieces import STORAGES

if TYPE_CHECKING:
    from jslora.config import EngineConfig

MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b": dict(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "qwen3-8b": dict(
        architectures=["Qwen3ForCausalLM"], vocab_size=151936, hidden_size=4096,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "smollm2-135m": dict(
        architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=100000.0, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""By name, what their `config.json` says of their shapes."""

LAYERS = 4
BASE_LAYERS = 2
"""Layers that the larger and the smaller of a case's two programs have."""

STEPS = (("llama3-8b", 1), ("llama3-8b", 4), ("qwen3-8b", 1), ("smollm2-135m", 1))
"""Models and numbers of devices whose steps are compiled, decode and mixed, without and with LoRA;
over several devices with LoRA in both ways of `jslora.split`. Of all but the third, adapters may be
quantised in one step more, over several devices fully sharded."""

QUANTIZE = ("int8", "fp8")
"""How the base's linear layers are kept in steps of the first model, beside those with none."""

POOL_BYTES = {"llama3-8b": 50 * 10**9, "qwen3-8b": 50 * 10**9, "smollm2-135m": 6 * 10**9}
"""On each device: what an 80 GB device has left, and for the demo what any has; past 4 GiB all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to compile.

    Attributes:
        what: "step", compiled with two numbers of layers, "kernels", each alone, or "programs",
            all that are no step (`Catalog.jobs`), each at its largest size.
        phase: "decode" (a token a row), "mixed" (the most tokens a step may have), or nothing of
            programs.
        kernels: implementation of both operations.
        fully: whether adapters are fully sharded over the devices.
        storages: that adapters may have, of `pieces.STORAGES`.
        quantize: how linear layers of the base are kept, as `model.quantize` says it.
        layers: of the larger program.
        rows, tokens, positions, max_rank, max_composed, page_size: limits of the server's
            configuration.
    """

    what: str
    model: str
    phase: str
    kernels: str
    lora: bool = True
    devices: int = 1
    fully: bool = False
    storages: tuple[str, ...] = ("full",)
    quantize: str = "none"
    layers: int = LAYERS
    rows: int
    tokens: int
    positions: int
    max_rank: int
    max_composed: int = 1
    page_size: int

    @property
    def hidden(self) -> int:
        return MODELS[self.model]["hidden_size"]

    @property
    def vocabulary(self) -> int:
        return MODELS[self.model]["vocab_size"]

    @property
    def name(self) -> str:
        parts = [self.model, *filter(None, [self.phase]), self.kernels]
        parts += [f"{self.devices} devices"] * (self.devices > 1)
        parts.append(("lora" if self.lora else "no lora") if self.what == "step" else self.what)
        parts += ["fully sharded"] * self.fully
        parts += ["quantised"] * (self.storages != ("full",))
        parts += [f"{self.quantize} base"] * (self.quantize != "none")
        return " ".join(parts)


def cases(llama: "EngineConfig", demo: "EngineConfig", *, all_layers: bool = False) -> list[Case]:
    """Everything that is checked; the dense models have the limits of one configuration.

    Raises:
        ConfigError: a configuration does not say how long a sequence may get.
    """
    found = []
    for case in _cases():
        config = demo if case["model"] == "smollm2-135m" else llama
        if config.model.max_model_len is None:
            raise ConfigError("compiling ahead needs model.max_model_len, which is not set")
        limits: dict[str, Any] = dict(
            rows=config.scheduler.max_running, tokens=config.scheduler.max_step_tokens,
            positions=config.model.max_model_len, max_rank=config.adapters.max_rank,
            max_composed=config.adapters.max_composed, page_size=config.pool.page_size,
        )  # fmt: skip
        made = Case(**case, **limits)
        if all_layers and made.what == "step":
            made = replace(made, layers=MODELS[made.model]["num_hidden_layers"])
        found.append(made)
    return found


def _cases() -> Iterator[dict[str, Any]]:
    for kernels in ("pallas", "triton"):
        for phase in ("decode", "mixed"):
            fixed = dict(phase=phase, kernels=kernels)
            for storages in (("full",), STORAGES):
                yield fixed | dict(what="kernels", model="llama3-8b", storages=storages)
            for model, devices in STEPS:
                step = fixed | dict(what="step", model=model, devices=devices)
                yield step | dict(lora=False)
                yield step | dict(lora=True)
                if devices > 1:
                    yield step | dict(lora=True, fully=True)
                if model != "qwen3-8b":
                    yield step | dict(lora=True, fully=devices > 1, storages=STORAGES)
                if model == "llama3-8b" and kernels == "pallas":
                    yield from (step | dict(quantize=quantize) for quantize in QUANTIZE)
    for devices in (1, 4):
        yield dict(what="programs", model="llama3-8b", phase="", kernels="pallas", devices=devices)
