"""Prometheus metrics: what the front end measures itself, and the engine's last Pulse.

Names follow vLLM's with the prefix `jslora:`, so that its dashboards and routers are easily
adapted. The number of series is bounded: adapters are named by the one series of
`lora_requests_info`, whose value is the time of the update, and where requests wait longest for one
(at most 16; for several at once, by their names joined by "+"); tenants are those of the
configuration and at most 64 others. The engine's counters start again at zero when it is restarted,
which Prometheus' `rate` allows for.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jslora.config import EngineConfig
from jslora.errors import JsloraError, Overloaded, RateLimited, TooLate, Unavailable
from jslora.request import MAX_NAMED, Stats
from jslora.server.client import EngineClient

MAX_LISTED = 64
MAX_OLDEST = 16
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
          40, 80, 160)  # fmt: skip
_BETWEEN = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
            0.75, 1, 2.5, 5)  # fmt: skip
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

# Exported name (of the form of vLLM's where it has one), field of Stats, help.
_GAUGES = (
    ("num_requests_running", "running", "Sequences in the running batch."),
    ("num_requests_waiting", "waiting", "Sequences that wait to run."),
    (
        "oldest_waiting_seconds",
        "oldest_wait",
        "Seconds that the longest waiting sequence has waited for its first token.",
    ),
    ("pages_total", "pages_total", "Pages of the pool."),
    ("pages_free", "pages_free", "Pages that hold nothing."),
    ("pages_kv", "pages_kv", "Pages that hold KV cache of sequences."),
    ("pages_cached", "pages_cached", "Pages that only the prefix cache holds."),
    ("lora_pages", "pages_adapters", "Pages that hold adapter weights."),
    ("lora_pages_idle", "pages_idle", "Of those, pages of adapters that nothing uses."),
    ("lora_host_bytes", "host_bytes", "Bytes of packed adapters in host memory."),
    ("lora_adapters_registered", "adapters_registered", "Adapters that may be asked for."),
    ("lora_adapters_host", "adapters_host", "Adapters packed in host memory."),
    ("lora_adapters_device", "adapters_device", "Adapters on the device."),
)
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens processed."),
    ("generation_tokens", "generated_tokens", "Tokens generated."),
    (
        "prefix_cache_queries",
        "prefix_asked_tokens",
        "Prompt tokens looked for in the prefix cache.",
    ),
    ("prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    ("prefix_cache_evictions", "prefix_evictions", "Pages the prefix cache gave up."),
    ("num_preemptions", "preemptions", "Sequences preempted for lack of pages."),
    ("too_late", "too_late", "Sequences given up because their first token would come too late."),
    ("rate_limited", "rate_limited", "Sequences refused by a quota or a rate."),
    ("corrupted_requests", "corrupt_requests", "Sequences ended because logits were not finite."),
    ("steps", "steps", "Steps of the engine."),
    ("step_seconds", "step_seconds", "Seconds spent in steps."),
    ("recoveries", "recoveries", "Times the pool was lost and made anew."),
    ("page_ledger_errors", "ledger_errors", "Failed checks of the page ledger; must stay 0."),
    ("compilations", "compilations", "Programs compiled; must not grow after start-up."),
    ("compile_seconds", "compile_seconds", "Seconds spent compiling."),
    ("lora_loads", "adapter_loads", "Adapters brought to the device."),
    ("lora_evictions", "adapter_evictions", "Adapters evicted from the device."),
    ("lora_load_failures", "adapter_failures", "Adapters that failed to load."),
)
# The same of TenantStats, by tenant.
_TENANT_GAUGES = (
    ("tenant_running", "running", "Sequences in the running batch."),
    ("tenant_waiting", "waiting", "Sequences that wait to run."),
    (
        "tenant_oldest_waiting_seconds",
        "oldest_wait",
        "Seconds that the tenant's longest waiting sequence has waited for its first token.",
    ),
)
_REJECTIONS = {
    Overloaded: "queue_full",
    RateLimited: "rate_limited",
    TooLate: "too_late",
    Unavailable: "unavailable",
}


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, client: EngineClient, config: EngineConfig) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineMetrics(client, config))
        model = config.model.served_name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"jslora:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
            ).labels(model)

        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"jslora:{name}", text, ["model_name", label], registry=self._registry)

        self.first_token = histogram("time_to_first_token_seconds", "To the first token.", _FIRST)
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _BETWEEN
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean of a sequence's later tokens.", _BETWEEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "To the last token.", _WHOLE)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt lengths.", _TOKENS)
        self.generated = histogram("request_generation_tokens", "Output lengths.", _TOKENS)
        self._model = model
        self._finished = counter("request_success", "Sequences that ended.", "finished_reason")
        self._rejected = counter("admission_rejections", "Requests not admitted.", "reason")

    def finished(self, reason: str) -> None:
        """Count an ended sequence: stop, length, abort (by the client), rejected or error."""
        self._finished.labels(self._model, reason).inc()

    def rejected(self, error: JsloraError) -> None:
        """Count a request that was not admitted, if that is what the error says."""
        for kind, reason in _REJECTIONS.items():
            if isinstance(error, kind):
                self._rejected.labels(self._model, reason).inc()

    def render(self) -> bytes:
        """The text a scrape gets."""
        return generate_latest(self._registry)


class SequenceTimer:
    """The times of one sequence, from `began` (of `time.perf_counter`) to `stop`.

    Attributes:
        reason: why it ended; None while it runs.
        seconds: from start to end.
    """

    def __init__(self, metrics: Metrics, prompt_tokens: int, began: float) -> None:
        self.reason: str | None = None
        self.seconds = 0.0
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._started = self._last = began
        self._first = 0.0

    def tokens(self, total: int) -> None:
        """Note that `total` tokens have been generated by now."""
        new = total - self._tokens
        if new <= 0:
            return
        now = time.perf_counter()
        if self._tokens == 0:
            self._first = now
            self._metrics.first_token.observe(now - self._started)
        else:
            self._metrics.between_tokens.observe((now - self._last) / new)
        self._tokens, self._last = total, now

    def stop(self, reason: str) -> None:
        """Note the end; only the first call counts.

        What was rejected had no service, so its times would only embellish those of the rest.
        """
        if self.reason is not None:
            return
        self.reason = reason
        self.seconds = time.perf_counter() - self._started
        metrics = self._metrics
        metrics.finished(reason)
        if reason == "rejected":
            return
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.generated.observe(self._tokens)
        metrics.whole.observe(self.seconds)
        if self._tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (self._tokens - 1))


class EngineMetrics(Collector):
    """The engine's state at the time of a scrape."""

    def __init__(self, client: EngineClient, config: EngineConfig) -> None:
        self._client = client
        self._config = config
        self._tenants = {key.tenant for key in (config.auth.keys or {}).values()}

    def collect(self) -> Iterator[Metric]:
        client, stats = self._client, self._client.stats
        for name, field, text in _GAUGES:
            yield self._gauge(name, text, getattr(stats, field))
        for name, field, text in _COUNTERS:
            yield self._counter(name, text, getattr(stats, field))
        yield self._counter("engine_restarts", "Times the engine was restarted.", client.restarts)
        yield self._gauge("engine_up", "1 while the engine serves.", client.state == "ready")
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the pool in use, 0 to 1; what a request could have is not.",
            _share_in_use(stats),
        )
        yield self._info()
        yield self._load_seconds(stats)
        yield self._adapters(stats)
        yield from self._by_tenant(stats)
        yield self._oldest_adapters(stats)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"jslora:{name}", text, labels=["model_name"])
        family.add_metric([self._config.model.served_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"jslora:{name}", text, labels=["model_name"])
        family.add_metric([self._config.model.served_name], value)
        return family

    def _info(self) -> Metric:
        labels = ["model_name", "page_size", "num_pages"]
        family = GaugeMetricFamily("jslora:cache_config_info", "The pool's shape.", labels=labels)
        if (info := self._client.info) is not None:
            name = self._config.model.served_name
            family.add_metric([name, str(info.page_size), str(info.pages)], 1)
        return family

    def _load_seconds(self, stats: Stats) -> Metric:
        labels = ["model_name", "stage"]
        family = CounterMetricFamily(
            "jslora:lora_load_seconds", "Seconds spent loading adapters, by stage.", labels=labels
        )
        for stage, seconds in sorted(stats.adapter_seconds.items()):
            family.add_metric([self._config.model.served_name, stage], seconds)
        return family

    def _by_tenant(self, stats: Stats) -> Iterator[Metric]:
        labels, model = ["model_name", "tenant"], self._config.model.served_name
        others = sorted(
            stats.tenants.keys() - self._tenants,
            key=lambda name: (-stats.tenants[name].service, name),
        )
        shown = sorted({*others[:MAX_LISTED], *(stats.tenants.keys() & self._tenants)})
        for name, field, text in _TENANT_GAUGES:
            gauge = GaugeMetricFamily(f"jslora:{name}", text, labels=labels)
            for tenant in shown:
                gauge.add_metric([model, tenant], getattr(stats.tenants[tenant], field))
            yield gauge
        service = CounterMetricFamily(
            "jslora:tenant_service_tokens", "Tokens computed, weighted as for fair shares.",
            labels=labels,
        )  # fmt: skip
        for tenant in shown:
            service.add_metric([model, tenant], stats.tenants[tenant].service)
        yield service

    def _oldest_adapters(self, stats: Stats) -> Metric:
        model = self._config.model.served_name
        gauge = GaugeMetricFamily(
            "jslora:adapter_oldest_waiting_seconds",
            "Seconds that an adapter's longest waiting sequence has waited, where it is longest.",
            labels=["model_name", "adapter"],
        )
        for adapter, seconds in stats.oldest_adapters[:MAX_OLDEST]:
            gauge.add_metric([model, adapter or model], seconds)
        return gauge

    def _adapters(self, stats: Stats) -> Metric:
        """What routers send requests by; nothing is ready while the engine is not."""
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily(
            "jslora:lora_requests_info",
            "Adapters that are ready, and that are waited for; the value is the time.",
            labels=labels,
        )
        limit = self._config.scheduler.max_running
        ready, waiting = _ready_and_waiting(
            stats if self._client.state == "ready" else Stats(), limit
        )
        family.add_metric([str(limit), ",".join(ready), ",".join(waiting)], time.time())
        return family


def _share_in_use(stats: Stats) -> float:
    """Of the pool; cached pages and those of idle adapters go as soon as others are in need."""
    unused = stats.pages_free + stats.pages_cached + stats.pages_idle
    return max(0.0, 1 - unused / stats.pages_total) if stats.pages_total else 0.0


def _ready_and_waiting(stats: Stats, limit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adapters that run or lie ready on the device, and that are waited for.

    A router sees room for one more adapter where both are fewer than `limit`. Idle adapters give
    way, so they are told of only as far as they do not hide that there is room.
    """
    running, waiting = stats.running_adapters[:MAX_NAMED], stats.waiting_adapters[:MAX_NAMED]
    spare = min(limit, MAX_NAMED) - 1 - len(running) - len(waiting)
    return running + stats.idle_adapters[: max(0, spare)], waiting
