"""What llm-d's endpoint picker makes of a server's metrics, rule for rule, from its documents.

Of metrics that several series have, the last written counts, by the sample's own time; of the one
that names adapters, whose value is the time it was written, the one of the highest value. Scores
are those of its `lora-affinity-scorer`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")  # Prometheus' old rule, which is the picker's
_SPEC = re.compile(r"\s*(\S+?)\s*(?:\{([^}]*)\})?\s*")
_PAIR = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"?([^",}\s]*)"?\s*')


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The state of a server as the picker sees it."""

    queued: int
    running: int
    kv_usage: float
    active: frozenset[str]
    waiting: frozenset[str]
    max_active: int
    block_size: int
    blocks: int

    def lora_score(self, model: str) -> float:
        """How good it is to send a request for `model` here."""
        if model in self.active:
            return 1.0
        if len(self.active) + len(self.waiting) < self.max_active:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


def read(metrics: str, engine: Mapping[str, Any]) -> Endpoint:
    """Read the text of a scrape by an entry of `engineConfigs`."""
    samples = [
        sample for family in text_string_to_metric_families(metrics) for sample in family.samples
    ]
    cache = _latest(samples, engine["cacheInfoSpec"]).labels
    lora = max(_matching(samples, engine["loraSpec"]), key=lambda sample: sample.value).labels
    return Endpoint(
        queued=int(_latest(samples, engine["queuedRequestsSpec"]).value),
        running=int(_latest(samples, engine["runningRequestsSpec"]).value),
        kv_usage=_latest(samples, engine["kvUsageSpec"]).value,
        active=_names(lora["running_lora_adapters"]),
        waiting=_names(lora["waiting_lora_adapters"]),
        max_active=int(lora["max_lora"]),
        block_size=int(cache[engine["cacheBlockSizeLabelName"]]),
        blocks=int(cache[engine["cacheNumBlocksLabelName"]]),
    )


def _matching(samples: Sequence[Sample], spec: str) -> list[Sample]:
    """The series that a selector, as `name{label=value}`, means."""
    match = _SPEC.fullmatch(spec)
    assert match and _NAME.fullmatch(match[1]), f"{spec!r} is no selector"
    pairs = [_PAIR.fullmatch(pair) for pair in (match[2] or "").split(",") if pair.strip()]
    assert all(pairs), f"{spec!r} has a bad label"
    wanted = {pair[1]: pair[2] for pair in pairs if pair}
    found = [s for s in samples if s.name == match[1] and wanted.items() <= s.labels.items()]
    assert found, f"no metric fits {spec!r}"
    return found


def _latest(samples: Sequence[Sample], spec: str) -> Sample:
    return max(_matching(samples, spec), key=lambda sample: float(sample.timestamp or 0))


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())
