"""GGUF files become Hugging Face folders: exact weights, config and vocabularies, or a refusal."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as library
import ml_dtypes
import numpy as np
import pytest
import tiny_gguf
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_gguf import HEAD_DIM, SHAPE, gguf_tensors, random_weights

from jslora.errors import ModelError
from jslora.fetch import load_config
from jslora.model import gguf, gguf_file
from jslora.model.config import RopeScaling
from jslora.progress import silent
from jslora.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "tokenizer_goldens"
BYTE_LEVEL = json.loads((GOLDENS / "byte_level.json").read_text())
SPM = json.loads((GOLDENS / "sentencepiece.json").read_text())
V = len(BYTE_LEVEL["vocabulary"]["tokens"])
TEMPLATE = "{{ messages[0].content }}"


def vocabulary(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Metadata of the golden byte-level vocabulary; a change to None leaves a key out."""
    entries = {
        **BYTE_LEVEL["vocabulary"],
        "model": "gpt2",
        "pre": pre,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"ggml.{key}": value for key, value in entries.items() if value is not None}


def convert(path: Path) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    gguf.convert(path, folder, silent)
    return folder


def rope_factors(factor: float = 8.0, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """As llama.cpp's converter computes them for Llama 3.1."""
    frequencies = 1.0 / (10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < 8192 / high:
            factors.append(1.0)
        elif length > 8192 / low:
            factors.append(factor)
        else:
            smooth = (8192 / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_config_survive(arch: str, tied: bool, tmp_path: Path) -> None:
    weights = random_weights(arch, V, tied=tied)
    tokenizer = {**vocabulary(), "chat_template": TEMPLATE}
    tensors = gguf_tensors(arch, weights)
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", arch, tensors, tokenizer))
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        expected = weight.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    config = load_config(folder)
    assert (config.hidden, config.layers, config.heads, config.kv_heads) == (64, 2, 4, 2)
    assert (config.head_dim, config.feed_forward, config.vocab_size) == (HEAD_DIM, 96, V)
    assert (config.norm_eps, config.rope_theta, config.max_positions) == (1e-5, 10000.0, 256)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (
        tied,
        arch == "qwen2",
        arch == "qwen3",
    )
    template = Tokenizer(folder).chat_template
    assert template is not None and template.source == TEMPLATE


@pytest.mark.parametrize(
    "kind", [t for t in GGMLQuantizationType if t in library.quants._type_traits]
)
def test_every_quantisation_is_read_by_blocks_of_rows(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = library.GGML_QUANT_SIZES[kind]
    rows, columns = 7, 2 * block
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows, columns // block * size), np.uint8)
    path = tiny_gguf.write(tmp_path / "q.gguf", "llama", {"x": (raw, kind)}, {})
    monkeypatch.setattr(gguf_file, "_BLOCK_ELEMENTS", 3 * columns)
    with np.errstate(all="ignore"):  # random bytes make scales of any size
        expected = library.dequantize(raw, kind).astype(ml_dtypes.bfloat16)
        found = gguf_file.GgufFile(path).read("x")
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_models_are_close(kind: str, tmp_path: Path) -> None:
    weights = random_weights("llama", V, tied=True)
    quantised = GGMLQuantizationType[kind]
    tensors = {
        name: (library.quantize(tensor, quantised), quantised) if tensor.ndim > 1 else tensor
        for name, tensor in gguf_tensors("llama", weights).items()
    }
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, vocabulary()))
    bound = {"Q4_0": 0.12, "Q5_1": 0.05}.get(kind, 0.01)
    for name, found in load_file(folder / "model.safetensors").items():
        np.testing.assert_allclose(
            found.astype(np.float32), weights[name], atol=bound, err_msg=name
        )


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights("llama", V, tied=False)
    tensors = gguf_tensors("llama", weights)
    monkeypatch.setattr(gguf, "SHARD_BYTES", 40_000)
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, vocabulary()))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(weight.size for weight in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        for name, found in load_file(folder / file).items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(found, weights[name].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_from_its_factors(factor: float, tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", random_weights("llama", V, tied=True))
    tensors["rope_freqs.weight"] = rope_factors(factor)
    assert len(set(tensors["rope_freqs.weight"])) > 1
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, vocabulary()))
    assert load_config(folder).rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_linear_rope_and_factors_of_one(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", random_weights("llama", V, tied=True))
    shape = {**SHAPE, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    file = tiny_gguf.write(tmp_path / "linear.gguf", "llama", tensors, vocabulary(), shape)
    assert load_config(convert(file)).rope_scaling == RopeScaling("linear", 2.0)
    tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    file = tiny_gguf.write(tmp_path / "ones.gguf", "llama", tensors, vocabulary())
    assert load_config(convert(file)).rope_scaling is None


def test_end_of_turn_ends_the_sequence_too(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", random_weights("llama", V, tied=True))
    tokenizer = vocabulary(eot_token_id=0)
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, tokenizer))
    assert load_config(folder).eos_token_ids == (2, 0)


# Vocabularies, against what llama.cpp and sentencepiece make of the same texts --------------------


@pytest.mark.parametrize("pre", BYTE_LEVEL["ids"])
def test_byte_level_ids_equal_llama_cpp(pre: str, tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", random_weights("llama", V, tied=True))
    folder = convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, vocabulary(pre)))
    tokenizer = Tokenizer(folder)
    for text, ids in zip(BYTE_LEVEL["texts"], BYTE_LEVEL["ids"][pre], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.special_ids == {0, 1, 2}  # not the user-defined last one


def test_sentencepiece_ids_equal_llama_cpp(tmp_path: Path) -> None:
    vocabulary = SPM["vocabulary"]
    weights = random_weights("llama", len(vocabulary["tokens"]), tied=True)
    metadata = {f"ggml.{key}": value for key, value in vocabulary.items()}
    metadata |= {"ggml.model": "llama", "ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
    tensors = gguf_tensors("llama", weights)
    tokenizer = Tokenizer(convert(tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, metadata)))
    for text, ids in zip(SPM["texts"], SPM["llama_cpp_ids"], strict=True):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("given, adds", [(True, True), (False, False), (None, False)])
def test_a_start_token_is_added_when_the_file_says_so(
    given: bool | None, adds: bool, tmp_path: Path
) -> None:
    tensors = gguf_tensors("llama", random_weights("llama", V, tied=True))
    file = tmp_path / "m.gguf"
    tiny_gguf.write(file, "llama", tensors, vocabulary(add_bos_token=given))
    ids = Tokenizer(convert(file)).encode("the")
    assert (ids[0] == 1) == adds


# Refusals -----------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]


def drop(key: str) -> Edit:
    return lambda tensors, tokenizer, shape: [x.pop(key, None) for x in (tensors, tokenizer, shape)]


def tensor(name: str, value: Any) -> Edit:
    return lambda tensors, tokenizer, shape: tensors.update({name: value})


def token(key: str, value: Any) -> Edit:
    return lambda tensors, tokenizer, shape: tokenizer.update({f"ggml.{key}": value})


def dimension(key: str, value: Any) -> Edit:
    return lambda tensors, tokenizer, shape: shape.update({key: value})


ZEROS = np.zeros((4, 4), np.float32)
REFUSALS: list[tuple[Edit, str]] = [
    (drop("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight"),
    (drop("token_embd.weight"), "lacks the tensor token_embd.weight"),
    (tensor("blk.0.attn_q.bias", ZEROS[0]), "blk.0.attn_q.bias has no place"),
    (tensor("blk.2.ffn_up.weight", ZEROS), "blk.2.ffn_up.weight has no place"),
    (tensor("output.weight", ZEROS), r"output.weight has shape [4, 4]; expected [641, 64]"),
    (tensor("blk.0.ffn_norm.weight", ZEROS[0]), "blk.0.ffn_norm.weight has shape [4]"),
    (tensor("output_norm.weight", np.ones(64)), "output_norm.weight: type F64 is not supported"),
    (tensor("rope_freqs.weight", rope_factors(low=2.0)), "rope_freqs.weight does not hold"),
    (tensor("rope_freqs.weight", ZEROS[0]), "rope_freqs.weight does not hold"),
    (dimension("rope.scaling.type", "yarn"), "rope scaling 'yarn'"),
    (dimension("rope.dimension_count", 16), "rope.dimension_count differs"),
    (dimension("expert_count", 8), "mixture-of-experts"),
    (dimension("block_count", 2**31), "2147483648 layers"),
    (dimension("attention.head_count", 0), "attention.head_count is 0"),
    (dimension("attention.head_count", [4, 4]), r"is [4, 4]; expected int"),
    (dimension("embedding_length", "wide"), "is 'wide'; expected int"),
    (dimension("attention.layer_norm_rms_epsilon", math.nan), "is nan; expected float"),
    (drop("context_length"), "lacks the key llama.context_length"),
    (token("model", "bert"), "vocabulary 'bert' is not supported"),
    (token("pre", "tekken"), "pre-tokenizer 'tekken' is not supported; supported are gpt-2"),
    (drop("ggml.pre"), "lacks the key tokenizer.ggml.pre"),
    (token("add_eos_token", True), "append an end token"),
    (token("merges", ["a b c d"]), "do not fit together"),
    (token("merges", ["ab"]), "merge 'ab' is not two tokens"),
    (token("merges", [1, 2]), "tokenizer.ggml.merges[0] is 1"),
    (token("tokens", ["a", "b", "c", "a"]), "641 token types"),
    (token("eos_token_id", 9999), "eos_token_id 9999 is outside"),
    (token("token_type", [1, 1]), "641 tokens but 2 token types"),
    (token("tokens", [*BYTE_LEVEL["vocabulary"]["tokens"][:-1], "the"]), "same token twice"),
]


@pytest.mark.parametrize("edit, message", REFUSALS, ids=[message for _, message in REFUSALS])
def test_refusals_name_what_is_wrong(edit: Edit, message: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = gguf_tensors("llama", random_weights("llama", V, tied=True))
    tokenizer, shape = vocabulary(), dict(SHAPE)
    edit(tensors, tokenizer, shape)
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", tensors, tokenizer, shape)
    with pytest.raises(ModelError) as refused:
        convert(path)
    assert message in str(refused.value)


def test_unknown_architectures_are_named(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", "gemma", {"x": ZEROS}, vocabulary())
    with pytest.raises(ModelError, match="'gemma' is not supported; supported are llama, qwen2"):
        convert(path)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'jslora\[demo\]'"):
        gguf.convert(tmp_path / "m.gguf", tmp_path, silent)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with few tokens, so that damage often hits what matters."""
    tensors = {"token_embd.weight": np.zeros((4, 64), np.float32), "output_norm.weight": ZEROS[0]}
    tokenizer = {"ggml.tokens": ["a", "b", "ab", "c"], "ggml.merges": ["a b"]}
    tokenizer |= {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.token_type": [1, 1, 1, 3]}
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    shape = {**SHAPE, "block_count": 0}
    return tiny_gguf.write(path, "llama", tensors, tokenizer, shape).read_bytes()


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_end_in_a_message(
    data: st.DataObject, whole_file: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(whole_file[: data.draw(st.integers(0, len(whole_file)), "length")])
    header = min(len(damaged), 1200)
    for _ in range(data.draw(st.integers(0, 3), "flips") if header else 0):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with pytest.raises(ModelError):  # the undamaged file lacks output_norm's right shape
        gguf.convert(path, tmp_path, silent)
