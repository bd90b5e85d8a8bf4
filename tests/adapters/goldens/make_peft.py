"""Make the golden adapters: folders that PEFT saved, and what it makes of them when it loads them.

Runs where torch, transformers and peft are installed at the versions below; the tests never import
them:

    python tests/adapters/goldens/make_peft.py

Each folder in `served` is a LoRA on a tiny random Llama; `golden.json` has, for each, rank, scaling
and a few numbers of the weight delta of every adapted layer, read off the reloaded PEFT model. The
folders in `refused` are adapters that do more than a plain LoRA. All is drawn from fixed seeds.
"""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
ROOT = Path(__file__).parent
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# In the order in which PEFT saves them, which is the order in which it tries them on loading.
PATTERNS: dict[str, Any] = dict(
    rank_pattern={
        r"layers\.0\..*k_proj": 7,
        "model.layers.2.self_attn.q_proj": 1,
        "nothing": 9,
        r"self_attn\.(q|k)_proj": 5,
    },
    alpha_pattern={"^model.*v_proj$": 6, "down_proj": 10, r"layers\.[01]\.mlp\.(up|down)_proj": 3},
)
SERVED: dict[str, dict[str, Any]] = {
    "plain": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "patterns": dict(
        r=3, lora_alpha=8, target_modules=[*ATTENTION, "up_proj", "down_proj"], **PATTERNS
    ),
    "rslora": dict(r=6, lora_alpha=5, use_rslora=True, target_modules="all-linear", **PATTERNS),
    "layers": dict(
        r=2,
        lora_alpha=4,
        target_modules=["o_proj", "mlp.gate_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
    ),
    "regex": dict(
        r=2,
        lora_alpha=2,
        target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.(q|o|down)_proj",
        exclude_modules=r".*\.1\.mlp\..*",
    ),
    "bfloat16": dict(r=8, lora_alpha=16, target_modules=["k_proj", "down_proj"]),
    "float16": dict(r=1, lora_alpha=1.5, target_modules=["gate_proj", "up_proj"]),
    "orthogonal": dict(
        r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="orthogonal"
    ),
    "pissa-converted": dict(
        r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
    ),
}
REFUSED: dict[str, dict[str, Any]] = {
    "dora": dict(use_dora=True, target_modules=["q_proj"]),
    "pissa": dict(init_lora_weights="pissa", target_modules=["q_proj"]),
    "olora": dict(init_lora_weights="olora", target_modules=["q_proj"]),
    "modules-to-save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "trainable-tokens": dict(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "alora": dict(target_modules=["q_proj"], alora_invocation_tokens=[1, 2]),
}


def main() -> None:
    check_versions()
    golden: dict[str, Any] = {"versions": VERSIONS, "model": MODEL, "served": {}}
    for seed, (name, config) in enumerate(SERVED.items()):
        folder = ROOT / "served" / name
        dtype = getattr(torch, name) if name in ("bfloat16", "float16") else torch.float32
        save = convert_pissa if name == "pissa-converted" else save_plain
        save(folder, config, dtype, seed)
        golden["served"][name] = read_back(folder)
    for seed, (name, config) in enumerate(REFUSED.items()):
        save_plain(ROOT / "refused" / name, {"r": 2, **config}, torch.float32, seed)
    (ROOT / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


def check_versions() -> None:
    for package, version in VERSIONS.items():
        found = importlib.metadata.version(package).partition("+")[0]
        assert found == version, f"{package} is {found}; these files are made with {version}"


def base(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**MODEL))


def adapted(config: dict[str, Any], dtype: torch.dtype, seed: int) -> PeftModel:
    model = base(0).to(dtype)
    torch.manual_seed(seed)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **config), autocast_adapter_dtype=False
    )
    return model


def train(model: PeftModel) -> None:
    """Stand in for training: every factor gets numbers of its own."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += torch.randn_like(parameter) / 8


def saved(write: Callable[[Path], None], folder: Path) -> None:
    """Keep of what PEFT saves the two files that make an adapter."""
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path(temporary) / name, folder / name)


def save_plain(folder: Path, config: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    model = adapted(config, dtype, seed)
    train(model)
    saved(lambda path: model.save_pretrained(path, save_embedding_layers=False), folder)


def convert_pissa(folder: Path, config: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Save the difference to the initial factors as a plain LoRA, as PEFT's guide to PiSSA does."""
    model = adapted(config, dtype, seed)
    with tempfile.TemporaryDirectory() as initial:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        saved(
            lambda path: model.save_pretrained(
                path, path_initial_model_for_weight_conversion=initial
            ),
            folder,
        )


def read_back(folder: Path) -> dict[str, Any]:
    return deltas(PeftModel.from_pretrained(base(0), str(folder)))


def deltas(model: PeftModel) -> dict[str, Any]:
    """Rank, scaling and a few numbers of the delta of every adapted layer."""
    return {
        name: {
            "r": module.r["default"],
            "scaling": module.scaling["default"],
            "delta": module.get_delta_weight("default")[0, :4].tolist(),
        }
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


if __name__ == "__main__":
    main()
