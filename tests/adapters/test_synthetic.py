"""Synthetic adapters: valid, the same everywhere, and never half written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import GOLDEN, MODEL, write

from jslora.adapters.peft import Limits, read_adapter
from jslora.adapters.synthetic import make_adapters
from jslora.errors import ConfigError
from jslora.model.config import MODULES

TARGETS = [["q_proj", "v_proj"], ["o_proj", "down_proj"]]


def _make(root: Path, **changes: Any) -> list[Path]:
    settings = {
        "count": 6,
        "ranks": [1, 2, 5],
        "targets": TARGETS,
        "base_name": "tiny",
        **changes,
    }
    return make_adapters(root, MODEL, **settings)


def _contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_rank_meets_every_target_set(tmp_path: Path, dtype: str) -> None:
    folders = _make(tmp_path, dtype=dtype)
    assert [folder.name for folder in folders] == [f"adapter-00{i}" for i in range(6)]
    seen = set()
    for folder in folders:
        adapter = read_adapter(folder, MODEL, Limits())
        assert adapter.base_model == "tiny" and adapter.warnings == ()
        modules = tuple(dict.fromkeys(module for _, module in adapter.factors))
        for a, b, scale in adapter.factors.values():
            assert a.dtype.name == b.dtype.name == dtype and scale == 2
        seen.add((a.shape[0], modules))
    assert seen == {(rank, tuple(names)) for rank in (1, 2, 5) for names in TARGETS}


def test_an_adapter_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    _make(tmp_path / "six")
    _make(tmp_path / "three", count=3)
    six, three = _contents(tmp_path / "six"), _contents(tmp_path / "three")
    assert three.items() <= six.items()
    assert len({data for file, data in six.items() if file.endswith("safetensors")}) == 6
    _make(tmp_path / "other", seed=1)
    other = _contents(tmp_path / "other")
    assert six.keys() == other.keys()
    assert all(six[file] != other[file] for file in six if file.endswith("safetensors"))


@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("alpha", [None, 3])
def test_the_effect_is_half_of_the_input_whatever_the_rank(
    tmp_path: Path, rank: int, alpha: int | None
) -> None:
    (folder,) = _make(tmp_path, count=1, ranks=[rank], targets=[MODULES], alpha=alpha)
    random = np.random.default_rng(0)
    for a, b, scale in read_adapter(folder, MODEL, Limits()).factors.values():
        x = random.normal(size=(64, a.shape[1]))
        delta = (x @ a.T) @ b.T * scale
        assert 0.2 < delta.std() < 0.9  # wide, since a rank 1 of 32 numbers varies much


def test_what_is_right_is_kept_and_what_differs_is_made_again(tmp_path: Path) -> None:
    folders = _make(tmp_path)
    kept = {folder: folder.stat().st_ino for folder in folders}
    before = _contents(tmp_path)
    (folders[1] / "adapter_config.json").write_text("{}")
    (folders[2] / "adapter_config.json").unlink()
    _make(tmp_path)
    assert _contents(tmp_path) == before
    again = {folder for folder in folders if folder.stat().st_ino != kept[folder]}
    assert again == {folders[1], folders[2]}
    _make(tmp_path, dtype="float16")
    assert all(folder.stat().st_ino != kept[folder] for folder in folders)


@pytest.mark.parametrize(
    "spoil", [lambda p: write(p), lambda p: p.mkdir(), lambda p: p.write_text("x")]
)
def test_what_was_not_made_here_is_left_alone(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(tmp_path / "adapter-001")
    before = _contents(tmp_path)
    with pytest.raises(ConfigError, match="adapter-001 exists and is no synthetic adapter"):
        _make(tmp_path)
    assert {f: d for f, d in _contents(tmp_path).items() if "adapter-001" in f} == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_killed_run_leaves_whole_folders_only(tmp_path: Path) -> None:
    """The first run dies when the third adapter's weights are written but not yet in place."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_synthetic
from pathlib import Path
rename = Path.rename
def dying(self, target):
    if target.name == "adapter-002":
        os._exit(9)
    return rename(self, target)
Path.rename = dying
test_synthetic._make(Path({str(tmp_path / "a")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    visible = sorted(path.name for path in (tmp_path / "a").iterdir() if path.name[0] != ".")
    assert visible == ["adapter-000", "adapter-001"]
    assert list((tmp_path / "a").glob(".adapter-002.partial/new/*.safetensors"))
    _make(tmp_path / "a")
    _make(tmp_path / "b")
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_progress_counts_every_adapter(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    _make(tmp_path, count=3, progress=lambda *call: calls.append(call))
    assert calls == [("adapters", i, 3, f"adapter-00{i - 1}") for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"alpha": 0}, "alpha 0; both are at least 1"),
        ({"ranks": []}, r"ranks are \[\]; each is from 1 to 512"),
        ({"ranks": [8, 513]}, r"ranks are \[8, 513\]"),
        ({"targets": []}, r"targets \[\] are not among"),
        (
            {"targets": [["q_proj"], ["c_attn"]]},
            r"targets \['c_attn'\] are not among q_proj, k_proj",
        ),
        ({"targets": [["q_proj", "q_proj"]]}, "are not among"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed are float32, float16, bfloat16"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(tmp_path / "root", **change)
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"cannot write adapters below .*file: Not a directory|File exists"
    ):
        _make(tmp_path / "file")


def test_the_script_writes_what_the_function_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN["model"]))
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "scripts" / "make_adapters.py", "--model", tmp_path]
    command += ["--out", tmp_path / "a", "--count", "6", "--ranks", "1,2,5", "--base-name", "tiny"]
    command += [part for names in TARGETS for part in ("--targets", ",".join(names))]
    environment = {"PYTHONPATH": str(root)}
    subprocess.run(command, check=True, env=environment)
    _make(tmp_path / "b")
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    failed = subprocess.run(
        [*command, "--ranks", "0"], env=environment, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: adapters: ranks are [0]")
