"""LoRA as an argument of the step: which rows of the pool are added to which linear layer's output.

The host resolves every address from the allocator's own truth (`jslora.batch`), so no adapter
table lives on the device and none can be stale. Layers and modules have their own addresses and
ranks; a module that no adapter of the step targets costs no reads.
"""

from jaxtyping import Array, Float, Int32

from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.sharding import AXIS
from jslora.split import BY_INPUT, ONE_DEVICE, Split
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import Shape, Work, add_lora
from pallas_kernels.lora.finish import Finish
from pallas_kernels.lora.meeting import Meeting, Part


def apply_lora(
    y: Float[Array, "T out"],
    x: Float[Array, "T in"],
    *,
    group: int,
    config: ModelConfig,
    shape: Shape,
    kernels: Kernels,
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: Work,
    finish: Finish = Finish.SUM,
    stream: Float[Array, "T H"] | None = None,
    split: Split = ONE_DEVICE,
) -> Float[Array, "T out"]:
    """Add the deltas of a group of modules to their fused base output, and finish the sums.

    Args:
        config: of one device's part of the model.
    """
    widths, meeting = [config.widths(module)[1] for module in GROUPS[group]], None
    if split.fully and GROUPS[group][0] in BY_INPUT:
        widths = [width // split.devices for width in widths]
        meeting = Meeting(AXIS, split.devices, Part.COLUMNS)
    elif split.fully:
        meeting = Meeting(AXIS, split.devices, Part.RANKS)
    return add_lora(
        y, x, pages, first_page, layer, work,
        modules=tuple(MODULES.index(module) for module in GROUPS[group]),
        widths=tuple(widths), shape=shape, kernels=kernels, finish=finish, stream=stream,
        meeting=meeting,
    )  # fmt: skip
