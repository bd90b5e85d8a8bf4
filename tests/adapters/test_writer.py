"""Written folders: PEFT and the reader get back what was given, and nothing is ever half there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_cases import CASES, MODEL, WRITTEN, factors_of

from jslora.adapters.peft import Factors, Limits, read_adapter
from jslora.adapters.targets import module_key
from jslora.adapters.writer import write_adapter
from jslora.errors import AdapterRejected, ConfigError
from jslora.model.config import MODULES

GOLDEN = json.loads((WRITTEN.parent / "written.json").read_text())
FILES = ("adapter_config.json", "adapter_model.safetensors")
ONE = {(0, "q_proj"): Factors(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 1)}


def _check_same(folder: Path, factors: dict[tuple[int, str], Factors], dtype: Any = None) -> None:
    found = read_adapter(folder, MODEL, Limits())
    assert found.factors.keys() == factors.keys() and found.warnings == ()
    for target, (a, b, scale) in factors.items():
        read = found.factors[target]
        for one, other in ((a, read.a), (b, read.b)):
            assert other.dtype == (dtype or one.dtype)
            assert one.astype(other.dtype).tobytes() == other.tobytes()
        assert read.scale == scale


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_was_written_and_the_writer_still_writes_that(
    tmp_path: Path, name: str
) -> None:
    factors, rslora, dtype = CASES[name]
    write_adapter(tmp_path / name, factors, "tiny", rslora=rslora, dtype=dtype)
    for file in FILES:
        assert (tmp_path / name / file).read_bytes() == (WRITTEN / name / file).read_bytes()
    _check_same(tmp_path / name, factors, dtype)
    golden = GOLDEN[name]
    assert golden.keys() == {module_key(*target) for target in factors}
    for target, (a, b, scale) in factors.items():
        told = golden[module_key(*target)]
        assert told["r"] == len(a) and np.float32(told["scaling"]) == scale
        delta = scale * (b[0].astype(np.float32) @ a[:, :4].astype(np.float32))
        rtol = 2e-2 if dtype == np.float16 else 1e-5
        np.testing.assert_allclose(told["delta"], delta, rtol=rtol, atol=rtol / 10)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_is_written_reads_back_the_same(tmp_path: Path, data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, MODEL.layers - 1), st.sampled_from(MODULES))
    every = [(layer, module) for layer in range(MODEL.layers) for module in MODULES]
    targets = data.draw(st.one_of(st.just(every), st.sets(pair, min_size=1).map(sorted)))
    scale = st.one_of(
        st.sampled_from([0.5, 1.0, 2.0, 1 / 3]), st.floats(-1e4, 1e4, width=32), st.just(0.0)
    )
    ranks = {target: data.draw(st.integers(1, 9)) for target in targets}
    scales = {target: data.draw(scale) for target in targets}
    dtype = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    factors = factors_of(ranks, scales, dtype)
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    write_adapter(folder, factors, None, rslora=data.draw(st.booleans()))
    _check_same(folder, factors)


def test_common_settings_stand_by_themselves(tmp_path: Path) -> None:
    ranks = {(n, m): 4 if m == "q_proj" else 2 for n in range(12) for m in ("q_proj", "v_proj")}
    write_adapter(tmp_path / "a", factors_of(ranks, dict.fromkeys(ranks, 0.7)), "base/name")
    config = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {"v_proj": 2}
    assert config["lora_alpha"] == 2.8 and config["alpha_pattern"] == {"v_proj": 1.4}
    assert config["base_model_name_or_path"] == "base/name"
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_numbers_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    for number, dtype in ((np.inf, None), (np.nan, None), (1e6, np.dtype(np.float16))):
        a = np.full((1, 8), number, np.float32)
        factors = {(3, "q_proj"): Factors(a, np.ones((8, 1), np.float32), np.float32(1))}
        with pytest.raises(AdapterRejected, match=r"layers\.3.*lora_A.* not finite in float"):
            write_adapter(tmp_path / "a", factors, None, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("")
    with pytest.raises(ConfigError, match="out exists already; it is left alone"):
        write_adapter(out, ONE, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.is_symlink() or not out.is_dir() or len(list(out.iterdir())) == (kind == "folder")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/out"):
        write_adapter(tmp_path / "file" / "out", ONE, None)


def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_goes_on(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_writer
Path.rename = lambda self, target: os._exit(9)
test_writer.write_adapter(Path({str(tmp_path / "out")!r}), test_writer.ONE, None)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    (partial,) = tmp_path.iterdir()
    assert partial.name == ".out.partial" and sorted(p.name for p in partial.iterdir()) == [*FILES]
    (partial / "stale").mkdir()
    write_adapter(tmp_path / "out", ONE, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*FILES]


def test_what_a_link_in_the_partial_folder_s_place_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    (tmp_path / ".out.partial").symlink_to("mine")
    with pytest.raises(ConfigError, match=r"cannot write .*out"):
        write_adapter(tmp_path / "out", ONE, None)
    assert (tmp_path / "mine" / "file").exists() and not (tmp_path / "out").exists()


def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from jslora.new_folder import new_folder
with new_folder(Path({str(tmp_path / "out")!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match=r"another process is writing \.out\.partial"):
            write_adapter(tmp_path / "out", ONE, None)
        assert (tmp_path / ".out.partial").is_dir()
        other.communicate()
    assert (tmp_path / "out").is_dir()
