"""LoRA as an argument of the step: which rows of the pool are added to which linear layer's output.

The host resolves every address from the allocator's own truth (`jslora.batch`), so no adapter
table lives on the device and none can be stale. Layers and modules have their own lists, because
ranks may differ between them; a module that no adapter of the step targets has an empty list.
"""

from jaxtyping import Array, Float, Int32

from jslora.model.config import GROUPS, MODULES, ModelConfig
from pallas_kernels.lora import Shape, Work, add_lora


def apply_lora(
    y: Float[Array, "T out"],
    x: Float[Array, "T in"],
    *,
    group: int,
    config: ModelConfig,
    shape: Shape,
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: Work,
) -> Float[Array, "T out"]:
    """Add the deltas of a group of modules that read the same input to their fused base output."""
    widths = [config.widths(module)[1] for module in GROUPS[group]]
    for width in dict.fromkeys(widths):
        same = [i for i, other in enumerate(widths) if other == width]
        y = add_lora(
            y, x, pages, first_page, work, layer,
            modules=tuple(MODULES.index(GROUPS[group][i]) for i in same),
            columns=tuple(sum(widths[:i]) for i in same),
            width=width, shape=shape,
        )  # fmt: skip
    return y
