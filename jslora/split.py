"""How a model and its adapters are divided over the devices of the mesh axis "model".

The base is split as in Megatron-LM (arXiv 1909.08053): q, k, v, gate and up by their outputs, o and
down by their inputs. Adapters follow in one of two ways. Without extra collectives, A of what is
split by outputs and B of what is split by inputs are whole on every device. Fully sharded (S-LoRA,
arXiv 2311.03285, section 6) every device holds its share: of a module split by outputs its part of
the ranks of A, whose products meet before B; of a module split by inputs its columns of A, whose
products are summed, and its columns of B. Host only: no jax.
"""

from dataclasses import dataclass, replace

from jslora.errors import ModelError
from jslora.model.config import ModelConfig

BY_INPUT = frozenset({"o_proj", "down_proj"})
"""Modules that are split by their inputs; the others are by their outputs."""


@dataclass(frozen=True, slots=True)
class Split:
    """A division over `devices`; `fully` says whether adapters are fully sharded."""

    devices: int = 1
    fully: bool = False

    def local(self, model: ModelConfig) -> ModelConfig:
        """The dimensions of one device's part.

        Raises:
            ModelError: kv heads or the feed-forward width do not divide by `devices`; or, fully
                sharded, the hidden width.
        """
        sizes = {"kv heads": model.kv_heads, "feed-forward width": model.feed_forward}
        if self.fully:
            sizes["hidden width"] = model.hidden
        for what, size in sizes.items():
            if size % self.devices:
                able = [
                    n
                    for n in range(1, model.kv_heads + 1)
                    if not any(s % n for s in sizes.values())
                ]
                raise ModelError(
                    f"{size} {what} cannot be split over {self.devices} devices; mesh.model may be "
                    f"one of {able}"
                )
        return replace(
            model,
            heads=model.heads // self.devices,
            kv_heads=model.kv_heads // self.devices,
            feed_forward=model.feed_forward // self.devices,
        )

    def page_numbers(self, model: ModelConfig, page_size: int) -> int:
        """Numbers in one page of one layer on one device: S tokens of its keys and values."""
        return page_size * 2 * self.local(model).kv_heads * model.head_dim

    def splits_vocabulary(self, model: ModelConfig) -> bool:
        """Whether each device holds its share of the rows of the embedding and the head."""
        return self.devices > 1 and model.vocab_size % self.devices == 0

    def rows(self, model: ModelConfig, module: str) -> tuple[int, int]:
        """Lengths of one device's rows of A and of B; `model` is the whole one."""
        wide_in, wide_out = self.local(model).widths(module)
        if self.fully and module in BY_INPUT:
            wide_out //= self.devices
        return wide_in, wide_out

    def peers(self, module: str) -> int:
        """Devices that each hold a share of the ranks of A, so that products must meet before B."""
        return self.devices if self.fully and module not in BY_INPUT else 1

    def rank(self, module: str, rank: int) -> int:
        """Rows of A on one device: its share of the ranks, rounded up.

        B has `peers` times as many rows, those behind the true rank zero on both sides.
        """
        return -(-rank // self.peers(module))

    def part(
        self, model: ModelConfig, module: str, rank: int, device: int
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where a device's rows lie in A, [rank, in], and in B, transposed, [rank, out]."""
        in_, out = (
            slice(device * part, (device + 1) * part) if part < whole else slice(0, whole)
            for part, whole in zip(self.rows(model, module), model.widths(module), strict=True)
        )
        own = self.rank(module, rank)
        first = device * own if self.peers(module) > 1 else 0
        return (slice(first, first + own), in_), (slice(0, self.peers(module) * own), out)


ONE_DEVICE = Split()
"""Nothing is split."""
