"""Tiny GGUF files for tests, written with the `gguf` package as llama.cpp lays them out.

Weights are given in the layout of Hugging Face files; what the converter does to them (names, the
row order of q and k in "llama" files) is done here, apart from the code under test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD = 64, 2, 4, 2, 32, 96
"""The head size differs from hidden / heads, as in Qwen3."""

SHAPE = {
    "block_count": LAYERS,
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": FEED_FORWARD,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD_DIM,
}

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_weights(arch: str, vocab: int, *, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face names → float32 weights of a model of the dimensions above."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            "mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
        }
        if arch == "qwen2":
            layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if arch == "qwen3":
            layer |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.2 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def gguf_tensors(arch: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF names → the same weights, rows of q and k in the order llama.cpp wants them."""
    tensors = {}
    for name, weight in weights.items():
        *path, suffix = name.split(".")
        if path[:2] == ["model", "layers"]:
            layer, path = f"blk.{path[2]}.", path[3:]
        else:
            layer = ""
        ours = _NAMES[".".join(path)]
        if arch == "llama" and ours in ("attn_q", "attn_k"):
            heads = HEADS if ours == "attn_q" else KV_HEADS
            halves = weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        tensors[f"{layer}{ours}.{suffix}"] = weight
    return tensors


def write(
    path: Path,
    arch: str,
    tensors: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    shape: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file.

    Args:
        tensors: arrays as they are, or (raw bytes, quantisation) pairs.
        tokenizer: metadata below "tokenizer.".
        shape: metadata below the architecture's name, instead of `SHAPE`.
    """
    writer = gguf.GGUFWriter(path, arch)
    metadata = {f"{arch}.{key}": value for key, value in (shape or SHAPE).items()}
    metadata |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
