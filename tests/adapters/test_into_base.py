"""Adapters merged, into one or into their base: what the sum answers is what PEFT recorded."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from goldens.cases import ROOT, Case, Composed, cases, composed
from safetensors.numpy import load_file, save_file

from jslora.adapters.peft import Factors, Limits
from jslora.adapters.tools.combine import combine
from jslora.adapters.tools.into_base import INDEX, merge_into_base
from jslora.adapters.tools.make import make_adapter, read_parts
from jslora.errors import AdapterRejected, ConfigError, ModelError
from jslora.fetch import load_config

TOLERANCE = 2e-3
LLAMA = ROOT / "llama"
SUMS = [found for found in composed() if all(found.weights.values())]
SINGLE = [case for case in cases() if case.adapter_dir and case.model_dir.parent == LLAMA]


def _first_logprobs(model: Path, prompt: list[int], adapter: Path | None = None) -> np.ndarray:
    logits = oracle.forward(
        oracle.load_tensors(model / "model.safetensors"),
        json.loads((model / "config.json").read_text()),
        prompt,
        oracle.load_adapter(adapter) if adapter else None,
    )
    return oracle.log_softmax(logits[-1])


def _check(case: Case, model: Path, adapter: Path | None, tolerance: float = TOLERANCE) -> None:
    for prompt, ids, expected in zip(
        case.prompts, case.first_ids, case.first_logprobs, strict=True
    ):
        found = _first_logprobs(model, prompt, adapter)[ids]
        assert np.abs(found - expected).max() <= tolerance


def _weighted(found: Composed) -> list[tuple[Path, float]]:
    adapters = found.case.model_dir.parent / "adapters"
    return [(adapters / name, weight) for name, weight in found.weights.items()]


@pytest.mark.parametrize("found", SUMS, ids=lambda found: found.case.name)
def test_adapters_made_into_one_are_peft_s_sum(found: Composed, tmp_path: Path) -> None:
    """The new folder is read by the oracle, which knows of PEFT's format and not of the writer."""
    parts = read_parts(_weighted(found), load_config(found.case.model_dir), Limits())
    make_adapter(parts, tmp_path / "sum", Limits())
    _check(found.case, found.case.model_dir, tmp_path / "sum")
    ranks = {
        t: sum(len(p.adapter.factors[t].a) for p in parts if t in p.adapter.factors)
        for p in parts
        for t in p.adapter.factors
    }
    layers = make_adapter(parts, tmp_path / "less", Limits(), error=1e-6)
    assert {(layer.layer, layer.module): layer.rank_before for layer in layers} == ranks
    _check(found.case, found.case.model_dir, tmp_path / "less")


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_an_adapter_in_its_base_answers_as_beside_it(case: Case, tmp_path: Path) -> None:
    assert case.adapter_dir
    parts = read_parts([(case.adapter_dir, 1.0)], load_config(case.model_dir), Limits())
    layers = merge_into_base(case.model_dir, combine(parts), tmp_path / "merged")
    assert max(layer.error for layer in layers) < 1e-6  # this base is float32
    _check(case, tmp_path / "merged", None)
    load_config(tmp_path / "merged")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (case.model_dir / name).read_bytes()


def _sharded(folder: Path) -> Path:
    """The golden model in bfloat16, in two shards, with files that do and do not belong to it."""
    folder.mkdir()
    shutil.copyfile(LLAMA / "model" / "config.json", folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "train.py").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"")
    tensors = load_file(LLAMA / "model" / "model.safetensors")
    places = {}
    for i in (1, 2):
        part = {n: t for j, (n, t) in enumerate(sorted(tensors.items())) if j % 2 == i - 1}
        file = f"model-0000{i}-of-00002.safetensors"
        places |= dict.fromkeys(part, file)
        part = {n: t.astype(ml_dtypes.bfloat16) for n, t in part.items()}
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def _parts(name: str = "r5") -> dict[tuple[int, str], Factors]:
    return combine(
        read_parts([(LLAMA / "adapters" / name, 1.0)], load_config(LLAMA / "model"), Limits())
    )


