"""An adapter's bind report: what a server would say of it, without one. Host only: no jax."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jslora.adapters.layout import lay_out, pack
from jslora.adapters.peft import Limits
from jslora.adapters.registration import Source, make_registration
from jslora.adapters.storages import check_rows
from jslora.adapters.tools.fit import Fitted, total_error
from jslora.adapters.tools.make import read_named
from jslora.adapters.version import stored_digest
from jslora.config import AdaptersSection, Storage
from jslora.model.config import MODULES, ModelConfig
from jslora.request import AdapterInfo
from jslora.split import ONE_DEVICE

PAGE_SIZE = 16


def inspect(
    folder: Path, model: ModelConfig, limits: Limits, dtype: np.dtype, storage: Storage = "full"
) -> AdapterInfo:
    """Read a folder whole and say how it binds and what it takes in a pool of `dtype`.

    Args:
        storage: as `adapters.storage`.

    Raises:
        AdapterRejected: see `read_adapter` and `pack`.
        ConfigError: the model's rows cannot be stored so.
    """
    word_bits = 8 * dtype.itemsize
    check_rows(AdaptersSection(storage=storage), model, ONE_DEVICE, word_bits)
    adapter = read_named(folder, model, limits)
    outline, page = adapter.outline(model), ONE_DEVICE.page_numbers(model, PAGE_SIZE)
    layout = lay_out(outline.rank, outline.scale, model, page, storage=storage, word_bits=word_bits)
    packed = pack(adapter, model, page, dtype, storage=storage)
    source = Source(folder, folder.parent, outline, storage)
    info = make_registration(folder.name, source, layout, None, outline.base_model or "").info
    return replace(
        info,
        digest=stored_digest(adapter.digest, storage),
        bytes_device=packed.blob.nbytes,
        output_error=packed.error,
        path=str(folder),
    )


def report_text(info: AdapterInfo) -> str:
    """A report for people."""
    rows = [
        ("trained for", info.base_model or "(not said)"),
        ("digest", info.digest[:16]),
        ("tensors", f"{info.bytes:,} bytes, in {info.layers} layers"),
        ("on a device", f"{info.bytes_device:,} bytes; pages of {PAGE_SIZE} tokens: {info.pages}"),
        ("unused in these", f"{info.padding:.1%}"),
        *([("stored as", stored)] if (stored := _stored(info)) else []),
        *(
            (module, f"rank {_span(low, high)}, scale {scale:.6g}")
            for module, (low, high, scale) in info.modules.items()
        ),
        *(("warning", warning) for warning in info.warnings),
    ]
    return "\n".join([info.name, *(f"  {name:<16}{text}" for name, text in rows)])


def _stored(info: AdapterInfo) -> str:
    if info.storage == "full":
        return ""
    return f"{info.storage}, which changes outputs by {info.output_error or 0:.2%}"


def changes_text(layers: Sequence[Fitted]) -> str:
    """What became of an adapter's layers, by module, for people."""
    lines = [f"{'module':<12}{'layers':>7}{'rank':>9}{'now':>9}{'error':>11}{'at most':>11}"]
    for module in MODULES:
        found = [layer for layer in layers if layer.module == module]
        if found:
            before, now = [f.rank_before for f in found], [f.rank for f in found]
            lines.append(
                f"{module:<12}{len(found):>7}{_span(min(before), max(before)):>9}"
                f"{_span(min(now), max(now)) if max(now) else '-':>9}"
                f"{total_error(found):>11.2e}{max(f.error for f in found):>11.2e}"
            )
    lines.append(f"{'all':<12}{len(layers):>7}{'':>18}{total_error(layers):>11.2e}")
    return "\n".join(lines)


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
