"""One adapter made of others: read, summed by weight, made smaller if asked, and written.

With one adapter of weight 1 that is a conversion. Nothing is written unless all of it can be, and
served. Host only: no jax.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jslora.adapters.peft import Adapter, Factors, Limits, read_adapter
from jslora.adapters.tools.combine import Part, combine, common_base
from jslora.adapters.tools.fit import Fitted, fit
from jslora.adapters.writer import Target, write_adapter
from jslora.errors import AdapterRejected, ConfigError
from jslora.model.config import ModelConfig
from jslora.new_folder import refuse_existing
from jslora.progress import Progress, silent


def read_named(folder: Path, model: ModelConfig, limits: Limits) -> Adapter:
    """As `read_adapter`; its error says of which folder."""
    try:
        return read_adapter(folder, model, limits)
    except AdapterRejected as error:
        raise AdapterRejected(f"{folder}: {error.message}") from None


def read_parts(
    folders: Sequence[tuple[Path, float]], model: ModelConfig, limits: Limits
) -> list[Part]:
    """Adapters and their weights.

    Raises:
        AdapterRejected: one does not bind to `model`.
    """
    return [
        Part(str(folder), read_named(folder, model, limits), weight) for folder, weight in folders
    ]


def make_adapter(
    parts: Sequence[Part],
    out: Path,
    limits: Limits,
    *,
    dtype: np.dtype | None = None,
    error: float | None = None,
    base_name: str | None = None,
    progress: Progress = silent,
) -> list[Fitted]:
    """Write the weighted sum of `parts` to `out`; what became of each layer.

    Args:
        limits: those that adapters are read with.
        dtype, error: see `fit`; sums are float32 by default.
        base_name: what the adapter calls its base; by default what they do.

    Raises:
        ConfigError: `out` is there already or cannot be written, a weight or the error is out of
            range, the error is less than rounding to `dtype`, or ranks come to more than is served.
        AdapterRejected: the adapters name several bases, or a number is too large for `dtype`.
    """
    refuse_existing(out)
    if base_name is None:
        base_name = common_base(parts)
    kept = np.dtype(np.float32) if len(parts) > 1 else None
    factors, layers = fit(combine(parts), dtype or kept, error, progress)
    _check_ranks(factors, limits)
    write_adapter(out, factors, base_name)
    return layers


def _check_ranks(factors: Mapping[Target, Factors], limits: Limits) -> None:
    for (layer, module), found in factors.items():
        if len(found.a) > limits.max_rank:
            raise ConfigError(
                f"layer {layer}'s {module} would have rank {len(found.a)}; at most "
                f"{limits.max_rank} is served; allow an error to lower ranks"
            )
