"""Reading PEFT folders: against what PEFT itself answers, and all that must be refused."""

import json
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import (
    CONFIG,
    GOLDEN,
    GOLDENS,
    MODEL,
    draw,
    every_target,
    key,
    name,
    tensors,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jslora.adapters.peft import Limits, read_adapter
from jslora.errors import AdapterRejected
from jslora.model.config import MODULES

LIMITS = Limits()


# What PEFT answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["served"])
def test_ranks_scales_and_deltas_are_those_of_peft(case: str) -> None:
    adapter = read_adapter(GOLDENS / "served" / case, MODEL, LIMITS)
    expected = GOLDEN["served"][case]
    assert {key(*target) for target in adapter.factors} == expected.keys()
    for target, (a, b, scale) in adapter.factors.items():
        golden = expected[key(*target)]
        assert a.shape[0] == b.shape[1] == golden["r"]
        assert scale == np.float32(golden["scaling"])
        delta = scale * (b[0].astype(np.float32) @ a[:, :4].astype(np.float32))
        np.testing.assert_allclose(delta, golden["delta"], rtol=1e-5, atol=1e-6)


def test_factors_keep_the_dtype_they_were_saved_in() -> None:
    for case, dtype in (("bfloat16", "bfloat16"), ("float16", "float16"), ("plain", "float32")):
        adapter = read_adapter(GOLDENS / "served" / case, MODEL, LIMITS)
        assert {f.a.dtype.name for f in adapter.factors.values()} == {dtype}


def test_a_pattern_without_a_module_is_a_warning() -> None:
    adapter = read_adapter(GOLDENS / "served" / "patterns", MODEL, LIMITS)
    assert adapter.warnings == ("rank_pattern: no targeted module matches nothing",)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dora", "use_dora is set"),
        ("pissa", "init_lora_weights is pissa, which changes the base"),
        ("olora", "init_lora_weights is olora, which changes the base"),
        ("modules-to-save", "modules_to_save is set"),
        ("embedding", "target_modules selects model.embed_tokens"),
        ("head", "target_modules selects lm_head"),
        ("trainable-tokens", "trainable_token_indices is set"),
        ("alora", "alora_invocation_tokens is set"),
    ],
)
def test_what_peft_saves_beside_plain_lora_is_refused_by_name(case: str, message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        read_adapter(GOLDENS / "refused" / case, MODEL, LIMITS)


def test_a_name_with_peft_s_default_adapter_name_binds(tmp_path: Path) -> None:
    """PEFT 0.21 loads such keys when its adapter is called "default", as it is by default."""
    plain = tensors()
    named = {n.replace(".weight", ".default.weight"): t for n, t in plain.items()}
    a = read_adapter(write(tmp_path / "a", weights=plain), MODEL, LIMITS)
    b = read_adapter(write(tmp_path / "b", weights=named), MODEL, LIMITS)
    assert a.digest == b.digest
    both = {**plain, name(0, "q_proj", "A").replace(".weight", ".default.weight"): np.ones((2, 32))}
    both = {n: t.astype(np.float32) for n, t in both.items()}
    with pytest.raises(AdapterRejected, match="is there twice"):
        read_adapter(write(tmp_path / "c", weights=both), MODEL, LIMITS)


@pytest.mark.parametrize("model_type_default", [None, "absent"])
def test_peft_s_default_targets_and_numbers(tmp_path: Path, model_type_default: str | None) -> None:
    config: dict[str, Any] = {"peft_type": "LORA"}
    if model_type_default is None:
        config["target_modules"] = None
    ranks = {(layer, m): 8 for layer in range(MODEL.layers) for m in ("q_proj", "v_proj")}
    adapter = read_adapter(write(tmp_path / "a", config, draw(ranks)), MODEL, LIMITS)
    assert {target: f.a.shape[0] for target, f in adapter.factors.items()} == ranks
    assert {f.scale for f in adapter.factors.values()} == {np.float32(1)}


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_patterns_decide_as_in_peft(tmp_path: Path, data: st.DataObject) -> None:
    """Against PEFT's rule written down a second time, with Python's own `re`."""
    layer = st.integers(0, MODEL.layers - 1)
    module = st.sampled_from(MODULES)
    pattern = st.one_of(
        module,
        st.builds(key, layer, module),
        st.builds(lambda n, m: rf"layers\.{n}\..*{m}", layer, module),
        st.builds(lambda a, b: f"({a}|{b})", module, module),
        st.builds(lambda n: rf"layers.[0-{n}].(self_attn|mlp).\w+", layer),
        st.sampled_from(
            [r"^model.*_proj$", r".*\.1\..*", "[k-q]_proj", "mlp.*", "proj", "q_proj)|(v"]
        ),
    )
    targets = data.draw(st.lists(module, min_size=1, unique=True))
    config: dict[str, Any] = {
        **CONFIG,
        "target_modules": targets,
        "r": data.draw(st.integers(1, 9)),
        "lora_alpha": data.draw(st.one_of(st.integers(-3, 64), st.floats(-8, 64))),
        "use_rslora": data.draw(st.booleans()),
        "rank_pattern": data.draw(st.dictionaries(pattern, st.integers(1, 9), max_size=4)),
        "alpha_pattern": data.draw(st.dictionaries(pattern, st.integers(0, 99), max_size=4)),
    }

    def value(table: str, default: float, module_key: str) -> float:
        for regex, found in config[table].items():
            if re.match(rf"(.*\.)?({regex})$", module_key):
                return found
        return default

    selected = [target for target in every_target() if target[1] in targets]
    ranks = {t: int(value("rank_pattern", config["r"], key(*t))) for t in selected}
    folder = write(tmp_path, config, draw(ranks))
    adapter = read_adapter(folder, MODEL, LIMITS)
    assert {t: f.a.shape[0] for t, f in adapter.factors.items()} == ranks
    for t, factors in adapter.factors.items():
        alpha = value("alpha_pattern", config["lora_alpha"], key(*t))
        divisor = math.sqrt(ranks[t]) if config["use_rslora"] else ranks[t]
        assert factors.scale == np.float32(alpha / divisor)


# The digest -------------------------------------------------------------------------------------


def test_the_digest_is_of_what_outputs_depend_on(tmp_path: Path) -> None:
    weights = tensors()
    one_bit = {n: t.copy() for n, t in weights.items()}
    one_bit[name(1, "q_proj", "B")].view(np.uint32)[0, 0] ^= 1
    halved = {n: t.astype(np.float16) for n, t in weights.items()}
    cases = {
        "same": (CONFIG, weights),
        "other order": (CONFIG, dict(reversed(weights.items()))),
        "other words": ({**CONFIG, "lora_dropout": 0.5, "base_model_name_or_path": "x"}, weights),
        "other spelling": ({**CONFIG, "lora_alpha": 1, "alpha_pattern": {".*": 4}}, weights),
        "other alpha": ({**CONFIG, "lora_alpha": 5}, weights),
        "other bit": (CONFIG, one_bit),
        "other dtype": (CONFIG, halved),
        "other scale rule": ({**CONFIG, "use_rslora": True}, weights),
    }
    digests = {
        case: read_adapter(write(tmp_path / case, *parts), MODEL, LIMITS).digest
        for case, parts in cases.items()
    }
    for case, digest in digests.items():
        assert (digest == digests["same"]) == (
            case in ("same", "other order", "other words", "other spelling")
        )
    assert len(set(digests.values())) == 5


# Configurations that are refused ----------------------------------------------------------------

REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
    ({"peft_type": None}, "peft_type is None; only LORA"),
    ({"peft_type": "lora"}, "peft_type is lora; only LORA"),
    ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS; only CAUSAL_LM"),
    ({"bias": "all"}, "bias is all; only none"),
    ({"bias": "lora_only"}, "bias is lora_only; only none"),
    ({"lora_bias": True}, "lora_bias is set"),
    ({"use_dora": True}, "use_dora is set"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices is set"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
    ({"megatron_config": {"x": 1}}, "megatron_config is set"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters is set"),
    ({"use_qalora": True}, "use_qalora is set"),
    ({"use_bdlora": {}}, "use_bdlora is set"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
    ({"kasa_config": {}}, "kasa_config is set"),
    ({"monteclora_config": {}}, "monteclora_config is set"),
    ({"velora_config": {}}, "velora_config is set"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changes the base"),
    ({"init_lora_weights": "corda"}, "corda, which changes the base"),
    ({"init_lora_weights": "OLoRA"}, "OLoRA, which changes the base"),
    ({"init_lora_weights": "loftq"}, "loftq, which changes the base"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga, which changes the base"),
    ({"init_lora_weights": "nonesuch"}, "init_lora_weights is nonesuch; known are"),
    ({"init_lora_weights": 7}, "init_lora_weights is 7; known are"),
    ({"turbo": 1}, "the key turbo is not known"),
    ({"r": 0}, "r is 0; a rank is an integer"),
    ({"r": -4}, "r is -4; a rank is an integer"),
    ({"r": 2.0}, "r is 2.0; a rank is an integer"),
    ({"r": True}, "r is True; a rank is an integer"),
    ({"r": None}, "r is None; a rank is an integer"),
    ({"r": 513}, "rank 513 of model.layers.0.self_attn.q_proj; at most 512"),
    ({"lora_alpha": "16"}, "lora_alpha is 16; a number"),
    ({"lora_alpha": None}, "lora_alpha is None; a number"),
    ({"lora_alpha": math.inf}, "the scale of .* is not a finite"),
    ({"lora_alpha": math.nan}, "the scale of .* is not a finite"),
    ({"lora_alpha": 10**400}, "the scale of .* is not a finite"),
    ({"lora_alpha": 1e39}, "the scale of .* is not a finite"),
    ({"use_rslora": "yes"}, "use_rslora is yes; true or false"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*; a map"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of q_proj is 0; a rank"),
    ({"rank_pattern": {"q_proj": 999}}, "rank 999 of"),
    ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern of q_proj is 1; a number"),
    (
        {"rank_pattern": {"(?=q)q_proj": 2}},
        "cannot be matched in linear time: invalid perl operator",
    ),
    ({"rank_pattern": {r"(q)\1": 2}}, "RE2 and Python read differently"),
    ({"rank_pattern": {"q_proj{,2}": 2}}, "RE2 and Python read differently"),
    ({"rank_pattern": {"(q_proj": 2}}, "is no regular expression"),
    ({"rank_pattern": {"q" * 513: 2}}, "has 513 characters; at most 512"),
    ({"rank_pattern": {f"m{i}": 2 for i in range(1025)}}, "has 1025 patterns; at most 1024"),
    ({"target_modules": "["}, "target_modules: the pattern .* is no regular expression"),
    ({"target_modules": "q_proj"}, "target_modules q_proj selects no layer"),
    ({"target_modules": []}, "target_modules .* selects no layer"),
    ({"target_modules": ["c_attn"]}, "target_modules .* selects no layer"),
    ({"target_modules": {"q_proj": 1}}, "target_modules is .*; a list of names"),
    ({"target_modules": ["q_proj", 5]}, "target_modules is .*; a list of names"),
    ({"target_modules": ["q_proj", "lm_head"]}, "selects lm_head; only q_proj"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "selects model.embed_tokens"),
    ({"target_modules": ["norm"]}, "selects model.norm"),
    ({"target_modules": ["self_attn"]}, "selects model.layers.0.self_attn"),
    ({"target_modules": ".*"}, "target_modules selects lm_head"),
    ({"exclude_modules": ["q_proj", "down_proj"]}, "selects no layer"),
    ({"exclude_modules": 5}, "exclude_modules is 5; a list of names"),
    ({"layers_to_transform": [9]}, "selects no layer"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform is .*; integers"),
    ({"layers_to_transform": True}, "layers_to_transform is True; integers"),
    ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"layers_to_transform": 0, "layers_pattern": "h"}, "selects no layer"),
    ({"layers_to_transform": 0, "layers_pattern": 5}, "layers_pattern is 5; names"),
    (
        {"target_modules": "all-linear", "layers_to_transform": 0},
        "layers_to_transform needs target_modules to be a list",
    ),
    (
        {"target_modules": [f"m{i}" for i in range(20)], "layers_to_transform": 0},
        "layers_to_transform with 20 target_modules",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_CONFIGS)
def test_a_configuration_is_refused_by_the_name_of_its_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, {**CONFIG, **change})
    with pytest.raises(AdapterRejected, match=message):
        read_adapter(tmp_path, MODEL, LIMITS)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"r": 1e}', "[" * 5000, "\xff", "9" * 5000]
)
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json"):
        read_adapter(tmp_path, MODEL, LIMITS)


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    harmless = {
        "auto_mapping": {"unsloth_fixed": True},
        "base_model_name_or_path": "somewhere/else",
        "inference_mode": False,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "eva_config": {"rho": 2.0},
        "loftq_config": {"loftq_bits": 4},
        "modules_to_save": None,
        "target_parameters": [],
        "rank_pattern": None,
        "a_new_switch": False,
        "a_new_list": [],
    }
    adapter = read_adapter(write(tmp_path, {**CONFIG, **harmless}), MODEL, LIMITS)
    assert adapter.base_model == "somewhere/else"
    assert adapter.warnings == ()


# Tensors that are refused -----------------------------------------------------------------------

A, B = name(1, "q_proj", "A"), name(1, "q_proj", "B")


def _with(**changes: Any) -> dict[str, np.ndarray]:
    found = tensors()
    for change, value in changes.items():
        target = {"a": A, "b": B}.get(change, change)
        found.pop(target, None)
        if value is not None:
            found[target] = value
    return found


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _spoilt(value: float, dtype: str) -> dict[str, np.ndarray]:
    found = tensors(dtype=dtype)
    found[B][-1, -1] = value
    return found


STRAY = "base_model.model.model"
REFUSED_TENSORS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "no A": (_with(a=None), f"tensor {A} is missing"),
    "no B": (_with(b=None), f"tensor {B} is missing"),
    "a layer without factors": (_with(a=None, b=None), f"tensor {A} is missing"),
    "nothing": ({}, "is missing"),
    "A of another rank": (
        _with(a=_ones(3, 32)),
        r"shape \[3, 32\]; expected \[2, 32\] .*gives it rank 2",
    ),
    "B of another rank": (
        _with(b=_ones(32, 1)),
        r"shape \[32, 1\]; expected \[32, 2\] .*gives it rank 2",
    ),
    "A of another base": (_with(a=_ones(2, 33)), r"expected \[2, 32\] \(the base's shape\)"),
    "B of another base": (_with(b=_ones(31, 2)), r"expected \[32, 2\] \(the base's shape\)"),
    "A transposed": (_with(a=_ones(32, 2)), r"shape \[32, 2\]; expected \[2, 32\]"),
    "A flat": (_with(a=_ones(64)), r"shape \[64\]"),
    "A empty": (_with(a=_ones(0, 32)), r"shape \[0, 32\]; expected \[2, 32\] .*rank 2"),
    "NaN": (_spoilt(math.nan, "float32"), f"tensor {B} holds numbers that are not finite"),
    "infinity": (_spoilt(-math.inf, "float16"), f"tensor {B} holds numbers that are not finite"),
    "bfloat16 NaN": (
        _spoilt(math.nan, "bfloat16"),
        f"tensor {B} holds numbers that are not finite",
    ),
    "float64": (_with(a=np.ones((2, 32))), f"tensor {A} has dtype F64; F32, F16, BF16"),
    "int8": (_with(a=np.ones((2, 32), np.int8)), f"tensor {A} has dtype I8"),
    "untargeted module": (
        _with(**{name(0, "v_proj", "A"): _ones(2, 32)}),
        "v_proj.lora_A.weight is of a layer that adapter_config.json does not target",
    ),
    "layer out of range": (
        _with(**{name(7, "q_proj", "A"): _ones(2, 32)}),
        "is of layer 7; the base has 3 layers",
    ),
    "huge layer": (
        _with(**{name(0, "q_proj", "A").replace(".0.", f".{'9' * 99}."): _ones(2, 32)}),
        "the base has 3 layers",
    ),
    "magnitude": (
        _with(**{f"{STRAY}.layers.0.self_attn.q_proj.lora_magnitude_vector": _ones(32)}),
        "belongs to DoRA",
    ),
    "bias": (_with(**{f"{STRAY}.layers.0.self_attn.q_proj.lora_B.bias": _ones(32)}), "is a bias"),
    "base bias": (_with(**{f"{STRAY}.layers.0.self_attn.q_proj.bias": _ones(32)}), "is a bias"),
    "embedding": (
        _with(**{f"{STRAY}.embed_tokens.weight": _ones(32, 32)}),
        "belongs to the embedding",
    ),
    "embedding LoRA": (
        _with(**{f"{STRAY}.embed_tokens.lora_embedding_A": _ones(2, 32)}),
        "adapts the embedding",
    ),
    "head": (_with(**{"base_model.model.lm_head.weight": _ones(32, 32)}), "the output head"),
    "KaSA": (_with(**{f"{STRAY}.layers.0.self_attn.q_proj.lora_diag": _ones(2)}), "KaSA"),
    "no prefix": (
        _with(**{name(0, "q_proj", "A").removeprefix("base_model.model."): _ones(2, 32)}),
        "belongs to no linear layer|does not target",
    ),
    "other adapter name": (
        _with(**{A.replace(".weight", ".other.weight"): _ones(2, 32)}),
        "does not target|belongs to no linear layer",
    ),
    "wrong parent": (
        _with(**{f"{STRAY}.layers.0.mlp.q_proj.lora_A.weight": _ones(2, 32)}),
        "belongs to no linear layer; names as base_model",
    ),
    "line ends": (
        _with(**{"evil\n\x1b[31m" + "x" * 999: _ones(1)}),
        r"evil\\n\\x1b\[31mx+… belongs",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_a_tensor_is_refused_by_name(tmp_path: Path, case: str) -> None:
    weights, message = REFUSED_TENSORS[case]
    with pytest.raises(AdapterRejected, match=message):
        read_adapter(write(tmp_path, weights=weights), MODEL, LIMITS)


def test_a_smaller_rank_limit_is_kept(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match=r"rank 2 of .*; at most 1 is served"):
        read_adapter(write(tmp_path), MODEL, Limits(max_rank=1))


# Files that are refused -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_a_pickle_is_named_and_never_opened(tmp_path: Path, suffix: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    pickle = tmp_path / f"adapter_model.{suffix}"
    os.mkfifo(pickle)  # opening it would block
    with pytest.raises(AdapterRejected, match=f"adapter_model.{suffix} is a pickle"):
        read_adapter(tmp_path, MODEL, LIMITS)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_not_plainly_there_is_refused(tmp_path: Path, file: str) -> None:
    outside = write(tmp_path / "outside")

    def refused(case: str, message: str) -> None:
        folder = tmp_path / case
        with pytest.raises(
            AdapterRejected, match=f"{re.escape(file)}.*{message}|{message}.*{file}"
        ) as e:
            read_adapter(folder, MODEL, LIMITS)
        assert str(tmp_path) not in e.value.message

    (write(tmp_path / "absent") / file).unlink()
    refused("absent", "the folder holds no")
    for case, make, message in (
        ("folder", lambda path: path.mkdir(), "is not a regular file"),
        ("pipe", os.mkfifo, "is not a regular file"),
        ("link out", lambda path: path.symlink_to(outside / file), "leads outside"),
        ("dangling", lambda path: path.symlink_to(path.with_name("nothing")), "holds no"),
        ("loop", lambda path: path.symlink_to(path), "cannot be opened|holds no"),
    ):
        path = write(tmp_path / case) / file
        path.unlink()
        make(path)
        refused(case, message)


def test_files_are_bounded(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(
        AdapterRejected, match=r"adapter_model\.safetensors has .* bytes; at most 1000"
    ):
        read_adapter(tmp_path, MODEL, Limits(max_file_bytes=1000))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "revision": "x" * 2**20}))
    with pytest.raises(
        AdapterRejected, match=r"adapter_config\.json has .* bytes; at most 1048576"
    ):
        read_adapter(tmp_path, MODEL, LIMITS)


def test_a_link_within_the_root_is_followed(tmp_path: Path) -> None:
    """As in a cache of the Hugging Face hub, whose files are links to blobs."""
    blobs = write(tmp_path / "root" / "blobs")
    folder = tmp_path / "root" / "adapter"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).symlink_to(blobs / file)
    linked = read_adapter(folder, MODEL, LIMITS, root=tmp_path / "root")
    assert linked.digest == read_adapter(blobs, MODEL, LIMITS).digest
    with pytest.raises(AdapterRejected, match="leads outside"):
        read_adapter(folder, MODEL, LIMITS)


