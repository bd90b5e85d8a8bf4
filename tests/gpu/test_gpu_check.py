"""The command itself, in an environment with nothing but what a bare GPU machine has."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from scripts import gpu_check

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
BARE = ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "jaxtyping", "PyYAML")

# Imported by every interpreter at its start: hides packages as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(*names: str) -> set[str]:
    """Distributions that these need, themselves included, extras left out."""
    found: set[str] = set()
    todo = [canonical(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [text for text in requires(name) or [] if "extra ==" not in text]
        except PackageNotFoundError:  # another platform's
            continue
        todo += [canonical(re.match(r"[\w.-]+", text)[0]) for text in wanted]  # type: ignore[index]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of processes that find nothing but what the bare machine has."""
    there = brought_by(*BARE)
    hidden = {
        package
        for package, owners in packages_distributions().items()
        if not there & {canonical(owner) for owner in owners}
    }
    assert {"matplotlib", "msgspec", "fastapi", "aiohttp", "re2", "pytest"} <= hidden
    assert not {"jax", "flax", "numpy", "yaml", "ml_dtypes"} & hidden
    hidden |= {"pydantic"}  # a need of a need of flax, which need not be there
    hidden -= {"jslora", "pallas_kernels"}  # of the checkout, not installed there
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    return os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}


def run(variables: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=variables, cwd=ROOT.parent,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_hidden_packages_cannot_be_imported(bare: dict[str, str]) -> None:
    code = "import jax, flax\nfor name in ('pydantic', 'matplotlib', 're2'):\n    __import__(name)"
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert "No module named 'pydantic'" in done.stderr


def test_a_tiny_run_on_a_bare_machine(bare: dict[str, str], tmp_path: Path) -> None:
    """From the supervisor through sections to the table; no jax-triton, no plot."""
    only = "correctness:triton,step:reference,attention:reference,attention:pallas,executable"
    missing = ("--executable", str(tmp_path / "none.xla"))
    done = run(bare, "--tiny", "--out", str(tmp_path), "--only", only, *missing)
    assert done.returncode == 0, (
        done.stdout,
        done.stderr,
        (tmp_path / "gpu_check.log").read_text(),
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    kinds = {record["kind"] for record in found["records"]}
    assert kinds == {"device", "unavailable", "finite", "step", "gaps", "attention", "executable"}
    assert sorted(found["sections"]) == sorted(["device", *only.split(",")])
    ran = {r["implementation"] for r in found["records"] if r["kind"] == "attention"}
    assert ran == {"reference", "pallas"}
    assert "Tiny shapes" in done.stdout and "attention kernels, one layer" in done.stdout
    assert "no plot: matplotlib is not installed" in done.stdout
    assert not (tmp_path / "gpu_check.png").exists()


def test_a_section_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--tiny", "--out", str(tmp_path), "--only", "step,typo"]) == 2
    says = capsys.readouterr().err
    assert "no section begins with 'typo'; there are device, ceilings, correctness:triton" in says
    assert not (tmp_path / "gpu_check.json").exists(), "before anything ran"


def test_without_a_gpu_it_says_so(bare: dict[str, str], tmp_path: Path) -> None:
    done = run(bare, "--out", str(tmp_path), "--minutes", "3")
    assert done.returncode == 2
    assert "no NVIDIA GPU can be used: jax found cpu" in done.stderr


def test_the_command_itself_never_imports_jax() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import scripts.gpu_check; print(*sys.modules)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"jax", "jaxlib", "flax", "matplotlib", "pydantic"}