def test_shards_stay_as_they_are_but_for_what_was_added(tmp_path: Path) -> None:
    base = _sharded(tmp_path / "base")
    before = {path: path.read_bytes() for path in base.iterdir()}
    factors = _parts()
    calls: list[tuple[str, int, int, str]] = []
    layers = merge_into_base(
        base, factors, tmp_path / "out", None, lambda *call: calls.append(call)
    )
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    names = {path.name for path in base.iterdir()} - {"train.py", "pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [(fitted.layer, fitted.module) for fitted in layers] == list(factors)
    told = {(fitted.layer, fitted.module): fitted for fitted in layers}
    for file in names:
        if not file.endswith(".safetensors"):
            assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
            continue
        old, new = load_file(base / file), load_file(tmp_path / "out" / file)
        assert old.keys() == new.keys() and (calls[-1][0] == "merge")
        for name, tensor in old.items():
            layer, _, module, *_ = [*name.split(".")[2:], "", "", ""]
            target = (int(layer), module) if layer.isdecimal() else (-1, "")
            assert new[name].dtype == tensor.dtype
            if target not in factors:
                assert new[name].tobytes() == tensor.tobytes()
                continue
            a, b, scale = (np.asarray(part, np.float64) for part in factors[target])
            delta = scale * (b @ a)
            changed = new[name].astype(np.float64) - tensor.astype(np.float64)
            error = np.linalg.norm(changed - delta) / np.linalg.norm(delta)
            assert 1e-4 < error < 0.1 and abs(error - told[target].error) < 1e-4


def test_a_wider_dtype_keeps_all_of_the_delta(tmp_path: Path) -> None:
    base, factors = _sharded(tmp_path / "base"), _parts()
    layers = merge_into_base(base, factors, tmp_path / "out", np.dtype(np.float32))
    assert max(layer.error for layer in layers) < 1e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    for path in (tmp_path / "out").glob("*.safetensors"):
        old, new = load_file(base / path.name), load_file(path)
        for name, tensor in old.items():
            assert new[name].dtype == np.float32
            if not name.endswith("_proj.weight"):
                assert np.array_equal(new[name], tensor.astype(np.float32))
    tensors = {n: np.full_like(t, 1e30) for n, t in load_file(path).items()}
    save_file(tensors, base / path.name)
    with pytest.raises(AdapterRejected, match=r"(not finite in|too large for) float16"):
        merge_into_base(base, factors, tmp_path / "small", np.dtype(np.float16))


def test_an_index_beside_a_whole_file_is_not_copied_without_its_shards(tmp_path: Path) -> None:
    base = _sharded(tmp_path / "base")
    shutil.copyfile(LLAMA / "model" / "model.safetensors", base / "model.safetensors")
    merge_into_base(base, _parts(), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"LICENSE.txt", "config.json", "model.safetensors", "tokenizer.json"}


def test_bases_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    factors = _parts()
    base = _sharded(tmp_path / "base")
    places = json.loads((base / INDEX).read_text())["weight_map"]
    file = base / places["model.layers.1.self_attn.q_proj.weight"]
    tensors = load_file(file)

    def refused(message: str, error: type[Exception] = ModelError) -> None:
        with pytest.raises(error, match=message):
            merge_into_base(base, factors, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"base"}

    missing = {n: t for n, t in tensors.items() if "1.self_attn.q_proj" not in n}
    save_file(missing, file)
    refused(r"lack the tensor model\.layers\.1\.self_attn\.q_proj\.weight")
    narrow = tensors["model.layers.1.self_attn.q_proj.weight"][:8]
    save_file({**missing, "model.layers.1.self_attn.q_proj.weight": narrow}, file)
    refused(r"q_proj\.weight is \[8, 64\] of bfloat16; expected \[64, 64\]")
    whole = narrow.astype(np.int8).repeat(8, 0)
    save_file({**missing, "model.layers.1.self_attn.q_proj.weight": whole}, file)
    refused(r"q_proj\.weight is \[64, 64\] of int8")
    file.write_bytes(b"no tensors")
    refused("cannot read model-0000")
    (base / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}')
    refused("has no weight_map from tensors to file names")
    (base / INDEX).unlink()
    refused("expected model.safetensors or its index")


def test_sums_that_the_base_cannot_hold_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(LLAMA / "model", base)
    tensors = load_file(base / "model.safetensors")
    save_file({n: t.astype(np.float16) for n, t in tensors.items()}, base / "model.safetensors")
    large = {t: f._replace(scale=np.float32(1e6)) for t, f in _parts().items()}
    with pytest.raises(AdapterRejected, match=r"added is too large for float16"):
        merge_into_base(base, large, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_over_what_is_served_are_refused(tmp_path: Path) -> None:
    parts = read_parts(_weighted(SUMS[0]), load_config(SUMS[0].case.model_dir), Limits())
    with pytest.raises(ConfigError, match=r"would have rank 13; at most 12 is served"):
        make_adapter(parts, tmp_path / "out", Limits(max_rank=12))
    assert not list(tmp_path.iterdir())
