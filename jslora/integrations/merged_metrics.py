"""Metrics of several replicas as one text: every series gets the label `replica`."""

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry


class Merged(Collector):
    """The families of Prometheus texts, by name of the replica."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._families: dict[str, Metric] = {}
        for replica, text in texts.items():
            for family in text_string_to_metric_families(text):
                mine = self._families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    mine.add_sample(
                        sample.name, {**sample.labels, "replica": replica}, sample.value
                    )

    def collect(self) -> Iterator[Metric]:
        """The families, in the order in which the first replica has them."""
        yield from self._families.values()


def merge(texts: Mapping[str, str]) -> bytes:
    """The text of all."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Merged(texts))
    return generate_latest(registry)
