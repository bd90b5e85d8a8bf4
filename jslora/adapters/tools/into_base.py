"""A sum of adapters added into their base: a Hugging Face checkpoint folder without adapters.

The folder has the base's own files: shards of the same names that hold the same tensors, those the
adapters target changed, and beside them configuration and tokenizer. A sum is made in float32 and
rounded to what is stored; in 16 bits that loses much of a small delta, and how much is measured.
One shard is in memory at a time. Host only: no jax.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jslora.adapters.peft import Factors
from jslora.adapters.targets import module_key
from jslora.adapters.tools.fit import Fitted
from jslora.adapters.tools.low_rank import share
from jslora.adapters.writer import Target, as_stored
from jslora.errors import AdapterRejected, ModelError
from jslora.files import read_json
from jslora.new_folder import new_folder
from jslora.progress import Progress, silent

INDEX = "model.safetensors.index.json"
COPIED = (
    "config.json", "generation_config.json", INDEX, "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
_FLOATS = ("float32", "float16", "bfloat16")


def merge_into_base(
    base: Path,
    factors: Mapping[Target, Factors],
    out: Path,
    dtype: np.dtype | None = None,
    progress: Progress = silent,
) -> list[Fitted]:
    """Write `out`, which appears whole or not at all.

    Args:
        base: a model's folder with safetensors, left alone.
        dtype: of every tensor; by default each has the base's own.
        progress: told of stage "merge" in tensors of the shards.

    Returns:
        Of each target, what rounding cost; `rank` is 0, since the sum has no rank of its own.

    Raises:
        ModelError: a shard cannot be read, or lacks what the adapters target.
        AdapterRejected: a sum, or a weight of the base, is too large for its dtype.
        ConfigError: `out` is there already, or cannot be written.
    """
    wanted = {f"{module_key(*target)}.weight": target for target in factors}
    told: dict[Target, Fitted] = {}
    with new_folder(out) as partial:
        for path in _beside_tensors(base):
            shutil.copyfile(path, partial / path.name)
        if dtype is not None:
            _say_dtype(partial, dtype)
        for path in shards(base):
            tensors, metadata = _read(path)
            for done, (name, tensor) in enumerate(tensors.items(), start=1):
                kept = tensor.dtype if dtype is None else dtype
                if target := wanted.pop(name, None):
                    tensors[name], told[target] = _added(target, tensor, factors[target], kept)
                elif dtype is not None:
                    tensors[name] = as_stored(name, tensor, dtype)
                progress("merge", done, len(tensors), path.name)
            _write(partial / path.name, tensors, metadata)
            shutil.copymode(partial / "config.json", partial / path.name)  # the library's is 0600
        if wanted:
            raise ModelError(f"the model's files lack the tensor {min(wanted)}")
    return [told[target] for target in factors]


def shards(base: Path) -> list[Path]:
    """The files of a checkpoint, as transformers chooses them.

    Raises:
        ModelError: the folder has no safetensors, or its index is damaged.
    """
    if (base / "model.safetensors").exists():
        return [base / "model.safetensors"]
    if (base / INDEX).exists():
        places = read_json(base / INDEX).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, dict) else []
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ModelError(f"{INDEX} has no weight_map from tensors to file names")
        return [base / name for name in names]
    found = sorted(base.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelError(f"expected model.safetensors or its index in {base}; found neither")
    return found


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path.name}: {error}") from None


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any] | None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _added(
    target: Target, weight: np.ndarray, factors: Factors, dtype: np.dtype
) -> tuple[np.ndarray, Fitted]:
    """A weight [out, in] with a delta added, as a `dtype`; and what rounding cost."""
    layer, module = target
    (a, b, scale), shape = factors, weight.shape
    if shape != (b.shape[0], a.shape[1]) or weight.dtype.name not in _FLOATS:
        expected = f"{[b.shape[0], a.shape[1]]} of {', '.join(_FLOATS)}"
        raise ModelError(
            f"tensor {module_key(*target)}.weight is {list(shape)} of {weight.dtype.name}; "
            f"expected {expected}"
        )
    delta = (b.astype(np.float32) * scale) @ a.astype(np.float32)
    with np.errstate(over="ignore"):
        merged = (weight.astype(np.float32) + delta).astype(dtype)
    off = merged.astype(np.float32)
    off -= weight.astype(np.float32)
    off -= delta
    if not np.isfinite(off).all():
        raise AdapterRejected(
            f"layer {layer}'s {module} with the adapter added is too large for {dtype.name}"
        )
    lost, whole = float(np.linalg.norm(off)), float(np.linalg.norm(delta))
    return merged, Fitted(
        layer, module, rank_before=len(a), rank=0, error=share(lost, whole), norm=whole, off=lost
    )


def _say_dtype(folder: Path, dtype: np.dtype) -> None:
    """Change what the configuration says of the tensors; every transformers reads `torch_dtype`."""
    config = read_json(folder / "config.json")
    said = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(said, dtype.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _beside_tensors(base: Path) -> list[Path]:
    found = {path for pattern in COPIED for path in base.glob(pattern) if path.is_file()}
    if (base / "model.safetensors").exists():
        found.discard(base / INDEX)  # of shards that are not read
    return sorted(found)