def test_a_folder_that_is_rewritten_meanwhile_is_old_new_or_refused(tmp_path: Path) -> None:
    """Never a mixture: truncated, rewritten in place, or swapped between the two files."""
    versions = [
        ({**CONFIG, "r": rank, "lora_alpha": rank}, tensors(rank, seed=rank)) for rank in (2, 3)
    ]
    sources = [write(tmp_path / str(i), *version) for i, version in enumerate(versions)]
    digests = {read_adapter(source, MODEL, LIMITS).digest for source in sources}
    contents = [{file.name: file.read_bytes() for file in source.iterdir()} for source in sources]
    folder = write(tmp_path / "adapter", *versions[0])
    stop = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for file, data in contents[turn % 2].items():
                if turn % 3:
                    (folder / file).write_bytes(data)
                else:
                    (folder / "new").write_bytes(data)
                    (folder / "new").rename(folder / file)

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen: dict[str, int] = {}
    try:
        for _ in range(300):
            try:
                found = read_adapter(folder, MODEL, LIMITS).digest
            except AdapterRejected:
                found = "refused"
            seen[found] = seen.get(found, 0) + 1
    finally:
        stop.set()
        writer.join()
    assert seen.keys() <= {*digests, "refused"}
    assert read_adapter(write(folder, *versions[1]), MODEL, LIMITS).digest in digests


# Hostile files ----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = sorted({k for change, _ in REFUSED_CONFIGS for k in change} | CONFIG.keys())


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=5))
def test_any_value_under_any_key_is_served_or_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write(tmp_path, {**CONFIG, **changes})
    try:
        adapter = read_adapter(tmp_path, MODEL, LIMITS)
    except AdapterRejected as error:
        assert len(error.message) < 1000
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", error.message)
    else:
        assert all(f.a.shape[0] == 2 for f in adapter.factors.values())


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_folders_are_served_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        damaged = bytearray((tmp_path / file).read_bytes())
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, min(len(damaged), 2000) - 1))
            damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        (tmp_path / file).write_bytes(damaged)
    try:
        adapter = read_adapter(tmp_path, MODEL, LIMITS)
    except AdapterRejected as error:
        assert error.status == 400
    else:
        assert all(
            np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in adapter.factors.values()
        )
