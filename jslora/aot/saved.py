"""A compiled executable in a file, and beside it, as JSON, what is needed to run it.

The file is what XLA itself serializes, without pickle. Loading it runs code: load what you made.
The JSON names the device it is for, the versions of jax that made it, every argument and result in
order (shapes and types, flat), which arguments are donated, and the case.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.lib import xla_client  # type: ignore[attr-defined]  # the module has no public name

from jslora.aot.target import DEVICE


def save(path: Path, executable: jax.stages.Compiled, case: Mapping[str, Any]) -> None:
    """Write an executable that was compiled with `keep_unused`, and `path` + ".json"."""
    made: Any = executable.runtime_executable()
    data = made.serialize()
    described = {
        "device": DEVICE,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "arguments": [_describe(leaf) for leaf in jax.tree.leaves(executable.args_info)],
        "results": [_describe(leaf) for leaf in jax.tree.leaves(executable.out_info)],
        "case": dict(case),
    }
    path.write_bytes(data)
    beside(path).write_text(json.dumps(described, indent=1) + "\n")


def beside(path: Path) -> Path:
    """The JSON file of an executable's."""
    return path.with_name(path.name + ".json")


def load(
    path: Path, device: jax.Device
) -> tuple[dict[str, Any], Callable[[Sequence[jax.Array]], list[jax.Array]]]:
    """What the JSON says, and the executable as a function of flat arguments on `device`.

    Raises:
        ValueError: the file is not the one that the JSON describes.
    """
    described, data = json.loads(beside(path).read_text()), path.read_bytes()
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise ValueError(f"{path} is not the executable that {beside(path).name} describes")
    devices = xla_client.DeviceList((device,))
    loaded = device.client.deserialize_executable(data, executable_devices=devices)

    def run(arguments: Sequence[jax.Array]) -> list[jax.Array]:
        given = [{"shape": list(a.shape), "dtype": str(a.dtype)} for a in arguments]
        wanted = [{key: one[key] for key in ("shape", "dtype")} for one in described["arguments"]]
        assert given == wanted, f"arguments {given}, compiled for {wanted}"
        results = loaded.execute_sharded(list(arguments)).disassemble_into_single_device_arrays()
        return [parts[0] for parts in results]

    return described, run


def _describe(leaf: Any) -> dict[str, Any]:
    told = {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
    return told | ({"donated": True} if getattr(leaf, "donated", False) else {})
