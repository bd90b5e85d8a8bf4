"""Compile what a GPU would run, each case in a process of its own, and apply the rules.

Host only: jax runs in the children (`jslora.aot.child`), whose environment holds the compiler's
flags. A child that dies is a case that does not compile; the others go on.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jslora.aot import adapter_bytes, ptxas, rules, table, target
from jslora.aot.adapter_bytes import AdapterBytes
from jslora.aot.cases import Case
from jslora.aot.record import Record
from jslora.progress import Progress

SECONDS = 600
"""A case that takes longer has failed."""

EXECUTABLE = "llama3-8b decode pallas lora"
"""The case whose executable is written; it needs nothing but jax to be loaded."""


@dataclass(frozen=True)
class Report:
    """All records, in the order of the cases, and the broken rules by record name.

    Attributes:
        adapters: what an adapter takes of a device, however it is split.
    """

    records: list[Record]
    adapters: list[AdapterBytes]
    broken: dict[str, list[str]]

    def render(self) -> str:
        """The table, and below it what is broken."""
        text = table.render(self.records, self.adapters, target.DEVICE, version("jax"))
        lines = [f"FAILED {name}: {rule}" for name, all_ in self.broken.items() for rule in all_]
        return "\n".join([text, "", *(lines or ["All rules hold."])])

    def as_json(self) -> dict[str, Any]:
        return {
            "device": target.DEVICE,
            "jax": version("jax"),
            "records": [dataclasses.asdict(record) for record in self.records],
            "adapters": [dataclasses.asdict(size) for size in self.adapters],
            "broken": self.broken,
        }


def check(
    cases: Sequence[Case],
    allowed: rules.Allowed,
    progress: Progress,
    *,
    executable: Path | None = None,
    processes: int = 2,
) -> Report:
    """Compile the cases and apply the rules.

    Args:
        executable: where to write the compiled executable of the case `EXECUTABLE`.
        progress: told ("compile", cases done, cases in all, case name).
    """
    found: dict[str, list[Record]] = {}
    progress("compile", 0, len(cases), "")
    with ThreadPoolExecutor(processes) as pool:
        waiting = {}
        for case in cases:
            wanted = executable if case.name == EXECUTABLE else None
            waiting[pool.submit(_run, case, wanted)] = case
        for done, job in enumerate(as_completed(waiting), start=1):
            found[waiting[job].name] = job.result()
            progress("compile", done, len(cases), waiting[job].name)
    records = [record for case in cases for record in found[case.name]]
    verdicts = {
        record.name: rules.broken(record, allowed, case)
        for case in cases
        for record in found[case.name]
    }
    adapters = adapter_bytes.measure()
    verdicts["adapters"] = adapter_bytes.broken(adapters)
    return Report(records, adapters, {name: all_ for name, all_ in verdicts.items() if all_})


def _run(case: Case, executable: Path | None) -> list[Record]:
    """Compile a case in a child; one record with an error when that fails."""
    with tempfile.TemporaryDirectory(prefix="jslora-gpu-build-") as name:
        folder = Path(name)
        words, ptx, toolkit = folder / "words", folder / "ptx", target.toolkit()
        ptxas.make_cuda_folder(folder / "cuda", toolkit, words)
        ptx.mkdir()
        command = [
            sys.executable, "-W", "ignore", "-m", "jslora.aot.child",
            "--words", f"{words}", "--ptx", f"{ptx}", "--toolkit", f"{toolkit}",
            *(["--executable", f"{executable.absolute()}"] if executable else []),
        ]  # fmt: skip
        text = json.dumps(dataclasses.asdict(case))
        environment = child_environment(os.environ, folder / "cuda", ptx)
        try:
            child = subprocess.run(
                command, input=text, env=environment, capture_output=True, text=True,
                timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [_failed(case, f"not done after {SECONDS} seconds")]
    records = list(_records(child.stdout))
    if child.returncode:
        said = child.stderr.strip()[-2000:] or "it said nothing"
        records.append(_failed(case, f"exit code {child.returncode}: {said}"))
    return records


def child_environment(ours: Mapping[str, str], cuda: Path, ptx: Path) -> dict[str, str]:
    """Our environment without what would change the compiler, and where it finds its tools.

    Products are library calls: without a device XLA cannot time its own kernels against those, and
    what it would choose untimed, sums of a split product in launches of their own among it, says
    nothing about the device.
    """
    kept = {k: v for k, v in ours.items() if not k.startswith(("JAX_", "XLA_", "TF_", "TRITON_"))}
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [ours.get("PYTHONPATH")])]
    return kept | {
        "CUDA_ROOT": str(cuda),
        "JAX_PLATFORMS": "cpu",
        "JAX_TRITON_DUMP_DIR": str(ptx),
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
    }


def _records(text: str) -> Iterator[Record]:
    for line in text.splitlines():
        yield Record(**json.loads(line))


def _failed(case: Case, error: str) -> Record:
    what = case.what.removesuffix("s")
    return Record(name=case.name, what=what, phase=case.phase, kernels=case.kernels, error=error)
