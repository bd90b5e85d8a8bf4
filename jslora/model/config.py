"""The shape of a base model, read from a Hugging Face `config.json`; anything unknown is refused.

Every architecture served is one decoder block with three switches: a bias on q, k and v
(Qwen2), a norm on each head of q and k (Qwen3), and the rope variant. Host only: no jax.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jslora.errors import ModelError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a block, in the order adapters are laid out in."""

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Modules that read the same input."""

ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rope frequency scaling: "linear", or Llama 3.1's "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Dimensions of a decoder-only transformer; fields are named after the letters in `jslora`."""

    architecture: str
    vocab_size: int  # V
    hidden: int  # H
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # D
    feed_forward: int  # F
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def widths(self, module: str) -> tuple[int, int]:
        """(input width, output width) of one of `MODULES`."""
        H, F = self.hidden, self.feed_forward
        ND, KD = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (H, ND),
            "k_proj": (H, KD),
            "v_proj": (H, KD),
            "o_proj": (ND, H),
            "gate_proj": (H, F),
            "up_proj": (H, F),
            "down_proj": (F, H),
        }[module]

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases included."""
        block = sum(math.prod(self.widths(m)) for m in MODULES) + 2 * self.hidden
        block += self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim
        block += self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden * (1 if self.tie_embeddings else 2)
        return self.layers * block + embeddings + self.hidden


def from_hf(data: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`, for the end tokens).

    Raises:
        ModelError: the architecture, rope variant, activation or attention kind is not implemented,
            or a dimension is missing or inconsistent.
    """
    try:
        config = _read(data, generation or {})
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json holds a value of the wrong kind: {error}") from None
    _check_sizes(config)
    return config


def _read(data: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    _refuse_variants(data)
    heads, hidden = int(data["num_attention_heads"]), int(data["hidden_size"])
    bos = data.get("bos_token_id")
    return ModelConfig(
        architecture=name,
        vocab_size=int(data["vocab_size"]),
        hidden=hidden,
        layers=int(data["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(data.get("num_key_value_heads") or heads),
        head_dim=int(data.get("head_dim") or hidden // max(heads, 1)),
        feed_forward=int(data["intermediate_size"]),
        max_positions=int(data.get("max_position_embeddings", 2048)),
        norm_eps=float(data.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(data),
        rope_scaling=_rope_scaling(data),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        eos_token_ids=_end_tokens(data, generation),
        bos_token_id=None if bos is None else int(bos),
        **ARCHITECTURES[name],
    )


def _check_sizes(config: ModelConfig) -> None:
    c = config
    counts = (c.heads, c.kv_heads, c.head_dim, c.layers, c.hidden, c.feed_forward, c.vocab_size)
    if min(*counts, c.max_positions) < 1 or c.heads % c.kv_heads or c.head_dim % 2:
        raise ModelError(
            f"config.json: {c.heads} heads, {c.kv_heads} kv heads, head_dim {c.head_dim}, "
            f"{c.layers} layers, hidden_size {c.hidden}, intermediate_size {c.feed_forward}, "
            f"vocab_size {c.vocab_size} and max_position_embeddings {c.max_positions} "
            "do not make a model"
        )
    rope = c.rope_scaling or RopeScaling("default", 1.0)
    numbers = (c.rope_theta, rope.factor, rope.high_freq_factor - rope.low_freq_factor)
    if not all(0 < number < math.inf for number in (*numbers, 1 + c.norm_eps)):
        raise ModelError(
            f"config.json: rope_theta {c.rope_theta}, rope scaling {rope} and rms_norm_eps "
            f"{c.norm_eps} do not make a model"
        )


def _refuse_variants(data: Mapping[str, Any]) -> None:
    if data.get("auto_map"):
        raise ModelError("config.json asks for remote code (auto_map); it is never run")
    if data.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {data['hidden_act']!r} is not supported; only silu is")
    mistral = data["architectures"][0] == "MistralForCausalLM"
    # What transformers assumes of a file that does not say.
    window = data.get("sliding_window", 4096)
    windowed = data.get("use_sliding_window", mistral)
    if window and windowed and window < data.get("max_position_embeddings", 2048):
        raise ModelError(f"sliding_window {window} is not supported; only full attention is")
    kinds = set(data.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(f"layer_types {sorted(kinds)} are not supported; only full attention is")
    if data["architectures"][0] != "Qwen2ForCausalLM" and data.get("attention_bias"):
        raise ModelError("attention_bias is supported for Qwen2ForCausalLM only")
    if data.get("mlp_bias"):
        raise ModelError("mlp_bias is not supported")
    rope = _rope(data)
    parts = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if parts:
        raise ModelError(f"rope settings of their own for {parts} are not supported")
    share = rope.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ModelError(f"partial_rotary_factor {share} is not supported; only whole heads are")


def _rope(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rope settings live in `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    return data.get("rope_parameters") or data.get("rope_scaling") or {}


def _rope_theta(data: Mapping[str, Any]) -> float:
    return float(data.get("rope_theta") or _rope(data).get("rope_theta") or 10000.0)


def _rope_scaling(data: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(data)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ModelError(f"rope type {kind!r} is not supported; default, linear and llama3 are")


def _end_tokens(data: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for value in (generation.get("eos_token_id"), data.get("eos_token_id")):
        for token in value if isinstance(value, list) else [value]:
            if token is not None and int(token) not in found:
                found.append(int(token))
    return tuple(found)
