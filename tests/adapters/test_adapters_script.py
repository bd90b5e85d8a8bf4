"""scripts/adapters.py without a model's weights: what it prints, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import CONFIG, GOLDEN, GOLDENS, MODEL, tensors, write
from written_cases import factors_of

from jslora.adapters.layout import pack
from jslora.adapters.peft import Limits, read_adapter
from jslora.adapters.writer import write_adapter
from scripts import adapters

SERVED = GOLDENS / "served"


class Script:
    """Runs the script on the tiny base of the adapter tests."""

    def __init__(self, tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._config = tmp / "base" / "config.json"
        self._config.parent.mkdir()
        self._config.write_text(json.dumps(GOLDEN["model"]))
        self._capsys = capsys

    def __call__(self, command: str, *arguments: object) -> str:
        assert self._run(command, *arguments) == 0, self._capsys.readouterr().err
        return self._capsys.readouterr().out

    def refuses(self, command: str, *arguments: object, code: int = 2) -> str:
        """The error, alone on its line, of a run that prints nothing else."""
        assert self._run(command, *arguments) == code
        out, err = self._capsys.readouterr()
        *progress, error = err.splitlines()
        assert out == "" and all(line.startswith("fit: ") for line in progress)
        return error.removeprefix("error: ")

    def _run(self, command: str, *arguments: object) -> int:
        return adapters.main([command, "--model", str(self._config), *map(str, arguments)])


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Script:
    return Script(tmp_path, capsys)


def _read(folder: Path) -> Any:
    return read_adapter(folder, MODEL, Limits())


# inspect -----------------------------------------------------------------------------------------


def test_a_report_says_how_an_adapter_binds(script: Script) -> None:
    told = script("inspect", SERVED / "patterns", SERVED / "float16")
    first, second = told.split("\n\n")
    assert first.startswith("patterns\n") and second.startswith("float16\n")
    assert _read(SERVED / "patterns").digest[:16] in first
    assert "q_proj          rank 1-5, scale " in first
    assert "warning         rank_pattern: no targeted module matches nothing" in first
    assert "gate_proj       rank 1, scale 1.5" in second and "in 3 layers" in second


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_report_as_json_is_what_packing_comes_to(script: Script, dtype: str) -> None:
    (told,) = json.loads(script("inspect", SERVED / "rslora", "--json", "--dtype", dtype))
    adapter = _read(SERVED / "rslora")
    ranks = {t: len(f.a) for t, f in adapter.factors.items()}
    assert told["digest"] == adapter.digest and told["bytes"] == adapter.bytes
    assert told["rank"] == max(ranks.values()) and told["layers"] == 3
    low, high, scale = told["modules"]["k_proj"]
    of_k = [t for t in ranks if t[1] == "k_proj"]
    assert (low, high) == (min(ranks[t] for t in of_k), max(ranks[t] for t in of_k))
    assert scale == max(float(adapter.factors[t].scale) for t in of_k)
    page = 16 * 2 * MODEL.kv_heads * MODEL.head_dim
    packed = pack(adapter, MODEL, page, adapters.DTYPES[dtype])
    assert told["pages"] == packed.n_pages and told["bytes_device"] == packed.blob.nbytes
    assert told["storage"] == "full" and told["output_error"] == 0


def test_a_report_says_what_a_storage_changes(script: Script) -> None:
    told = [
        json.loads(script("inspect", SERVED / "plain", "--json", "--storage", storage))[0]
        for storage in ("full", "int8", "int4")
    ]
    errors = [report["output_error"] for report in told]
    assert errors[0] == 0 < errors[1] < 0.05 < errors[2] < 0.3
    assert len({report["digest"] for report in told}) == 3
    text = script("inspect", SERVED / "plain", "--storage", "int8")
    assert f"stored as       int8, which changes outputs by {errors[1]:.2%}" in text


# convert -----------------------------------------------------------------------------------------


def test_a_conversion_that_asks_for_nothing_changes_nothing(script: Script, tmp_path: Path) -> None:
    for name in GOLDEN["served"]:
        script("convert", SERVED / name, tmp_path / name)
        old, new = _read(SERVED / name), _read(tmp_path / name)
        assert old.digest == new.digest and old.base_model == new.base_model


def test_dtype_and_base_name_are_changed(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = script("convert", SERVED / "plain", out, "--dtype", "float16", "--base-name", "new/base")
    assert f"wrote {out}" in told
    old, new = _read(SERVED / "plain"), _read(out)
    assert new.base_model == "new/base"
    for target, (a, b, scale) in old.factors.items():
        assert np.array_equal(new.factors[target].a, a.astype(np.float16))
        assert np.array_equal(new.factors[target].b, b.astype(np.float16))
        assert new.factors[target].scale == scale


def test_ranks_fall_as_far_as_the_error_allows(script: Script, tmp_path: Path) -> None:
    """Of rank 4, each rank counting a tenth of the one before."""
    plain = _read(SERVED / "plain")
    weak = {
        t: f._replace(a=(f.a * 10.0 ** -np.arange(4)[:, None]).astype(np.float32))
        for t, f in plain.factors.items()
    }
    write_adapter(tmp_path / "weak", weak, None)
    told = json.loads(
        script("convert", tmp_path / "weak", tmp_path / "out", "--error", 0.05, "--json")
    )
    new = _read(tmp_path / "out")
    for layer in told["layers"]:
        a, b, scale = (
            np.asarray(part, np.float64) for part in weak[layer["layer"], layer["module"]]
        )
        dense = scale * (b @ a)
        a, b, scale = (
            np.asarray(part, np.float64) for part in new.factors[layer["layer"], layer["module"]]
        )
        error = np.linalg.norm(scale * (b @ a) - dense) / np.linalg.norm(dense)
        assert abs(layer["error"] - error) < 1e-9 and error <= 0.05
        assert layer["rank_before"] == 4 and layer["rank"] == len(a) == 2
    assert 0 < told["error"] <= 0.05


# merge -------------------------------------------------------------------------------------------


def test_a_merge_adds_by_weight(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = ("--base-name", "tiny")
    script("merge", "--out", out, f"{SERVED / 'plain'}=-0.5", SERVED / "regex", *named)
    old = [(_read(SERVED / "plain"), -0.5), (_read(SERVED / "regex"), 1.0)]
    new = _read(out)
    assert new.base_model == "tiny"
    assert new.factors.keys() == {t for adapter, _ in old for t in adapter.factors}
    for target, (a, b, scale) in new.factors.items():
        found = [(ad.factors[target], w) for ad, w in old if target in ad.factors]
        expected = sum(w * f.scale * np.float64(1) * (f.b @ f.a) for f, w in found)
        np.testing.assert_allclose(np.float64(scale) * (b @ a), expected, rtol=1e-5, atol=1e-6)
        assert len(a) == sum(len(f.a) for f, _ in found)


# Refusals ----------------------------------------------------------------------------------------


def test_errors_are_precise_and_leave_nothing(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain, dora = SERVED / "plain", GOLDENS / "refused" / "dora"
    refused = script.refuses
    assert refused("inspect", plain, dora).startswith(f"{dora}: use_dora is set")
    assert refused("inspect", tmp_path) == f"{tmp_path}: the folder holds no adapter_config.json"
    assert refused("inspect", tmp_path / "no") == f"{tmp_path / 'no'}: there is no such folder"
    assert refused("convert", plain, out, "--error", 2).startswith("the error is 2; a share above")
    told = refused("convert", plain, out, "--error", 1e-4, "--dtype", "bfloat16")
    assert told.startswith("an error of 0.0001 cannot be had in bfloat16: rounding alone changes")
    assert refused("merge", "--out", out, f"{plain}=0").startswith(f"the weight of {plain} is 0;")
    assert "=heavy: there is no such folder" in refused("merge", "--out", out, f"{plain}=heavy")
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    out.mkdir()
    assert refused("convert", plain, out) == f"{out} exists already; it is left alone"
    assert refused("merge", "--out", out, plain) == f"{out} exists already; it is left alone"


def test_adapters_of_another_base_are_refused(script: Script, tmp_path: Path) -> None:
    """By their shapes; and by what they say of it, where shapes agree."""
    other = tmp_path / "other"
    write_adapter(other, factors_of({(0, "q_proj"): 2}, {(0, "q_proj"): 1.0}), "other")
    told = script.refuses("inspect", other)
    assert "q_proj.lora_A.weight has shape [2, 8]; expected [2, 32] (the base's shape)" in told
    for name in ("one", "two"):
        write(tmp_path / name, {**CONFIG, "base_model_name_or_path": f"base-{name}"}, tensors())
    both = ("merge", "--out", tmp_path / "out", tmp_path / "one", tmp_path / "two")
    told = script.refuses(*both)
    assert told.startswith("the adapters were trained for several bases: ")
    assert "one for base-one, " in told and told.endswith("; if these are one, name it")
    script(*both, "--base-name", "base")
    assert _read(tmp_path / "out").base_model == "base"


def test_arguments_that_do_not_meet_are_refused(script: Script, tmp_path: Path) -> None:
    into = ("merge", "--into-base", "--out", tmp_path / "out", SERVED / "plain")
    assert "--into-base makes none" in script.refuses(*into, "--error", 0.1)
    told = script.refuses(*into, code=3)
    assert told.startswith("model.source") and "neither a folder nor a .gguf file" in told
    (tmp_path / "base" / "config.json").write_text("{}")
    assert "architecture None" in script.refuses("inspect", SERVED / "plain", code=3)


def test_ranks_beyond_what_is_served_need_an_error(script: Script, tmp_path: Path) -> None:
    config = {**CONFIG, "r": 300}
    for i in (0, 1):
        write(tmp_path / f"{i}", config, tensors(300, seed=i))
    both = ("merge", "--out", tmp_path / "out", tmp_path / "0", tmp_path / "1")
    assert script.refuses(*both) == (
        "layer 0's q_proj would have rank 600; at most 512 is served; allow an error to lower ranks"
    )
    script(*both, "--error", 1e-5)  # a matrix of 32 columns has no higher rank
    assert {len(f.a) for f in _read(tmp_path / "out").factors.values()} == {32}


def test_what_a_pool_cannot_hold_is_refused(tmp_path: Path, script: Script) -> None:
    large = {n: np.full_like(t, 3.4e38) for n, t in tensors().items()}
    write(tmp_path / "large", weights=large)
    assert "too large for bfloat16" in script.refuses("inspect", tmp_path / "large")
    assert "rank 2" in script("inspect", tmp_path / "large", "--dtype", "float32")
