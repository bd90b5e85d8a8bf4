"""Model shapes from `config.json`: what is served is read exactly, all else refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.errors import ModelError
from jslora.model.config import ARCHITECTURES, MODULES, RopeScaling, from_hf

GOLDENS = Path(__file__).parents[1] / "goldens"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def named(architecture: str, **others: Any) -> dict[str, Any]:
    return LLAMA | {"architectures": [architecture]} | others


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as error:
        from_hf(data)
    return error.value.message


# What is read ------------------------------------------------------------------------------------


def test_dimensions() -> None:
    config = from_hf(LLAMA)
    assert (config.vocab_size, config.hidden, config.layers) == (1000, 96, 3)
    assert (config.heads, config.kv_heads, config.head_dim) == (6, 2, 16)
    assert (config.max_positions, config.norm_eps, config.rope_theta) == (4096, 1e-5, 50000.0)
    assert config.rope_scaling is None and not config.tie_embeddings
    assert [config.widths(module) for module in MODULES] == [
        (96, 96), (96, 32), (96, 32), (96, 96), (96, 200), (96, 200), (200, 96),
    ]  # fmt: skip


def test_what_may_be_left_out() -> None:
    needed = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers",
              "num_attention_heads", "intermediate_size")  # fmt: skip
    config = from_hf({key: LLAMA[key] for key in needed})
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (6, 16, 10000.0)
    for key in needed[1:]:
        missing = {name: value for name, value in LLAMA.items() if name != key}
        assert refused(missing) == f"config.json lacks {key!r}"


def test_the_head_dimension_may_be_its_own() -> None:
    config = from_hf(LLAMA | {"head_dim": 64})
    assert config.head_dim == 64 and config.widths("q_proj") == (96, 384)


@pytest.mark.parametrize(
    ("architecture", "bias", "norm"),
    [
        ("LlamaForCausalLM", False, False),
        ("MistralForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
    ],
)
def test_architectures_differ_in_bias_and_norm(architecture: str, bias: bool, norm: bool) -> None:
    config = from_hf(named(architecture))
    assert (config.architecture, config.qkv_bias, config.qk_norm) == (architecture, bias, norm)


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_parameters_are_counted_as_the_checkpoint_has_them(name: str) -> None:
    """Against the files that transformers wrote."""
    folder = GOLDENS / name / "model"
    config = from_hf(json.loads((folder / "config.json").read_text()))
    header = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + size])
    tensors.pop("__metadata__", None)
    assert config.parameters == sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def test_end_tokens_come_from_both_files_once() -> None:
    assert from_hf(LLAMA).eos_token_ids == ()
    assert from_hf(LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    both = from_hf(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 2, 7]})
    assert both.eos_token_ids == (5, 2, 7)
    assert from_hf(LLAMA | {"eos_token_id": 0}).eos_token_ids == (0,)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_of_both_transformers_and_the_legacy_key(section: str, key: str) -> None:
    linear = from_hf(LLAMA | {section: {key: "linear", "factor": 2.0}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    llama3 = from_hf(LLAMA | {section: {key: "llama3"} | LLAMA3_ROPE})
    assert llama3.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert from_hf(LLAMA | {section: {key: "default"}}).rope_scaling is None


def test_the_rope_base_of_transformers_5_lies_in_rope_parameters() -> None:
    data = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config = from_hf(data | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [["GPT2LMHeadModel"], ["LlamaModel"], [], None, ["llamaforcausallm"], "LlamaForCausalLM"],
)
def test_architectures_that_are_not_served(names: object) -> None:
    message = refused(LLAMA | {"architectures": names})
    assert message.startswith("architecture ") and "is not supported; supported are" in message
    assert all(name in message for name in ARCHITECTURES)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", None, 3])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_variants_that_are_not_implemented(kind: object, section: str, key: str) -> None:
    message = refused(LLAMA | {section: {key: kind, "factor": 4.0}})
    assert message == f"rope type {kind!r} is not supported; default, linear and llama3 are"


@pytest.mark.parametrize("missing", sorted(LLAMA3_ROPE))
def test_rope_scaling_without_its_numbers(missing: str) -> None:
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != missing}
    data = LLAMA | {"rope_scaling": {"rope_type": "llama3"} | rope}
    assert refused(data) == f"config.json lacks {missing!r}"


def test_rope_settings_for_each_kind_of_layer() -> None:
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert "full_attention" in refused(LLAMA | {"rope_parameters": nested})


@pytest.mark.parametrize("section", [None, "rope_parameters", "rope_scaling"])
def test_heads_that_are_rotated_in_part(section: str | None) -> None:
    partial: dict[str, Any] = {"partial_rotary_factor": 0.5}
    if section:
        partial = {section: {"rope_type": "default"} | partial}
    assert "partial_rotary_factor 0.5 is not supported" in refused(LLAMA | partial)
    whole = from_hf(LLAMA | {"partial_rotary_factor": 1.0})
    assert whole == from_hf(LLAMA)


@pytest.mark.parametrize(
    ("data", "served"),
    [
        (named("MistralForCausalLM", sliding_window=1024), False),
        (named("MistralForCausalLM", sliding_window=4096), True),
        (named("MistralForCausalLM", sliding_window=None), True),
        (named("LlamaForCausalLM", sliding_window=1024), True),
        (named("Qwen2ForCausalLM", sliding_window=1024), True),
        (named("Qwen2ForCausalLM", sliding_window=1024, use_sliding_window=False), True),
        (named("Qwen2ForCausalLM", sliding_window=1024, use_sliding_window=True), False),
        (named("Qwen3ForCausalLM", sliding_window=1024, use_sliding_window=True), False),
    ],
)
def test_sliding_windows_that_take_effect(data: dict[str, Any], served: bool) -> None:
    if served:
        from_hf(data)
    else:
        assert refused(data) == "sliding_window 1024 is not supported; only full attention is"


def test_a_mistral_that_does_not_say_has_a_window() -> None:
    silent = named("MistralForCausalLM", max_position_embeddings=32768)
    assert refused(silent) == "sliding_window 4096 is not supported; only full attention is"
    from_hf(silent | {"sliding_window": None})


def test_layers_that_attend_in_part() -> None:
    from_hf(LLAMA | {"layer_types": ["full_attention"] * 3})
    message = refused(LLAMA | {"layer_types": ["full_attention", "sliding_attention"]})
    assert "'sliding_attention'" in message and "only full attention" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code (auto_map); it is never run"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only silu is"),
        ({"attention_bias": True}, "attention_bias is supported for Qwen2ForCausalLM only"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"num_attention_heads": 5}, "5 heads, 2 kv heads"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"head_dim": 1}, "head_dim 1"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": -2}, "-2 kv heads"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"intermediate_size": 0}, "intermediate_size 0"),
        ({"hidden_size": "wide"}, "config.json holds a value of the wrong kind"),
        ({"hidden_size": None}, "config.json holds a value of the wrong kind"),
        ({"rope_scaling": ["yarn"]}, "config.json holds a value of the wrong kind"),
        ({"layer_types": 3}, "config.json holds a value of the wrong kind"),
        ({"eos_token_id": "</s>"}, "config.json holds a value of the wrong kind"),
        ({"vocab_size": math.inf}, "config.json holds a value of the wrong kind"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps nan"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0.0"),
        (
            {"rope_scaling": {"type": "llama3"} | LLAMA3_ROPE | {"high_freq_factor": 1.0}},
            "high_freq_factor=1.0",
        ),
    ],
)
def test_what_does_not_make_a_model_is_refused_by_name(change: dict, message: str) -> None:
    assert message in refused(LLAMA | change)


def test_attention_bias_is_what_qwen2_always_has() -> None:
    assert from_hf(named("Qwen2ForCausalLM", attention_bias=True)).qkv_bias


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = [
    *LLAMA, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "sliding_window",
    "use_sliding_window", "eos_token_id", "hidden_act", "partial_rotary_factor", "bos_token_id",
]  # fmt: skip
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", *LLAMA3_ROPE]),
    st.sampled_from(["linear", "llama3", "default"]) | JSON,
)


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON | ROPE, max_size=4),
    st.dictionaries(st.just("eos_token_id"), JSON),
    st.sampled_from(sorted(ARCHITECTURES)),
)
def test_whatever_a_file_holds_is_read_or_refused(
    change: dict, generation: dict, architecture: str
) -> None:
    try:
        config = from_hf(named(architecture) | change, generation)
    except ModelError as error:
        assert error.message
        return
    assert config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0
    assert min(config.vocab_size, config.hidden, config.layers, config.kv_heads, config.head_dim,
               config.feed_forward, config.max_positions) > 0  # fmt: skip
    assert math.isfinite(config.rope_theta) and math.isfinite(config.norm_eps)
    assert all(isinstance(token, int) for token in config.eos_token_ids)
    assert config.bos_token_id is None or isinstance(config.bos_token_id, int)
