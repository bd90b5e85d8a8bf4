"""Weights kept on disk: the same bits in the same places, by one process and by two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kept_weights.py"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_restart_finds_its_part(processes: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(processes), str(process), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip
    try:
        for process in running:
            out, errors = process.communicate(timeout=100)
            assert (process.returncode, out) == (0, "kept\n"), errors
    finally:
        for process in running:
            process.kill()
