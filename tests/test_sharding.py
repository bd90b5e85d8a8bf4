"""Tensor parallelism: what lies where, and a step split over four devices."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec
from sharded_step import CONFIG, SIZES

from jslora.errors import ConfigError, ModelError
from jslora.model.config import MODULES
from jslora.model.weights import shapes
from jslora.programs import Catalog
from jslora.sharding import AXIS, lies, make_mesh, part_shape, prepare_devices
from jslora.split import Split
from pallas_kernels.launch import Kernels

CPU = Kernels("reference", "reference", "cpu")


def catalog(devices: int, **changes: int) -> Catalog:
    return Catalog(replace(CONFIG, **changes), SIZES, CPU, Split(devices))


def test_a_part_has_its_share_of_what_is_split() -> None:
    part = Split(4).local(CONFIG)
    assert (part.heads, part.kv_heads, part.feed_forward) == (2, 1, 32)
    assert Split().local(CONFIG) == CONFIG
    own = shapes(replace(part, vocab_size=10))
    for name, spec in catalog(4).weight_specs.items():
        assert own[name] == part_shape(shapes(CONFIG)[name], spec, 4), name


def test_only_linear_layers_their_biases_and_the_vocabulary_are_split() -> None:
    def split(specs: dict[str, PartitionSpec]) -> set[str]:
        return {name.rpartition(".")[2] for name, spec in specs.items() if AXIS in spec}

    layers = {"qkv", "qkv_bias", "o", "gate_up", "down"}
    assert split(catalog(4).weight_specs) == layers | {"embed", "head"}
    assert split(catalog(4, vocab_size=41).weight_specs) == layers, "41 tokens do not divide"


def test_a_part_projects_between_the_same_streams() -> None:
    part = Split(2).local(CONFIG)
    for module in MODULES:
        whole, own = CONFIG.widths(module), part.widths(module)
        split = 0 if module in ("o_proj", "down_proj") else 1
        assert own[1 - split] == whole[1 - split] == CONFIG.hidden
        assert 2 * own[split] == whole[split]


@pytest.mark.parametrize("devices", [3, 8])
def test_kv_heads_that_do_not_divide_are_refused(devices: int) -> None:
    words = f"4 kv heads cannot be split over {devices} devices; mesh.model may be one of .1, 2, 4."
    with pytest.raises(ModelError, match=words):
        Split(devices).local(CONFIG)


def test_a_feed_forward_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match="129 feed-forward width cannot be split over 4 devices"):
        Split(4).local(replace(CONFIG, feed_forward=129))


def test_a_mesh_of_more_devices_than_there_are_is_refused() -> None:
    found = jax.device_count()
    prepare_devices(found + 1)  # too late: jax has made its devices
    with pytest.raises(ConfigError, match=f"mesh.model: 64 .* in every process; .* has {found}"):
        make_mesh(64)


def test_one_device_needs_no_mesh() -> None:
    mesh = make_mesh(1)
    for job in catalog(1).jobs().values():
        over = job.over(mesh)
        assert over.function is job.function
        where = {leaf.sharding for leaf in jax.tree.leaves(over.arguments)}
        assert where == {lies(mesh, PartitionSpec())}, job.name


def test_a_step_over_four_devices_equals_one() -> None:
    script = Path(__file__).parent / "sharded_step.py"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    run = [sys.executable, str(script)]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "equal\n"
