"""What must be the same on every host of a group, as plain text by key, and what of it is not.

Paths, secrets and whatever concerns one host alone are left out. The model's files count by their
bytes: small ones whole, of large ones the size, the beginning and evenly spaced samples, because a
start must not read a hundred gigabytes twice. Host only: no jax.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jslora import __version__
from jslora.adapters.storages import storages
from jslora.config import EngineConfig
from jslora.errors import ModelError
from jslora.logs import printable

_WHOLE = 16 * 2**20  # bytes of a file that is read whole
_SAMPLES, _SAMPLE = 64, 2**16
_SUFFIXES = (".safetensors", ".json", ".gguf", ".model")
_SHOWN = 5  # differences that a refusal tells

# Of these sections, all keys but those named.
_SECTIONS: dict[str, set[str]] = {
    "model": {"source", "served_name"}, "pool": set(), "mesh": set(),
    "distributed": {
        "process_id", "local_devices", "interface", "token", "token_file", "auto", "control_port",
    },
}  # fmt: skip
# Of these, only those named: what shapes programs, what adapters are refused for, and with
# `host_cache_bytes` how many pages the memory plan finds useful, and with `storage` how it splits
# adapters, which all must find alike.
_KEYS = {
    "scheduler": ("max_running", "max_step_tokens"),
    "adapters": ("max_rank", "max_composed", "max_file_bytes", "host_cache_bytes", "storage"),
}


def agreement(config: EngineConfig, folder: Path | None) -> dict[str, str]:
    """What the processes of a group compare before they begin.

    Raises:
        ModelError: a file of the model cannot be read.
    """
    data = config.model_dump(mode="json")
    found: dict[str, Any] = {"kernels": data["kernels"]}
    for section, own in _SECTIONS.items():
        found |= {f"{section}.{key}": data[section][key] for key in data[section].keys() - own}
    for section, keys in _KEYS.items():
        found |= {f"{section}.{key}": data[section][key] for key in keys}
    found["adapters.roots"] = len(config.adapters.roots)  # an adapter's root is told by number
    found["adapters.storages"] = storages(config.adapters)  # of which names, process 0 says
    found["model files"] = "none" if folder is None else _files_digest(folder)
    found["jslora version"] = __version__
    for library in ("jax", "jaxlib", "numpy"):
        found[f"{library} version"] = importlib.metadata.version(library)
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items()}


def differences(mine: Mapping[str, str], theirs: Mapping[str, str], process: int) -> list[str]:
    """What differs between process 0 and another, as words; `theirs` may hold anything."""
    found = []
    for key in sorted(mine.keys() | theirs.keys()):
        ours, other = mine.get(key, "nothing"), theirs.get(key, "nothing")
        if ours != other:
            found.append(
                f"{printable(key, 60)} is {printable(ours, 80)} on process 0 "
                f"and {printable(other, 80)} on process {process}"
            )
    if len(found) > _SHOWN:
        found[_SHOWN:] = [f"and {len(found) - _SHOWN} more"]
    return found


def _files_digest(folder: Path) -> str:
    """Sixteen characters that tell a model's files by name, size and (sampled) bytes."""
    found = hashlib.blake2b(digest_size=8)
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file():
                size = path.stat().st_size
                found.update(f"{path.name}\0{size}\0".encode())
                _add_bytes(path, size, found)
    except OSError as error:
        raise ModelError(f"the model's files cannot be read: {error.strerror}") from None
    return found.hexdigest()


def _add_bytes(path: Path, size: int, found: hashlib.blake2b) -> None:
    with open(path, "rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
            return
        found.update(file.read(2**20))
        for sample in range(1, _SAMPLES + 1):
            file.seek((size - _SAMPLE) * sample // _SAMPLES)
            found.update(file.read(_SAMPLE))
