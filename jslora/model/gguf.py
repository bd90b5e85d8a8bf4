"""GGUF file → Hugging Face folder: bfloat16 safetensors, config.json and tokenizer files.

Every tensor of the file binds by name and shape to one weight of the model, or the conversion is
refused; memory is bounded by one output shard. Layout facts (names, key spelling, row order, rope
factors) follow the GGUF specification and llama.cpp's converter. Host only: no jax; needs the
`gguf` package.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jslora import vocabulary
from jslora.errors import ModelError
from jslora.model.gguf_file import GgufFile
from jslora.progress import Progress
from jslora.vocabulary import Kind, Vocabulary

VERSION = 1
"""Raised when the same file would convert to something else; part of the cache key."""

SHARD_BYTES = 2**30
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Binding:
    """Where a GGUF tensor goes. `heads` > 0: its rows are rope pairs, interleaved per head."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def arrange(self, weight: np.ndarray) -> np.ndarray:
        """Rows of each head from pairs (x0, y0, x1, y1, …) to halves (x0, x1, … y0, y1, …)."""
        if not self.heads:
            return weight
        pairs = weight.reshape(self.heads, -1, 2, weight.shape[-1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def convert(path: Path, folder: Path, progress: Progress) -> None:
    """Write the model and tokenizer in the GGUF file `path` into the existing `folder`.

    Progress is reported as ("convert", tensors done, tensors in all, tensor name).

    Raises:
        ModelError: `gguf` is not installed, the file is damaged, or holds an architecture,
            tensor, quantisation, rope variant or vocabulary that is not supported.
    """
    file = GgufFile(path)
    tokens = file.items("tokenizer.ggml.tokens", str)
    config = _config(file, len(tokens))
    written = {
        "config.json": config,
        "generation_config.json": _generation_config(file),
        "tokenizer_config.json": _tokenizer_config(file, tokens),
    }
    tokenizer = _tokenizer(file, tokens)
    _write_weights(file, _bind(file, config), folder, progress)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, data in written.items():
        _write_json(folder / name, data)


# Model ---------------------------------------------------------------------------------------


def _config(file: GgufFile, tokens: int) -> dict[str, Any]:
    """The contents of config.json."""
    arch = file.need("general.architecture", str)
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"GGUF architecture {arch!r} is not supported; supported are {known}")
    if file.get(f"{arch}.expert_count", int, 0):
        raise ModelError("GGUF mixture-of-experts models are not supported")
    hidden = file.need(f"{arch}.embedding_length", int)
    heads = file.need(f"{arch}.attention.head_count", int)
    if heads < 1:
        raise ModelError(f"GGUF key {arch}.attention.head_count is {heads}")
    head_dim = file.get(f"{arch}.attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(f"{arch}.{key}", int, head_dim) != head_dim:
            raise ModelError(f"GGUF key {arch}.{key} differs from the head size {head_dim}")
    theta = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    epsilon = file.need(f"{arch}.attention.layer_norm_rms_epsilon", float)
    return {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": file.need(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": file.need(f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.need(f"{arch}.context_length", int),
        "sliding_window": file.get(f"{arch}.attention.sliding_window", int),
        "use_sliding_window": f"{arch}.attention.sliding_window" in file,
        # Stored as float32: 1e-5 reads back as 9.99999974e-06 unless rounded to its digits.
        "rms_norm_eps": float(f"{epsilon:.6g}"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, arch, theta, head_dim),
        "vocab_size": _vocab_size(file, tokens),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "torch_dtype": "bfloat16",
        **_token_ids(file),
    }


def _vocab_size(file: GgufFile, tokens: int) -> int:
    """Rows of the embedding: at least as many as there are tokens."""
    if "token_embd.weight" not in file.shapes:
        raise ModelError("the GGUF file lacks the tensor token_embd.weight")
    rows = file.shapes["token_embd.weight"][0]
    if tokens > rows:
        raise ModelError(f"the GGUF vocabulary has {tokens} tokens but only {rows} embeddings")
    return rows


def _rope_scaling(file: GgufFile, arch: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Linear scaling has keys; Llama 3's is stored only as the factors it comes to."""
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "linear":
        factor = file.need(f"{arch}.rope.scaling.factor", float)
        return {"rope_type": "linear", "factor": factor}
    if kind != "none" or f"{arch}.rope.scale_linear" in file:
        raise ModelError(f"GGUF rope scaling {kind!r} is not supported; linear and llama3 are")
    if _ROPE_FACTORS not in file.shapes:
        return None
    wrong = ModelError(f"GGUF tensor {_ROPE_FACTORS} does not hold Llama 3's rope scaling")
    if file.shapes[_ROPE_FACTORS] != (head_dim // 2,):
        raise wrong
    factors = file.read(_ROPE_FACTORS, np.float32)
    factor = float(factors.max())
    if np.array_equal(factors, np.ones_like(factors)):
        return None
    if not np.allclose(factors, _llama3_factors(factor, theta, head_dim), rtol=1e-4):
        raise wrong
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


def _llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each rope frequency by, [D/2]: 1 for fast ones, up to `factor`.

    Between the bounds the *inverse* is interpolated over turns within the original context.
    """
    low, high, positions = _LLAMA3_ROPE.values()
    turns = positions * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (fast + (1 - fast) / factor)


def _bind(file: GgufFile, config: dict[str, Any]) -> dict[str, _Binding]:
    """GGUF name → binding for every tensor of the file, all names and shapes checked."""
    found = file.shapes.keys() - {_ROPE_FACTORS}
    layers = config["num_hidden_layers"]
    if layers > len(found):
        raise ModelError(f"the GGUF file has {layers} layers but {len(found)} tensors")
    bindings = dict(_bindings(config))
    if config["tie_word_embeddings"]:
        del bindings["output.weight"]
    if missing := bindings.keys() - found:
        raise ModelError(f"the GGUF file lacks the tensor {min(missing)}")
    if unknown := found - bindings.keys():
        raise ModelError(
            f"the GGUF tensor {min(unknown)} has no place in {config['architectures'][0]}"
        )
    for name, binding in bindings.items():
        if (shape := file.shapes[name]) != binding.shape:
            raise ModelError(
                f"GGUF tensor {name} has shape {list(shape)}; expected {list(binding.shape)}"
            )
    return bindings


def _bindings(config: dict[str, Any]) -> Iterator[tuple[str, _Binding]]:
    H, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K, D = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    arch = config["model_type"]
    # llama.cpp's rope turns neighbouring rows for "llama" files, and halves for the others.
    q_heads, k_heads = (N, K) if arch == "llama" else (0, 0)
    yield "token_embd.weight", _Binding("model.embed_tokens.weight", (V, H))
    for i in range(config["num_hidden_layers"]):
        here, there = f"blk.{i}", f"model.layers.{i}"
        attention, mlp = f"{there}.self_attn", f"{there}.mlp"
        yield f"{here}.attn_norm.weight", _Binding(f"{there}.input_layernorm.weight", (H,))
        yield f"{here}.attn_q.weight", _Binding(f"{attention}.q_proj.weight", (N * D, H), q_heads)
        yield f"{here}.attn_k.weight", _Binding(f"{attention}.k_proj.weight", (K * D, H), k_heads)
        yield f"{here}.attn_v.weight", _Binding(f"{attention}.v_proj.weight", (K * D, H))
        if arch == "qwen2":
            for letter, heads in (("q", N), ("k", K), ("v", K)):
                bias = _Binding(f"{attention}.{letter}_proj.bias", (heads * D,))
                yield f"{here}.attn_{letter}.bias", bias
        if arch == "qwen3":
            yield f"{here}.attn_q_norm.weight", _Binding(f"{attention}.q_norm.weight", (D,))
            yield f"{here}.attn_k_norm.weight", _Binding(f"{attention}.k_norm.weight", (D,))
        yield f"{here}.attn_output.weight", _Binding(f"{attention}.o_proj.weight", (H, N * D))
        yield f"{here}.ffn_norm.weight", _Binding(f"{there}.post_attention_layernorm.weight", (H,))
        yield f"{here}.ffn_gate.weight", _Binding(f"{mlp}.gate_proj.weight", (F, H))
        yield f"{here}.ffn_up.weight", _Binding(f"{mlp}.up_proj.weight", (F, H))
        yield f"{here}.ffn_down.weight", _Binding(f"{mlp}.down_proj.weight", (H, F))
    yield "output_norm.weight", _Binding("model.norm.weight", (H,))
    yield "output.weight", _Binding("lm_head.weight", (V, H))


# Weights -------------------------------------------------------------------------------------


def _write_weights(
    file: GgufFile, bindings: dict[str, _Binding], folder: Path, progress: Progress
) -> None:
    shards = list(_shards(bindings))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        filename = "model.safetensors"
        if len(shards) > 1:
            filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            progress("convert", len(where), len(bindings), name)
            binding = bindings[name]
            tensors[binding.name] = binding.arrange(file.read(name))
            where[binding.name] = filename
        save_file(tensors, folder / filename, metadata={"format": "pt"})
    progress("convert", len(where), len(bindings), "")
    if len(shards) > 1:
        total = sum(binding.bytes for binding in bindings.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(bindings: dict[str, _Binding]) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would take a file past `SHARD_BYTES`."""
    names: list[str] = []
    size = 0
    for name, binding in bindings.items():
        if names and size + binding.bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += binding.bytes
    yield names


# Tokenizer -----------------------------------------------------------------------------------


def _tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    model = file.need("tokenizer.ggml.model", str)
    kinds: list[int] = [Kind.NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in file:
        kinds = file.items("tokenizer.ggml.token_type", int)
    if model not in ("gpt2", "llama"):
        raise ModelError(f"GGUF vocabulary {model!r} is not supported; gpt2 and llama are")
    if file.get("tokenizer.ggml.add_eos_token", bool, False):
        raise ModelError("GGUF vocabularies that append an end token are not supported")
    pre = file.need("tokenizer.ggml.pre", str) if model == "gpt2" else None
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool, model == "llama" or pre == "llama-bpe")
    bos = file.need("tokenizer.ggml.bos_token_id", int) if add_bos else None
    entries = Vocabulary(tokens, kinds, bos)
    if pre is not None:
        return vocabulary.byte_level(entries, file.items("tokenizer.ggml.merges", str), pre)
    scores = file.items("tokenizer.ggml.scores", float)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    return vocabulary.sentencepiece(entries, scores, space_prefix=prefix)


def _token_ids(file: GgufFile) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{ours}_token_id": file.get(f"tokenizer.ggml.{theirs}_token_id", int)
        for ours, theirs in keys.items()
    }


def _generation_config(file: GgufFile) -> dict[str, Any]:
    """As `_token_ids`, with the end of a turn beside the end of a text."""
    ids = _token_ids(file)
    ends = [ids["eos_token_id"], file.get("tokenizer.ggml.eot_token_id", int)]
    return {**ids, "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def _tokenizer_config(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    ids = {**_token_ids(file), "unk_token_id": file.get("tokenizer.ggml.unknown_token_id", int)}
    for name, token in ids.items():
        if token is not None and not 0 <= token < len(tokens):
            raise ModelError(f"GGUF {name} {token} is outside a vocabulary of {len(tokens)} tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            name.removesuffix("_id"): tokens[token]
            for name, token in ids.items()
            if token is not None
        },
        "chat_template": file.get("tokenizer.chat_template", str),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
