"""The check of the GPU build where nothing can be compiled for a GPU: cases, tools, failures."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from jslora import config
from jslora.aot import check, ptxas, rules, target
from jslora.aot.cases import MODELS, POOL_BYTES, Case, cases
from jslora.aot.record import Record
from jslora.model.config import from_hf
from jslora.progress import silent
from pallas_kernels.lora.pieces import STORAGES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CASE = Case(
    what="step", model="smollm2-135m", phase="decode", kernels="pallas", rows=16, tokens=256,
    positions=2048, max_rank=64, page_size=16,
)  # fmt: skip


def all_cases(**settings: Any) -> list[Case]:
    loaded = (config.load(CONFIGS / f"{name}.yaml") for name in ("llama3-8b", "demo"))
    return cases(*loaded, **settings)


def test_the_launches_of_every_step_are_committed() -> None:
    steps = {case.name for case in all_cases() if case.what == "step"}
    assert rules.committed().keys() == steps
    assert all(isinstance(n, int) and n > 0 for n in rules.committed().values())


def test_steps_of_every_model_are_compiled_in_both_phases() -> None:
    steps = {(case.model, case.phase, case.devices) for case in all_cases() if case.what == "step"}
    assert steps == {
        ("llama3-8b", "decode", 1), ("llama3-8b", "mixed", 1),
        ("llama3-8b", "decode", 4), ("llama3-8b", "mixed", 4),
        ("qwen3-8b", "decode", 1), ("qwen3-8b", "mixed", 1),
        ("smollm2-135m", "decode", 1), ("smollm2-135m", "mixed", 1),
    }  # fmt: skip
    others = {case.name for case in all_cases() if case.what != "step"}
    assert others == {
        "llama3-8b decode pallas kernels", "llama3-8b mixed pallas kernels",
        "llama3-8b decode triton kernels", "llama3-8b mixed triton kernels",
        "llama3-8b decode pallas kernels quantised", "llama3-8b mixed pallas kernels quantised",
        "llama3-8b decode triton kernels quantised", "llama3-8b mixed triton kernels quantised",
        "llama3-8b pallas programs", "llama3-8b pallas 4 devices programs",
    }  # fmt: skip


def test_every_implementation_is_compiled_with_and_without_lora() -> None:
    names = [case.name for case in all_cases()]
    assert len({*names}) == len(names)
    assert check.EXECUTABLE in names
    for name in names:
        if "no lora" in name:
            assert name.replace("no lora", "lora") in names
        if "pallas" in name and "programs" not in name and "base" not in name:
            assert name.replace("pallas", "triton") in names
        if "quantised" in name:
            assert name.removesuffix(" quantised") in names
    quantised = [case for case in all_cases() if "quantised" in case.name]
    assert {case.devices for case in quantised if case.what == "step"} == {1, 4}
    assert all(case.storages == STORAGES for case in quantised)
    base = {(case.quantize, case.phase, case.devices) for case in all_cases()}
    wanted = itertools.product(("int8", "fp8"), ("decode", "mixed"), (1, 4))
    assert {case for case in base if case[0] != "none"} == {*wanted}


def test_cases_have_the_limits_of_the_configurations() -> None:
    llama = config.load(CONFIGS / "llama3-8b.yaml")
    for case in all_cases():
        if case.model == "llama3-8b":
            assert (case.rows, case.tokens) == (64, 2048)
            assert case.positions == llama.model.max_model_len == 8192
            assert case.max_rank == llama.adapters.max_rank
            assert case.max_composed == llama.adapters.max_composed > 1
        assert case.layers == 4
        assert POOL_BYTES[case.model] > 2**32, "offsets must not fit in 32 bits"
    every = {case.model: case.layers for case in all_cases(all_layers=True) if case.what == "step"}
    assert every == {"llama3-8b": 32, "qwen3-8b": 36, "smollm2-135m": 30}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama3-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360), ("smollm2-135m", 134_515_008)],
)
def test_the_models_have_as_many_parameters_as_published(model: str, parameters: int) -> None:
    assert from_hf(MODELS[model]).parameters == parameters


# Tools ---------------------------------------------------------------------------------------

WORDS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'lora_expand_1' for 'sm_90a'
ptxas info    : Function properties for lora_expand_1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compile time = 23.296 ms
ptxas info    : Compiling entry function 'lora_shrink' for 'sm_90a'
ptxas info    : Function properties for lora_shrink
    32 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 32 bytes cumulative stack size
"""


