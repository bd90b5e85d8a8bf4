"""A model and adapters built so that one token tells which weights and which cached keys made it.

A token is a pair (family, id). Adapter i answers a prompt of family f with the token (f, i), over
and over; the base does so with the id 0. Whatever else comes out is an error somewhere:

- Another adapter's weights, or none, give another id: the last layer's `down_proj` writes it.
- Every layer's `v_proj` marks the values that it caches with the adapter's sign pattern, and
  every token's values carry its family. Attention is uniform, so what it returns is the mean of
  all marks in the context. The answering row subtracts the marks it expects; what is left of them
  is read by the `ALARMS` with so high a gain that one position of a full context that was computed
  under another adapter, for another family, or not at all, makes one of them win.

The stream of a token has five parts, each with axes of its own (`_CONSTANT` to `_ID`); norms are
scaled to be the identity on a stream that is right, so that all of this is linear algebra and a
choice of numbers. Low-rank factors are drawn at random up to their last row, which makes their sum
come out right, so that every row of them counts.
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FAMILIES = 8
IDS = 64
"""Adapters are numbered 1 to `IDS` - 1."""
VOCABULARY = 1024
LENGTH = 128
"""Longest sequence."""
ALARMS = range(FAMILIES * IDS, FAMILIES * IDS + 4 * FAMILIES)
"""Tokens that tell of a context with foreign marks."""

_LAYERS, _HIDDEN, _WIDE = 2, 64, 32
_MARKS = 2 * FAMILIES  # of a cached value: its family, then its adapter's signs
_CONSTANT = 0
_FAMILY = slice(1, 1 + FAMILIES)
_SEEN_FAMILY = slice(_FAMILY.stop, _FAMILY.stop + FAMILIES)  # what attention brought
_SEEN_ADAPTER = slice(_SEEN_FAMILY.stop, _SEEN_FAMILY.stop + FAMILIES)
_ID = slice(_SEEN_ADAPTER.stop, _SEEN_ADAPTER.stop + IDS // 2)
_LARGE = 4.0  # the constant part of every stream
_EPS = 1e-6
_GAIN = 1000.0

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _WIDE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": _MARKS,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": _EPS,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "hidden_act": "silu",
}


def token(family: int, number: int) -> int:
    """The token that adapter `number` answers prompts of a family with."""
    return family * IDS + number


def write_model(folder: Path) -> None:
    """Write the base as a Hugging Face checkpoint in float32."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {
        "model.embed_tokens.weight": _embeddings(),
        "model.norm.weight": np.ones(_HIDDEN),
        "lm_head.weight": _head(),
    }
    for layer in range(_LAYERS):
        for name, value in _layer(layer).items():
            weights[f"model.layers.{layer}.{name}.weight"] = value
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, folder / "model.safetensors")


