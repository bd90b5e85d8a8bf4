"""Which implementation of each operation runs, and on what; the only file that asks which backend.

An operation has up to three implementations with one contract. `triton` is written in the Triton
language and called through jax-triton; `pallas` needs nothing but jax and runs on a CPU too, in
interpret mode; `reference` is plain jax.numpy and the fastest on a CPU. What a machine or a shape
does not allow raises `NotImplementedError`, and the choice falls through to the next.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import jax

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("triton", "pallas", "reference")
"""In the order in which `auto` tries them on a GPU."""


OFF = "off"
"""In the place of an implementation of LoRA: a step without it, which others are measured by."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choice for each operation, and the platform that programs are compiled for.

    `platform` is "cpu" or "cuda"; it is not the host's when programs are compiled ahead for a GPU.
    """

    lora: str
    attention: str
    platform: str

    @property
    def interpret(self) -> bool:
        """Whether Pallas kernels are interpreted, as XLA operations."""
        return self.platform == "cpu"

    @property
    def one_program(self) -> bool:
        """Whether a step's layers are compiled as one program.

        XLA:CPU compiles each layer of such a program anew, which takes half a minute a bucket for
        30 layers; there, one program for any layer is compiled and dispatched once a layer instead.
        """
        return self.platform != "cpu"

    @property
    def compiler_options(self) -> dict[str, str]:
        """What programs are compiled with.

        XLA counts a donated pool twice, as argument and as result. With half of a GPU's memory in
        it a step seems not to fit, and kernels would be repeated in every layer to no avail.
        """
        return {} if self.platform == "cpu" else {"xla_disable_hlo_passes": "rematerialization"}


def platform() -> str:
    """What this process runs on.

    Raises:
        NotImplementedError: neither a CPU nor an NVIDIA GPU.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return "cuda"
    raise NotImplementedError(f"{device.device_kind}: only CPUs and NVIDIA GPUs are supported")


Check = Callable[[str], None]
"""Raises NotImplementedError when an operation has no such implementation for the model at hand."""


def choose(wanted: str, platform: str, checks: Mapping[str, Check]) -> Kernels:
    """The implementation of each operation in `checks`; why others fell through is logged.

    Raises:
        NotImplementedError: one implementation was asked for by name and cannot be had.
    """
    chosen = {}
    for operation, check in checks.items():
        if wanted != "auto":
            _available(wanted, platform)
            check(wanted)
            chosen[operation] = wanted
            continue
        order = IMPLEMENTATIONS if platform == "cuda" else ("reference",)
        chosen[operation] = next(name for name in order if _allows(name, platform, check))
    return Kernels(**chosen, platform=platform)


def _allows(name: str, platform: str, check: Check) -> bool:
    try:
        _available(name, platform)
        check(name)
    except NotImplementedError as error:
        log.info("no %s kernel: %s", name, error)
        return False
    return True


def _available(name: str, platform: str) -> None:
    if name != "triton":
        return
    if platform != "cuda":
        raise NotImplementedError("triton kernels run on NVIDIA GPUs only")
    try:
        import_jax_triton()
    except (ImportError, AttributeError, TypeError) as error:  # the last two: unfit releases
        raise NotImplementedError(f"jax-triton cannot be imported: {error}") from None


def import_jax_triton() -> ModuleType:
    """jax-triton 0.4.1, made to work beside releases of triton and jax that it does not expect.

    Raises:
        ImportError: it, triton, or the GPU plugin of jax is not installed.
    """
    import triton.backends.nvidia.driver as driver

    if not hasattr(driver, "TMA_TF32"):  # triton 3.6
        driver.TMA_TF32 = 11
    import jax_triton
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib

    # jax 0.12 calls the rule with one argument more; what it says is the same for both.
    partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = lambda used, *rest: (
        [True] * len(rest[-1].invars),
        rest[-1],
    )
    return jax_triton
