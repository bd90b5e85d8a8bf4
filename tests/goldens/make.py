"""Make the golden files: what transformers and PEFT answer, in float32, for the tests to hold to.

Runs where torch, transformers and peft are installed at the versions below, from the root of the
repository; the tests never import them:

    PYTHONPATH=tests python -m goldens.make --smollm2 FOLDER

FOLDER is SmolLM2-135M-Instruct as `jslora.fetch` converts it, in bfloat16; without the option only
the tiny random models are made again.

Everything is drawn from fixed seeds, so a second run on the same machine writes the same bytes;
another machine's matrix products may change the last bits of the recorded numbers. Every answer is
computed on what was saved and read back, so the files cannot differ from what was measured.
"""

import argparse
import collections
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from goldens.adapters import draw
from goldens.cases import (
    COMPOSED,
    ROOT,
    SMOLLM2_ADAPTERS,
    digests,
    write_smollm2_adapters,
)
from oracle import load_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.numpy import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
PROMPT_LENGTHS = (5, 23, 61)
STEPS = 16
SMALLEST_GAP = 1e-3  # between the two likeliest tokens of every greedy step

SMOLLM2_STEPS = 24
SMOLLM2_TOP = 20
QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a robot who learns to paint.",
    "Explain in two sentences why the sky is blue.",
    "A train travels 120 km in 2 hours. How fast is it, and how far does it get in 5 hours?",
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Tiny:
    """A tiny random model: configuration, dtype on disk, seeds of its weights and of its prompts.

    `layout` is the generation of `config.json`: 4 has the rope settings at the top level, as most
    published models do, 5 has them in `rope_parameters`.
    """

    config: Any
    dtype: torch.dtype
    weights_seed: int
    prompts_seed: int
    layout: int = 5


SHAPE = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
ROPE = dict(rope_type="default", rope_theta=1e6)
ROPE_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
ROPE_LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)

LLAMA = LlamaConfig(**SHAPE | dict(num_key_value_heads=4, rms_norm_eps=1e-5))
LLAMA3 = LlamaConfig(
    **SHAPE | dict(head_dim=32, tie_word_embeddings=True, rope_parameters=ROPE_LLAMA3)
)
LLAMA_LINEAR = LlamaConfig(
    **SHAPE
    | dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, rope_parameters=ROPE_LINEAR)
    | dict(num_attention_heads=3, num_key_value_heads=1)
)
MISTRAL = MistralConfig(**SHAPE | dict(intermediate_size=128, sliding_window=None))
QWEN2 = Qwen2Config(**SHAPE | dict(tie_word_embeddings=True, rope_parameters=ROPE))
QWEN3 = Qwen3Config(**SHAPE | dict(num_hidden_layers=3, head_dim=32, rope_parameters=ROPE))

# The seeds of the prompts are the first found that leave no greedy step near a tie.
TINY = {
    "llama": Tiny(LLAMA, torch.float32, 101, 5),
    "llama3": Tiny(LLAMA3, torch.float16, 102, 9, layout=4),
    "llama-linear": Tiny(LLAMA_LINEAR, torch.float16, 103, 2, layout=4),
    "mistral": Tiny(MISTRAL, torch.bfloat16, 104, 7),
    "qwen2": Tiny(QWEN2, torch.float16, 105, 11, layout=4),
    "qwen3": Tiny(QWEN3, torch.bfloat16, 106, 7),
}

