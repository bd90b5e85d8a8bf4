"""The GPU that is compiled for on a machine without one, and what must be installed for that.

An H100 SXM as XLA wants it described: figures of its datasheet, in the fields of
`xla.gpu.GpuTargetConfigProto`.
"""

import importlib.util
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DEVICE = "NVIDIA H100 80GB HBM3"

H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_core: {228 * 2**10}
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {3_352_320_000_000}
  l2_cache_size: {50 * 2**20}
  clock_rate_ghz: 1.98
  device_memory_size: {84_942_979_072}
  shared_memory_per_block_optin: {227 * 2**10}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{DEVICE}"
"""

_NEEDED = {
    "jax-cuda13-plugin": "jax-cuda13-plugin=={jax}",
    "jax-cuda13-pjrt": "jax-cuda13-pjrt=={jax}",
    "nvidia-cuda-nvcc": "nvidia-cuda-nvcc==13.*",
    "nvidia-nvvm": "nvidia-nvvm==13.*",
    "jax-triton": "jax-triton==0.4.1",
    "triton": "triton==3.7.1",
}
"""Distributions, and what to ask pip for; the two of nvidia bring ptxas and libdevice."""


def missing() -> list[str]:
    """What pip must install before anything can be compiled for a GPU here."""
    jax = version("jax")
    wanted = []
    for name, requirement in _NEEDED.items():
        requirement = requirement.format(jax=jax)
        try:
            installed = version(name)
        except PackageNotFoundError:
            wanted.append(requirement)
            continue
        if requirement.endswith(jax) and installed != jax:
            wanted.append(requirement)
    return wanted


def toolkit() -> Path:
    """The folder with `bin/ptxas` that the nvidia wheels make up."""
    found = [folder for folder in _toolkits() if (folder / "bin" / "ptxas").is_file()]
    assert found, "nvidia-cuda-nvcc is installed but brings no nvidia/cu13/bin/ptxas"
    return found[0]


def _toolkits() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield Path(folder) / "cu13"
