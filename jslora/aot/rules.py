"""What a compiled program must hold to; each broken rule is one line. Host only: no jax."""

from collections.abc import Mapping
from importlib import resources

import yaml

from jslora.aot.cases import Case
from jslora.aot.record import Record
from jslora.calls import SCORE_ROWS

ROWS, TEMPORARIES = 64, 256 * 2**20
"""Bytes that anything but a mixed step may need beside its results, up to so many rows."""

MIXED_TOKENS, MIXED_TEMPORARIES = 2048, 2**30
"""The same for a mixed step, up to so many tokens."""

Allowed = Mapping[str, int]
"""Launches a layer at most, by the name of a case."""

Sent = Mapping[str, float]
"""Collectives, by name and bytes, and how often."""


def committed() -> Allowed:
    """The launches that `launches.yaml` allows."""
    text = resources.files("jslora.aot").joinpath("launches.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def broken(record: Record, allowed: Allowed, case: Case) -> list[str]:
    """The rules that a record of a case breaks, as "rule: figures"."""
    if record.error:
        return [f"does not compile: {record.error}"]
    found = _memory(record) + _registers(record) + _flow(record)
    if record.what == "step":
        found += _launches(record, allowed) + _collectives(record, collectives(case))
    elif record.what == "program":
        program = record.name.removeprefix(case.name).strip()
        found += _collectives(record, ({}, logits_gathered(case, program)))
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


def _collectives(record: Record, expected: tuple[Sent, Sent]) -> list[str]:
    """Exactly those that are expected in a layer, and outside layers."""
    inside, outside = expected
    found = []
    for where, made, wanted in (
        ("a layer", record.collectives, inside),
        (f"a {record.what}", record.collectives_outside, outside),
    ):
        if made != wanted:
            found.append(f"collectives: {made} {where}; expected {wanted}")
    return found


def collectives(case: Case) -> tuple[Sent, Sent]:
    """What a layer, and a step beside its layers, must send.

    The base adds up the outputs of attention and of the feed-forward, and of the embedding, of
    which each device has a part. Fully sharded LoRA adds to that a number for each token, rank and
    module: gathered before B for q, k, v and for gate and up, added up for o and for down. Each of
    several adapters has its ranks rounded up to the devices.
    """
    if case.devices == 1:
        return {}, {}
    tokens, hidden = case.rows if case.phase == "decode" else case.tokens, case.hidden
    inside = {f"all-reduce {tokens * hidden * 4}": 2.0}
    if case.fully:
        ranks = case.max_rank + (case.max_composed - 1) * (case.devices - 1)
        low = tokens * -(-ranks // case.devices) * case.devices * 4
        inside |= {
            f"all-gather {3 * low}": 1.0, f"all-gather {2 * low}": 1.0, f"all-reduce {low}": 2.0
        }  # fmt: skip
    return inside, {f"all-reduce {tokens * hidden * 2}": 1.0}


def logits_gathered(case: Case, program: str) -> Sent:
    """What a program that is no step must send: where there are logits, all of them, once.

    Each device has those of its part of the vocabulary, and all choose alike.
    """
    rows = {"sample": case.rows, "score": SCORE_ROWS}.get(program.partition(" ")[0], 0)
    if case.devices == 1 or not rows:
        return {}
    return {f"all-gather {rows * case.vocabulary * 4}": 1.0}