def write_adapter(folder: Path, number: int, rank: int, seed: int = 0) -> None:
    """Write the PEFT adapter that answers with the id `number`, at any rank.

    Adapters of one number and two ranks or seeds differ in their weights only.
    """
    assert 0 < number < IDS, f"adapter {number}"
    rng = np.random.default_rng([number, rank, seed])
    constant = np.zeros(_HIDDEN)
    constant[_CONSTANT] = _LARGE
    marks = np.zeros(_MARKS)
    marks[FAMILIES:] = _signs(number) - _signs(0)
    alpha = 2 * rank
    tensors, targets = {}, []
    for layer in range(_LAYERS):
        parts = {"self_attn.v_proj": (constant, marks)}
        if layer == _LAYERS - 1:
            parts["mlp.down_proj"] = (_activations(), _answer(number) - _answer(0))
        for module, (given, wanted) in parts.items():
            a, b = _factors(rng, given, wanted, rank)
            name = f"model.layers.{layer}.{module}"
            targets.append(name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (b * rank / alpha).astype(
                np.float32
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets,
        "r": rank, "lora_alpha": alpha, "bias": "none", "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _factors(
    rng: np.random.Generator, given: np.ndarray, wanted: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in], B [out, rank] so that B·A·`given` = `wanted`; A reads only `given`'s axes."""
    a = rng.uniform(0.5, 1.5, (rank, len(given))) * (given != 0) / np.abs(given).sum()
    b = rng.uniform(-1, 1, (len(wanted), rank))
    low = a @ given
    b[:, -1] = (wanted - b[:, :-1] @ low[:-1]) / low[-1]
    return a, b


def _signs(number: int) -> np.ndarray:
    """The adapter's mark: the bits of its number as signs, the upper ones repeated."""
    bits = (number >> np.arange(FAMILIES) % 6) & 1
    return 1.0 - 2.0 * bits


def _code(number: int) -> np.ndarray:
    """One of `IDS` unit vectors, orthogonal or opposite to each other (Sylvester-Hadamard)."""
    n = IDS // 2
    row = number % n
    signs = [(-1.0) ** (row & column).bit_count() for column in range(n)]
    return np.array(signs) / math.sqrt(n) * (1 if number < n else -1)


def _answer(number: int) -> np.ndarray:
    """What the last layer adds to the stream: the id, and the end of the marks it expects."""
    stream = np.zeros(_HIDDEN)
    stream[_ID] = _code(number)
    stream[_SEEN_ADAPTER] = -_LAYERS * _signs(number)
    return stream


def _activations() -> np.ndarray:
    """What `down_proj` reads: gates of 1 and `up` from 0.5 to 1.5, of every token alike."""
    return np.linspace(0.5, 1.5, _WIDE) / (1 + math.exp(-1))


def _scale(layer: int) -> float:
    """Root mean square of a stream that attended in so many layers: its norm's weight undoes it."""
    square = _LARGE**2 + 1 + layer**2 * (1 + FAMILIES)
    return math.sqrt(square / _HIDDEN + _EPS)


def _layer(layer: int) -> dict[str, np.ndarray]:
    v, o = np.zeros((_MARKS, _HIDDEN)), np.zeros((_HIDDEN, _MARKS))
    v[:FAMILIES, _FAMILY] = np.eye(FAMILIES)
    v[FAMILIES:, _CONSTANT] = _signs(0) / _LARGE
    o[_SEEN_FAMILY.start : _SEEN_ADAPTER.stop] = np.eye(_MARKS)
    gate, up = np.zeros((2, _WIDE, _HIDDEN))
    down = np.zeros((_HIDDEN, _WIDE))
    if layer == _LAYERS - 1:
        gate[:, _CONSTANT] = 1 / _LARGE
        up[:, _CONSTANT] = np.linspace(0.5, 1.5, _WIDE) / _LARGE
        down[:] = _answer(0)[:, None] / _activations().sum()
    return {
        "input_layernorm": np.full(_HIDDEN, _scale(layer)),
        "self_attn.q_proj": np.zeros((_MARKS, _HIDDEN)),
        "self_attn.k_proj": np.zeros((_MARKS, _HIDDEN)),
        "self_attn.v_proj": v,
        "self_attn.o_proj": o,
        "post_attention_layernorm": np.full(_HIDDEN, _scale(layer + 1)),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": down,
    }


def _embeddings() -> np.ndarray:
    """Every token: the constant, and its family; the alarms and what follows belong to none."""
    embed = np.zeros((VOCABULARY, _HIDDEN))
    embed[:, _CONSTANT] = _LARGE
    for family in range(FAMILIES):
        embed[family * IDS : (family + 1) * IDS, _FAMILY][:, family] = 1
    return embed


def _head() -> np.ndarray:
    """Tokens read their family and id; alarms read what is left of the marks, in either sign."""
    head = np.zeros((VOCABULARY, _HIDDEN))
    for family in range(FAMILIES):
        for number in range(IDS):
            head[token(family, number), _FAMILY][family] = 1
            head[token(family, number), _ID] = _code(number)
    left = np.zeros((_MARKS, _HIDDEN))
    left[:, _SEEN_FAMILY.start : _SEEN_ADAPTER.stop] = np.eye(_MARKS)
    left[:FAMILIES, _FAMILY] = -_LAYERS * np.eye(FAMILIES)
    head[ALARMS.start : ALARMS.stop] = _GAIN * np.concatenate([left, -left])
    return head
