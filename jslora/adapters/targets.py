"""Which linear layers of the base an adapter's configuration targets, as PEFT decides it.

Follows PEFT 0.21's `check_target_module_exists`: `exclude_modules` first; then `target_modules`, a
regular expression over the whole name, "all-linear", or names that a module's dotted name equals or
ends with; and for those that it ends with, `layers_to_transform`. Whatever beside the seven linear
layers is selected is refused, as PEFT refuses it or this server does. Host only: no jax.
"""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

from jslora.adapters.patterns import MAX_PATTERNS, compile_pattern
from jslora.errors import AdapterRejected
from jslora.logs import printable
from jslora.model.config import MODULES, ModelConfig

Selector = Callable[[str], bool]

PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""The submodule of a block that holds each linear layer, in every architecture served."""

_DEFAULT = ["q_proj", "v_proj"]  # PEFT's for llama, mistral, qwen2 and qwen3
_REWRITTEN = 20  # from so many on PEFT shortens the names, and layers_to_transform hits others


def module_key(layer: int, module: str) -> str:
    """The dotted name that patterns are matched against and tensor names are made of."""
    return f"model.layers.{layer}.{PARENTS[module]}.{module}"


def targeted(config: Mapping[str, Any], model: ModelConfig) -> list[tuple[int, str]]:
    """The (layer, module) pairs PEFT would put an adapter on, layer by layer.

    Raises:
        AdapterRejected: a key is of a wrong kind, nothing is selected, or something beside the
            linear layers is.
    """
    linear = _linear_layers(model.layers)
    excluded = _excluded(config)
    selected = _selected(config, linear)
    for key in _other_modules(model.layers, model.qk_norm):
        if selected(key) and not excluded(key):
            raise AdapterRejected(
                f"target_modules selects {key}; only {', '.join(MODULES)} can be adapted"
            )
    found = [pair for key, pair in linear.items() if selected(key) and not excluded(key)]
    if not found:
        shown = printable(config.get("target_modules"))
        raise AdapterRejected(f"target_modules {shown} selects no layer of the base model")
    return found


@lru_cache(maxsize=8)
def _linear_layers(layers: int) -> dict[str, tuple[int, str]]:
    return {module_key(layer, m): (layer, m) for layer in range(layers) for m in MODULES}


@lru_cache(maxsize=8)
def _other_modules(layers: int, qk_norm: bool) -> list[str]:
    """Names of the base's modules that are no linear layer of a block."""
    parts = ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm"]
    parts += [".post_attention_layernorm"]
    if qk_norm:
        parts += [".self_attn.q_norm", ".self_attn.k_norm"]
    blocks = [f"model.layers.{layer}{part}" for layer in range(layers) for part in parts]
    whole = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    return ["lm_head", *whole, *blocks]


def _excluded(config: Mapping[str, Any]) -> Selector:
    excluded = config.get("exclude_modules")
    if not excluded:
        return lambda key: False
    if isinstance(excluded, str):
        pattern = compile_pattern("exclude_modules", excluded)
        return lambda key: pattern.fullmatch(key) is not None
    names = _names("exclude_modules", excluded)
    return lambda key: key in names or not names.isdisjoint(_suffixes(key))


def _selected(config: Mapping[str, Any], linear: Collection[str]) -> Selector:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if config.get(key) is not None:
                raise AdapterRejected(f"{key} needs target_modules to be a list of names")
        if targets.lower() == "all-linear":
            return lambda key: key in linear
        pattern = compile_pattern("target_modules", targets)
        return lambda key: pattern.fullmatch(key) is not None
    names = _names("target_modules", _DEFAULT if targets is None else targets)
    in_layers = _in_layers(config, len(names))
    return lambda key: key in names or (not names.isdisjoint(_suffixes(key)) and in_layers(key))


def _in_layers(config: Mapping[str, Any], targets: int) -> Selector:
    """Whether a module lies in one of `layers_to_transform`."""
    layers, texts = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None and texts:
        raise AdapterRejected("layers_pattern needs layers_to_transform")
    if layers is None or layers == []:
        return lambda key: True
    wanted = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in wanted):
        raise AdapterRejected(f"layers_to_transform is {printable(layers)}; integers are expected")
    if targets >= _REWRITTEN:
        raise AdapterRejected(
            f"layers_to_transform with {targets} target_modules, which PEFT rewrites; name the "
            "modules by what they end with"
        )
    patterns = _layer_patterns(texts)

    def selected(key: str) -> bool:
        match = next((found for p in patterns if (found := p.match(key))), None)
        return match is not None and match["idx"] is not None and int(match["idx"]) in wanted

    return selected


def _layer_patterns(texts: object) -> list[Any]:
    """Patterns whose group `idx` is the number of a module's layer; the first match counts."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or len(texts) > MAX_PATTERNS:
        raise AdapterRejected(f"layers_pattern is {printable(texts)}; names are expected")
    index = r"\.(?P<idx>\d+)\."
    patterns = [compile_pattern("layers_pattern", text, r"(?:^|.*?\.)", index) for text in texts]
    return patterns or [compile_pattern("layers_pattern", r"[^.]*", r".*?\.", index)]


def _names(key: str, value: object) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterRejected(f"{key} is {printable(value)}; a list of names is expected")
    return frozenset(value)


@lru_cache(maxsize=2**14)  # the modules of a few models; asked for again by every adapter
def _suffixes(key: str) -> frozenset[str]:
    """What follows each dot of a dotted name."""
    parts = key.split(".")
    return frozenset(".".join(parts[i:]) for i in range(1, len(parts)))
