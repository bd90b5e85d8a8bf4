"""What a compiled program must hold to; each broken rule is one line. Host only: no jax."""

from collections.abc import Mapping
from importlib import resources

import yaml

from jslora.aot.record import Record

ROWS, TEMPORARIES = 64, 256 * 2**20
"""Bytes that anything but a mixed step may need beside its results, up to so many rows."""

MIXED_TOKENS, MIXED_TEMPORARIES = 2048, 2**30
"""The same for a mixed step, up to so many tokens."""

Allowed = Mapping[str, int]
"""Launches a layer at most, by the name of a case."""


def committed() -> Allowed:
    """The launches that `launches.yaml` allows."""
    text = resources.files("jslora.aot").joinpath("launches.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def broken(record: Record, allowed: Allowed, devices: int = 1) -> list[str]:
    """The rules that a record breaks, as "rule: figures"."""
    if record.error:
        return [f"does not compile: {record.error}"]
    found = _memory(record) + _registers(record) + _flow(record)
    if record.what == "step":
        found += _launches(record, allowed) + _collectives(record, devices)
    if record.what != "kernel" and record.aliased < record.donated:
        found.append(f"not aliased: of {record.donated} bytes donated {record.aliased} are")
    return found


def _memory(record: Record) -> list[str]:
    found = []
    if record.pool_copies:
        found.append(f"pool copied: {', '.join(record.pool_copies)}")
    if record.weight_copies:
        found.append(f"weights copied: {', '.join(record.weight_copies)}")
    if record.phase == "mixed":
        small, most = record.tokens <= MIXED_TOKENS, MIXED_TEMPORARIES
    else:
        small, most = record.rows <= ROWS, TEMPORARIES
    if small and record.temporaries > most:
        found.append(f"temporaries: {record.temporaries} bytes; allowed are {most}")
    return found


def _registers(record: Record) -> list[str]:
    spilled = [
        f"spills: {name} spills {spills} bytes at {registers} registers"
        for name, (registers, spills) in record.assembled.items()
        if spills
    ]
    unread = [name for name in record.launched if name not in record.assembled]
    return spilled + [f"registers not read: {name}" for name in unread]


def _flow(record: Record) -> list[str]:
    return [f"loops outside kernels: {', '.join(record.loops)}"] if record.loops else []


def _launches(record: Record, allowed: Allowed) -> list[str]:
    # In halves, as two layers tell: one launch more in a model of many layers is not one a layer.
    count = round(2 * sum(record.per_layer.values())) / 2
    if record.name not in allowed:
        return [f"launches: {count:g} a layer; launches.yaml has no {record.name!r}"]
    if count > allowed[record.name]:
        return [f"launches: {count:g} a layer; launches.yaml allows {allowed[record.name]}"]
    return []


def _collectives(record: Record, devices: int) -> list[str]:
    """Two sums a layer where it is split over devices, and nothing else."""
    expected = {"all-reduce": 2} if devices > 1 else {}
    if record.collectives != expected:
        return [f"collectives: {record.collectives} a layer; expected {expected}"]
    return []
