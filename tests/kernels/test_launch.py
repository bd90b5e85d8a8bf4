"""The choice of an implementation: what falls through, and what is refused because it was named."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_helpers import LLAMA3, small_engine

from jslora.errors import ConfigError
from jslora.model.config import ModelConfig
from jslora.programs import choose_kernels
from pallas_kernels import launch
from pallas_kernels.launch import Kernels, choose


def anything(implementation: str) -> None:
    """A check that every implementation passes."""


def no_kernel(implementation: str) -> None:
    """A check that only the reference passes."""
    if implementation != "reference":
        raise NotImplementedError("heads of 17 numbers")


@pytest.mark.parametrize(
    ("platform", "version", "found"),
    [("cpu", "", "cpu"), ("gpu", "PJRT C API\ncuda 13000", "cuda")],
)
def test_the_platform_is_told_by_the_device(
    monkeypatch: pytest.MonkeyPatch, platform: str, version: str, found: str
) -> None:
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform=platform, client=client, device_kind="some kind")
    monkeypatch.setattr("jax.devices", lambda: [device])
    assert launch.platform() == found
    device.platform, client.platform_version = "gpu", "rocm 60300"
    with pytest.raises(NotImplementedError, match="some kind: only CPUs and NVIDIA GPUs"):
        launch.platform()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "import_jax_triton", lambda: None)


@pytest.fixture(params=[ImportError, AttributeError, TypeError])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax-triton is not there, or of a release that does not fit jax's or triton's."""

    def fail() -> None:
        raise request.param("No module named 'jax_triton'")

    monkeypatch.setattr(launch, "import_jax_triton", fail)


def test_a_cpu_runs_the_reference(installed: None) -> None:
    checks = {"lora": anything, "attention": anything}
    assert choose("auto", "cpu", checks) == Kernels("reference", "reference", "cpu")


@pytest.mark.usefixtures("installed")
def test_a_gpu_runs_triton_and_each_operation_falls_through_alone() -> None:
    checks = {"lora": anything, "attention": no_kernel}
    assert choose("auto", "cuda", checks) == Kernels("triton", "reference", "cuda")


@pytest.mark.usefixtures("missing")
def test_without_jax_triton_a_gpu_runs_pallas() -> None:
    checks = {"lora": anything, "attention": anything}
    assert choose("auto", "cuda", checks) == Kernels("pallas", "pallas", "cuda")
    with pytest.raises(NotImplementedError, match="jax-triton cannot be imported: No module"):
        choose("triton", "cuda", checks)


def test_what_is_asked_for_by_name_is_had_or_refused() -> None:
    both = {"lora": anything, "attention": anything}
    assert choose("pallas", "cpu", both) == Kernels("pallas", "pallas", "cpu")
    with pytest.raises(NotImplementedError, match="heads of 17 numbers"):
        choose("pallas", "cuda", {"lora": anything, "attention": no_kernel})
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        choose("triton", "cpu", both)


def a_model(**changes: int) -> ModelConfig:
    sizes = dict(
        vocab_size=8, hidden=576, layers=1, heads=9, kv_heads=3, head_dim=64, feed_forward=1536,
        max_positions=64,
    )  # fmt: skip
    return ModelConfig(architecture="LlamaForCausalLM", **(sizes | changes))


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize(
    ("changes", "lora", "attention"),
    [
        ({}, "pallas", "pallas"),
        ({"head_dim": 80}, "pallas", "reference"),
        ({"feed_forward": 1540}, "reference", "pallas"),
    ],
)
def test_shapes_that_a_kernel_cannot_take_fall_through(
    changes: dict[str, int], lora: str, attention: str
) -> None:
    found = choose_kernels(a_model(**changes), 16, "auto", "cuda")
    assert (found.lora, found.attention) == (lora, attention)


def test_a_kernel_that_cannot_be_had_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernels: triton cannot be had: triton kernels run on"):
        small_engine(tmp_path, LLAMA3 / "model", kernels="triton")
