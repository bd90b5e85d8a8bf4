"""Run as `kept_weights.py ADDRESS PROCESSES PROCESS FOLDER`: keep weights over four devices.

Linear layers are quantised, so that there are leaves of three types.

Every process has its share of the devices, and looks at its own part only.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from goldens.cases import ROOT

from jslora.fetch import load_config
from jslora.model.checkpoint import Checkpoint, file_facts
from jslora.model.weights import load_weights
from jslora.programs import Catalog, Sizes
from jslora.sharding import lies, make_mesh
from jslora.split import Split
from pallas_kernels.launch import Kernels

DEVICES = 4
DTYPE = jnp.dtype("bfloat16")
SIZES = Sizes(
    pages=8, page_size=8, max_running=8, max_step_tokens=8, max_model_len=64, max_rank=8,
    dtype=DTYPE, quantize="int8",
)  # fmt: skip


def main() -> None:
    address, (processes, process), folder = sys.argv[1], map(int, sys.argv[2:4]), Path(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    source = folder / f"model-{process}"
    shutil.copytree(ROOT / "llama" / "model", source)
    model, mesh = load_config(source), make_mesh(DEVICES)
    kernels = Kernels("reference", "reference", "cpu")
    catalog = Catalog(model, SIZES, kernels, Split(DEVICES))
    leaves, specs = catalog.leaves, catalog.weight_specs

    def read() -> dict[str, jax.Array]:
        return load_weights(
            source, model, DTYPE, lambda name, _: lies(mesh, specs[name]), DEVICES, quantize="int8"
        )

    def make() -> Checkpoint:
        return Checkpoint(folder / "kept", [file_facts(source)], mesh, leaves, specs)

    weights, kept = read(), make()
    assert kept.restore() is None
    kept.save(weights)
    assert_equal(make().restore(), weights)
    check_what_it_depends_on(kept, source)
    check_what_goes_wrong(kept, weights, process)
    print("kept")


def assert_equal(found: dict[str, Any] | None, weights: dict[str, Any]) -> None:
    """The parts of this process lie where they did, with the same bits."""
    assert found is not None and found.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found[name].sharding, found[name].dtype) == (weight.sharding, weight.dtype), name
        pairs = zip(found[name].addressable_shards, weight.addressable_shards, strict=True)
        for one, other in pairs:
            assert one.device == other.device and one.index == other.index
            np.testing.assert_array_equal(np.asarray(one.data), np.asarray(other.data), name)


def check_what_it_depends_on(kept: Checkpoint, source: Path) -> None:
    (source / "model.safetensors").touch()
    others = [
        replace(kept, facts=[file_facts(source)]),
        replace(kept, leaves={n: jax.ShapeDtypeStruct(x.shape, jnp.float32)
                              for n, x in kept.leaves.items()}),
    ]  # fmt: skip
    assert len({kept.path, *(other.path for other in others)}) == 3
    assert all(other.restore() is None for other in others)


def check_what_goes_wrong(kept: Checkpoint, weights: dict[str, Any], process: int) -> None:
    """A damaged checkpoint is made again; without room there is none; neither is an error."""
    for path in kept.path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"no checkpoint")
    assert kept.restore() is None and not kept.path.exists()
    with mock.patch("shutil.disk_usage") as usage:
        usage.return_value.free = 1000
        kept.save(weights)
    assert not kept.path.exists()
    kept.save(weights)
    assert_equal(kept.restore(), weights)


if __name__ == "__main__":
    main()
