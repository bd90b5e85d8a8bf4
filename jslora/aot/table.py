"""Records as a table for people. Host only: no jax."""

from collections.abc import Sequence

from jslora.aot.adapter_bytes import MODEL, RANK, AdapterBytes
from jslora.aot.record import Record

HEAD = """\
Compiled for {device} with jax {jax}; nothing was executed. The launch table is structural: products
are library calls, nothing was autotuned, sorts are without CUB; on the device counts may differ.
Launches are those of one layer: all, then products, kernels of ours, fusions, copies, collectives.
MB a layer is what instructions read and write as far as their shapes tell, and the floor the fewest
they could, pages read by kernels left out of both; registers are the most of any kernel, and of
ours by name. Bytes of a collective are what one puts out on a device; an adapter's share is of what
one device alone would hold."""

_KINDS = ("product", "kernel", "fusion", "copy", "collective")
_STEP = (
    "step", "launches", "prod", "kern", "fus", "copy", "coll", "outside", "MB/layer", "floor",
    "temp MB", "pool copies", "weight copies", "spills", "regs", "seconds",
)  # fmt: skip
_ALONE = (
    "kernel or program", "launches", "temp MB", "pool copies", "weight copies", "spills",
    "registers", "seconds",
)  # fmt: skip

_COLLECTIVES = ("step or program", "collective", "bytes", "times", "in a")
_ADAPTERS = ("adapter", "devices", "pages", "MB each", "share")
_TEXT = {
    "step", "step or program", "kernel or program", "registers", "collective", "in a", "adapter",
}  # fmt: skip


def render(
    records: Sequence[Record], adapters: Sequence[AdapterBytes], device: str, jax: str
) -> str:
    """All of them, steps apart from what stands alone."""
    steps = [r for r in records if r.what == "step"]
    alone = [r for r in records if r.what != "step"]
    parts = [HEAD.format(device=device, jax=jax)]
    if steps:
        parts.append(_table(_STEP, [_step(r) for r in steps]))
    if met := [r for r in records if r.collectives or r.collectives_outside]:
        parts.append(_table(_COLLECTIVES, [line for r in met for line in _collectives(r)]))
    if alone:
        parts.append(_table(_ALONE, [_alone(r) for r in alone]))
    parts.append(_table(_ADAPTERS, [_adapter(size) for size in adapters]))
    return "\n\n".join(parts)


def _collectives(r: Record) -> list[list[str]]:
    return [
        [r.name, name, f"{int(size):,}", f"{count:g}", where]
        for where, found in (("layer", r.collectives), (r.what, r.collectives_outside))
        for (name, size), count in ((key.split(), count) for key, count in sorted(found.items()))
    ]


def _adapter(size: AdapterBytes) -> list[str]:
    return [
        f"{MODEL}, rank {RANK}, all modules{', fully sharded' * size.split.fully}",
        str(size.split.devices), str(size.pages), f"{size.bytes / 1e6:.1f}", f"{size.share:.3f}",
    ]  # fmt: skip


def _step(r: Record) -> list[str]:
    if r.error:
        return [r.name, "failed", *[""] * (len(_STEP) - 2)]
    kinds = [sum(n for k, n in r.per_layer.items() if k.startswith(kind)) for kind in _KINDS]
    return [
        r.name, f"{sum(r.per_layer.values()):.4g}", *(f"{n:.4g}" for n in kinds),
        f"{r.outside:.4g}",
        f"{r.bytes_per_layer / 1e6:.1f}", f"{r.floor_per_layer / 1e6:.1f}",
        f"{r.temporaries / 1e6:.1f}",
        str(len(r.pool_copies)), str(len(r.weight_copies)), _spills(r), str(r.most_registers),
        f"{r.seconds:.1f}",
    ]  # fmt: skip


def _alone(r: Record) -> list[str]:
    if r.error:
        return [r.name, "failed", *[""] * (len(_ALONE) - 2)]
    registers = [f"{name} {count}" for name, (count, _) in sorted(r.assembled.items())]
    return [
        r.name, f"{sum(r.per_layer.values()) + r.outside:g}", f"{r.temporaries / 1e6:.1f}",
        str(len(r.pool_copies)), str(len(r.weight_copies)), _spills(r), ", ".join(registers),
        f"{r.seconds:.1f}",
    ]  # fmt: skip


def _spills(r: Record) -> str:
    return str(sum(spills for _, spills in r.assembled.values()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, names to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    text = lambda name: name in _TEXT  # noqa: E731
    lines = [
        "  ".join(
            cell.ljust(width) if text(name) else cell.rjust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)
