"""What was measured on: the device, its driver, the versions, and how XLA describes the device."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.numpy as jnp

from jslora import __version__
from jslora.gpu.cases import Plan
from jslora.gpu.session import Session
from jslora.programs import choose_kernels
from pallas_kernels import launch

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "jax-triton",
            "triton", "numpy")  # fmt: skip
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def run(session: Session, plan: Plan, dump: Path | None) -> None:
    """Record the device; `dump` is where XLA was told to write what it compiles."""
    platform_name = launch.platform()
    chosen = choose_kernels(plan.model, plan.page_size, "auto", platform_name)
    device = jax.devices()[0]
    session.emit(
        "device", platform=platform_name, kind_of_device=device.device_kind,
        memory=(device.memory_stats() or {}).get("bytes_limit"), nvidia_smi=_nvidia_smi(),
        packages={name: _version(name) for name in PACKAGES}, jslora=__version__,
        python=platform.python_version(), cpus=os.cpu_count(), lora=chosen.lora,
        attention=chosen.attention, target_config=_target_config(dump),
    )  # fmt: skip


def _nvidia_smi() -> dict[str, str] | None:
    """What the driver says of the first device."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _target_config(dump: Path | None) -> str | None:
    """The text that deviceless compiles take for this device; XLA writes it beside its dumps."""
    if dump is None:
        return None
    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()
    files = sorted(dump.glob("*gpu_target_config.pbtxt"))
    return files[0].read_text() if files else None
