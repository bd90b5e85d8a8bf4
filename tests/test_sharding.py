"""Tensor parallelism: one device's part of a model, and a step split over four devices."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec
from sharded_step import CONFIG

from jslora.errors import ModelError
from jslora.model.config import MODULES
from jslora.model.weights import shapes
from jslora.sharding import AXIS, local_config, weight_spec


def test_a_part_has_its_share_of_what_is_split() -> None:
    part = local_config(CONFIG, 4)
    assert (part.heads, part.kv_heads, part.feed_forward) == (2, 1, 32)
    assert local_config(CONFIG, 1) == CONFIG
    for name, shape in shapes(CONFIG).items():
        spec = weight_spec(name)
        split = [dim // 4 if axis == AXIS else dim for dim, axis in zip(shape, spec, strict=False)]
        assert shapes(part)[name] == (*split, *shape[len(split) :]), name


def test_only_linear_layers_and_their_biases_are_split() -> None:
    leaves = {name.rpartition(".")[2] for name in shapes(CONFIG) if weight_spec(name)}
    assert leaves == {"qkv", "qkv_bias", "o", "gate_up", "down"}
    assert weight_spec("layers.1.q_norm") == PartitionSpec() == weight_spec("embed")


def test_a_part_projects_between_the_same_streams() -> None:
    part = local_config(CONFIG, 2)
    for module in MODULES:
        whole, own = CONFIG.widths(module), part.widths(module)
        split = 0 if module in ("o_proj", "down_proj") else 1
        assert own[1 - split] == whole[1 - split] == CONFIG.hidden
        assert 2 * own[split] == whole[split]


@pytest.mark.parametrize("devices", [3, 8])
def test_kv_heads_that_do_not_divide_are_refused(devices: int) -> None:
    with pytest.raises(ModelError, match=f"4 kv heads cannot be split over {devices} devices"):
        local_config(CONFIG, devices)


def test_a_feed_forward_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match="129 feed-forward width cannot be split over 4 devices"):
        local_config(replace(CONFIG, feed_forward=129), 4)


def test_a_step_over_four_devices_equals_one() -> None:
    script = Path(__file__).parent / "sharded_step.py"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    run = [sys.executable, str(script)]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "reference pallas equal\n"