def test_registers_and_spills_are_read_from_the_words_of_ptxas() -> None:
    expand, shrink = ptxas.parse(WORDS)
    assert dataclasses.astuple(expand) == ("lora_expand_1", 64, 0)
    assert dataclasses.astuple(shrink) == ("lora_shrink", 255, 52)
    assert ptxas.parse("Cuda compilation tools, release 13.0") == []


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA folder whose ptxas says what the real one would."""
    folder = tmp_path / "toolkit"
    (folder / "bin").mkdir(parents=True)
    (folder / "nvvm").mkdir()
    (folder / "nvvm" / "libdevice").write_text("library")
    (folder / "bin" / "nvlink").write_text("linker")
    script = folder / "bin" / "ptxas"
    script.write_text(f"#!/bin/sh\necho got \"$@\"\ncat <<'END' >&2\n{WORDS}END\nexit 7\n")
    script.chmod(0o755)
    return folder


def test_the_stand_in_for_ptxas_does_what_ptxas_does(toolkit: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "cuda", tmp_path / "words"
    ptxas.make_cuda_folder(folder, toolkit, words)
    run = subprocess.run(
        [folder / "bin" / "ptxas", "a b", "-o", "c"], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (7, "got -v a b -o c\n", WORDS)
    assert [kernel.name for kernel in ptxas.read_words(words)] == ["lora_expand_1", "lora_shrink"]
    assert ptxas.read_words(words) == []
    assert (folder / "nvvm" / "libdevice").read_text() == "library"
    assert (folder / "bin" / "nvlink").read_text() == "linker"


def test_what_is_missing_is_named_as_pip_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"jax": "0.11.2", "jax-cuda13-plugin": "0.11.0", "jax-triton": "0.4.1"}

    def version(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(target, "version", version)
    assert target.missing() == [
        "jax-cuda13-plugin==0.11.2", "jax-cuda13-pjrt==0.11.2", "nvidia-cuda-nvcc==13.*",
        "nvidia-nvvm==13.*", "triton==3.7.1",
    ]  # fmt: skip
    there |= dict.fromkeys(["jax-cuda13-plugin", "jax-cuda13-pjrt"], "0.11.2")
    there |= dict.fromkeys(["nvidia-cuda-nvcc", "nvidia-nvvm", "triton"], "any")
    assert target.missing() == []


# The check -----------------------------------------------------------------------------------


def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "check_gpu_build", ROOT / "scripts" / "check_gpu_build.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(target, "missing", lambda: ["triton==3.7.1", "nvidia-nvvm==13.*"])
    assert script().main([]) == 2
    assert "pip install 'triton==3.7.1' 'nvidia-nvvm==13.*'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing"], "no case has the words"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (
            ["--only", "qwen3-8b", "--executable", "step.xla"],
            "--executable writes 'llama3-8b decode pallas lora', which --only leaves out",
        ),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(target, "missing", lambda: [])
    assert script().main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_configuration_must_say_how_long_sequences_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(target, "missing", lambda: [])
    written = tmp_path / "short.yaml"
    text = (CONFIGS / "llama3-8b.yaml").read_text()
    lines = [line for line in text.splitlines() if "max_model_len" not in line]
    written.write_text("\n".join(lines))
    assert script().main(["--config", str(written)]) == 2
    assert "needs model.max_model_len, which is not set" in capsys.readouterr().err


def test_a_case_that_does_not_compile_breaks_a_rule(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "toolkit", lambda: toolkit)
    seen: list[tuple] = []
    lost = dataclasses.replace(CASE, model="no such model")
    report = check.check([lost], {}, lambda *told: seen.append(told))
    (rule,) = report.broken[lost.name]
    assert rule.startswith("does not compile: exit code 1")
    assert f"FAILED {lost.name}: {rule}" in report.render()
    assert seen == [("compile", 0, 1, ""), ("compile", 1, 1, lost.name)]


def test_records_of_a_child_make_the_report(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child that prints a record, and then dies as an aborting compiler does."""
    other = dataclasses.replace(CASE, lora=False)
    good = Record(
        name=CASE.name, what="step", phase="decode", rows=16, per_layer={"product gemm": 4.0},
        outside=2, temporaries=2 * 10**6, aliased=8, donated=8, most_registers=96, seconds=1.5,
    )  # fmt: skip
    child = tmp_path / "child"
    child.write_text(
        "#!/bin/sh\ngrep -q '\"lora\": true' || { echo gone >&2; kill -9 $$; }\n"
        f"cat <<'END'\n{json.dumps(dataclasses.asdict(good))}\nEND\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(target, "toolkit", lambda: toolkit)
    monkeypatch.setattr(sys, "executable", str(child))
    report = check.check([CASE, other], {CASE.name: 4}, silent)
    assert report.records[0] == good
    assert report.records[1].error == "exit code -9: gone"
    assert report.broken.keys() == {other.name}
    assert report.as_json()["records"][0]["per_layer"] == {"product gemm": 4.0}
    (line,) = [line for line in report.render().splitlines() if line.startswith(CASE.name)]
    assert " ".join(line.split()) == f"{CASE.name} 4 4 0 0 0 0 2 0.0 0.0 2.0 0 0 0 96 1.5"


def test_the_children_see_no_flags_but_ours(tmp_path: Path) -> None:
    theirs = {
        "PATH": "/bin", "XLA_FLAGS": "--xla_gpu_autotune_level=0", "JAX_PLATFORMS": "cuda",
        "TRITON_INTERPRET": "1", "PYTHONPATH": "/a",
    }  # fmt: skip
    found = check.child_environment(theirs, tmp_path / "cuda", tmp_path / "ptx")
    assert found == {
        "PATH": "/bin", "CUDA_ROOT": str(tmp_path / "cuda"), "JAX_PLATFORMS": "cpu",
        "JAX_TRITON_DUMP_DIR": str(tmp_path / "ptx"), "PYTHONPATH": f"{ROOT}:/a",
        "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
    }  # fmt: skip
