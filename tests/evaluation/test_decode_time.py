"""Decode steps with weights kept in several ways take turns."""

import pytest
from engine_helpers import LLAMA3, small_config

from jslora.config import parse
from jslora.errors import ConfigError
from jslora.evaluation.decode_time import measure
from jslora.files import read_json
from jslora.memory.budget import plan_memory
from jslora.model.config import from_hf


def test_every_way_has_its_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("decode")
    config = parse(small_config(folder, LLAMA3 / "model"))
    times = measure(config, ["none", "int8"], rows=8, context=20, steps=3)
    assert {way: len(seconds) for way, seconds in times.seconds.items()} == {"none": 3, "int8": 3}
    model = from_hf(read_json(LLAMA3 / "model" / "config.json"))
    assert times.weights["none"] == plan_memory(config, model, 2**30).weights
    assert times.weights["int8"] < times.weights["none"]
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        measure(config, ["fp8"], rows=8, context=20, steps=1)