# Name → dtype on disk, seed, PEFT's settings. PEFT sorts the pattern keys when it saves, and the
# first that matches wins: "k_proj" stands before the pattern that would match it in layer 1.
ADAPTERS: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {
    "r1": (
        torch.float32,
        11,
        dict(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    ),
    "r5": (
        torch.bfloat16,
        12,
        dict(r=5, lora_alpha=10, target_modules=["q_proj", "o_proj", "gate_proj"]),
    ),
    "r8-rslora": (
        torch.float32,
        13,
        dict(r=8, lora_alpha=4, use_rslora=True, target_modules=ALL),
    ),
    "r64-regex": (
        torch.float16,
        14,
        dict(r=64, lora_alpha=32, target_modules=r".*\.(k_proj|v_proj|up_proj)"),
    ),
    "layer1": (
        torch.float16,
        15,
        dict(r=6, lora_alpha=9, target_modules=["o_proj", "down_proj"], layers_to_transform=[1]),
    ),
    "patterns": (
        torch.float32,
        16,
        dict(
            r=4,
            lora_alpha=8,
            target_modules=[*ATTENTION, "up_proj", "down_proj"],
            rank_pattern={
                "k_proj": 7,
                r"layers\.1\..*(k_proj|up_proj)": 3,
                r"model\.layers\.0\.self_attn\.q_proj": 2,
            },
            alpha_pattern={
                "down_proj": 2,
                r"layers\.[01]\.mlp\.(up|down)_proj": 5,
                r"self_attn\.(v|o)_proj": 12,
            },
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    for package, version in VERSIONS.items():
        found = importlib.metadata.version(package).split("+")[0]
        assert found == version, f"{package} {found} is installed; the goldens need {version}"
    torch.set_grad_enabled(False)
    for name, tiny in TINY.items():
        make_tiny(name, tiny)
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)
    manifest = {"versions": VERSIONS, "sha256": digests(ROOT)}
    (ROOT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def make_tiny(name: str, tiny: Tiny) -> None:
    """Write a model, its adapters and what both answer into `ROOT / name`."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "model", tiny)
    rng = np.random.default_rng(tiny.prompts_seed)
    prompts = [rng.integers(0, tiny.config.vocab_size, n).tolist() for n in PROMPT_LENGTHS]
    golden: dict[str, np.ndarray] = {
        f"prompt.{i}": np.array(prompt, np.int32) for i, prompt in enumerate(prompts)
    }
    golden |= prefixed("base", answers(load(folder / "model"), prompts, STEPS))
    for adapter in ADAPTERS:
        write_peft(folder / "adapters" / adapter, load(folder / "model"), name, adapter)
        model = load(folder / "model", folder / "adapters" / adapter)
        golden |= prefixed(adapter, answers(model, prompts, STEPS))
    for composed, weights in COMPOSED.get(name, {}).items():
        found = composed_answers(folder, weights, prompts)
        golden |= prefixed(f"composed-{composed}", found)
    save_file(golden, folder / "golden.safetensors")
    check_gaps(name, golden, SMALLEST_GAP)


def write_model(folder: Path, tiny: Tiny) -> None:
    """Save a model whose outputs are well spread: wide weights, uneven norms, large biases."""
    model = transformers.AutoModelForCausalLM.from_config(tiny.config)
    rng = np.random.default_rng(tiny.weights_seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("norm.weight"):
            value = 1 + draw(rng, shape, 0.3)
        elif name.endswith("bias"):
            value = draw(rng, shape, 0.5)
        elif "embed_tokens" in name or "lm_head" in name:
            value = draw(rng, shape, 0.3)
        else:
            value = draw(rng, shape, 1.5 / shape[1] ** 0.5)
        parameter.copy_(torch.from_numpy(value))
    model.to(tiny.dtype).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if tiny.layout == 4:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_peft(folder: Path, model: Any, base: str, name: str) -> None:
    """Let PEFT make and save an adapter, its factors drawn so that the output changes visibly."""
    dtype, seed, settings = ADAPTERS[name]
    model.name_or_path = f"goldens/{base}"  # instead of a path of this machine
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    wrapped = get_peft_model(model, config)
    if not isinstance(config.target_modules, str):  # PEFT makes it a set, whose order is random
        config.target_modules = sorted(config.target_modules)
    rng = np.random.default_rng(seed)
    scales = {
        f"{layer}.lora_{factor}.default.weight": module.scaling["default"]
        for layer, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
        for factor in "AB"
    }
    for key, parameter in wrapped.named_parameters():
        if key not in scales:
            continue
        width = parameter.shape[1]
        std = width**-0.5 if "lora_A" in key else width**-0.5 / scales[key]
        parameter.data = torch.from_numpy(draw(rng, tuple(parameter.shape), std)).to(dtype)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()


def load(folder: Path, adapter: Path | None = None) -> Any:
    """The model, with or without an adapter, all of it computing in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if adapter:
        # PEFT widens float16 and bfloat16 factors to float32 as it reads them.
        model = PeftModel.from_pretrained(model, adapter).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model


def answers(
    model: Any, prompts: list[list[int]], steps: int, top: int | None = None
) -> dict[str, np.ndarray]:
    """Greedy tokens by the cached loop, everything else from one pass over prompt and answer.

    The arrays are those of `cases.Case`, `prompt_logprobs` one a prompt; `first_ids` are left out
    when `first_logprobs` cover the whole vocabulary (`top` is None).
    """
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    found = {}
    for i, prompt in enumerate(prompts):
        tokens = greedy(model, prompt, steps)
        whole = torch.tensor([prompt + tokens])
        logprobs = torch.log_softmax(model(whole, use_cache=False).logits[0], -1)
        each = logprobs[:-1].gather(1, whole[0, 1:, None])[:, 0]
        answer = logprobs[len(prompt) - 1 : -1]
        best = answer.topk(2)
        assert best.indices[:, 0].tolist() == tokens, "the cache changed the greedy text"
        rows["greedy"].append(np.array(tokens, np.int32))
        rows["gaps"].append((best.values[:, 0] - best.values[:, 1]).numpy())
        rows["logprobs"].append(each[len(prompt) - 1 :].numpy())
        if top is None:
            rows["first_logprobs"].append(answer[0].numpy())
        else:
            likeliest = answer[0].topk(top)
            rows["first_ids"].append(likeliest.indices.numpy().astype(np.int32))
            rows["first_logprobs"].append(likeliest.values.numpy())
        found[f"prompt_logprobs.{i}"] = each[: len(prompt) - 1].numpy().copy()
    return {key: np.stack(value) for key, value in rows.items()} | found


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token at every step; an end token does not end it."""
    tokens: list[int] = []
    feed, cache = prompt, None
    for _ in range(steps):
        output = model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
        feed, cache = tokens[-1:], output.past_key_values
    return tokens


def prefixed(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{key}": value for key, value in arrays.items()}


def check_gaps(name: str, golden: Mapping[str, np.ndarray], least: float) -> None:
    """Stop if a greedy step was so close that a correct engine could choose otherwise."""
    gaps = {key: float(value.min()) for key, value in golden.items() if key.endswith("/gaps")}
    print(name, {key: round(gap, 4) for key, gap in gaps.items()})
    assert min(gaps.values()) > least, f"{name}: two tokens are closer than {least}; change a seed"


def composed_answers(
    folder: Path, weights: Mapping[str, float], prompts: list[list[int]]
) -> dict[str, np.ndarray]:
    """`answers` when PEFT adds weighted updates exactly ("cat"), or rescales a single adapter."""
    first, *others = weights
    model = load(folder / "model")
    model = PeftModel.from_pretrained(model, folder / "adapters" / first, adapter_name=first)
    if not others:
        with rescale_adapter_scale(model, weights[first]):
            return answers(model.eval(), prompts, STEPS)
    # PEFT scales the sum by the first adapter's rule: that must not be rsLoRA's.
    assert "use_rslora" not in ADAPTERS[first][2]
    for other in others:
        model.load_adapter(folder / "adapters" / other, other)
    model.add_weighted_adapter(
        list(weights), list(weights.values()), "composed", combination_type="cat"
    )
    model.set_adapter("composed")
    return answers(model.eval(), prompts, STEPS)


def make_smollm2(source: Path) -> None:
    """Record what the real model answers, alone and with the adapters the tests will draw again."""
    folder = ROOT / "smollm2"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    golden: dict[str, np.ndarray] = {
        f"prompt.{i}": np.array(prompt, np.int32) for i, prompt in enumerate(prompts)
    }
    texts: dict[str, Any] = {
        "questions": list(QUESTIONS),
        "prompts": [tokenizer.decode(prompt) for prompt in prompts],
        "greedy": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        write_smollm2_adapters(Path(scratch))
        for name in ("base", *SMOLLM2_ADAPTERS):
            model = load(source, None if name == "base" else Path(scratch) / name)
            if name == "base":
                check_weights(model, source)
            found = answers(model, prompts, SMOLLM2_STEPS, SMOLLM2_TOP)
            golden |= prefixed(name, found)
            texts["greedy"][name] = [tokenizer.decode(tokens) for tokens in found["greedy"]]
        texts["adapters"] = digests(Path(scratch))
    save_file(golden, folder / "golden.safetensors")
    (folder / "texts.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    check_gaps("smollm2", golden, SMALLEST_GAP)


def check_weights(model: Any, source: Path) -> None:
    """Every parameter must be the stored bfloat16 number, widened."""
    stored = load_tensors(source / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.numpy(), stored[name]), f"{name} is not what was stored"


if __name__ == "__main__":
    main()
