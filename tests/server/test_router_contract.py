"""Routers send requests by our metrics: what the endpoint picker, set up as we ship it, makes of
what a server says while requests wait, run and have ended."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from picker import Endpoint, read
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Server, until

from jslora.config import parse
from jslora.request import MAX_NAMED, Stats
from jslora.server.metrics import EngineMetrics

ROUTER = Path(__file__).parents[2] / "configs" / "k8s" / "router.yaml"
NAMES = [f"adapter-{n}" for n in range(6)]


def engine_config() -> dict[str, Any]:
    """The entry for this server in the picker's configuration."""
    maps = [o for o in yaml.safe_load_all(ROUTER.read_text()) if o["kind"] == "ConfigMap"]
    (text,) = (text for found in maps for text in found["data"].values())
    plugins = {plugin["type"]: plugin for plugin in yaml.safe_load(text)["plugins"]}
    parameters = plugins["core-metrics-extractor"]["parameters"]
    (engine,) = parameters["engineConfigs"]
    assert engine["name"] == parameters["defaultEngine"] == "jslora"
    return engine


def look(client: httpx.Client) -> Endpoint:
    return read(client.get("/metrics").text, engine_config())


@contextlib.contextmanager
def asking(client: httpx.Client, model: str, prompt: str) -> Iterator[None]:
    """A request that runs, or waits, as long as the block."""
    body = {"model": model, "prompt": prompt, "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        yield


def test_a_picker_sees_where_adapters_are(start: Callable[..., Server]) -> None:
    changes = {"adapters": {"preload": NAMES}, "scheduler": {"max_running": 3}}
    server = start({**changes, "server": {"keep_alive_seconds": 0.1}})
    first, second, third, fourth, *_ = NAMES
    with httpx.Client(base_url=server.url, timeout=20) as client:
        empty = look(client)
        assert (empty.queued, empty.running, empty.active, empty.waiting) == (0, 0, set(), set())
        assert (empty.max_active, empty.block_size, empty.blocks) == (3, 16, 1024)
        assert {empty.lora_score(name) for name in NAMES} == {0.8}

        with asking(client, first, "slow"), asking(client, second, "sleep"):
            until(lambda: look(client).active == {first} and look(client).waiting == {second})
            seen = look(client)
            assert (seen.queued, 0 < seen.kv_usage < 1) == (1, True)
            assert [seen.lora_score(n) for n in (first, second, third)] == [1.0, 0.8, 0.8]
            with asking(client, third, "sleep"):
                until(lambda: len(look(client).waiting) == 2)
                full = look(client)
                scores = [full.lora_score(n) for n in (first, second, third, fourth, "base")]
                assert scores == [1.0, 0.6, 0.6, 0.0, 0.0]

        # They ran, so they are on the device, and there is room for another.
        until(lambda: look(client).running == 0)
        for name in (third, fourth):
            body = {"model": name, "prompt": "hi", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == 200
        until(lambda: fourth in look(client).active)
        rest = look(client)
        assert rest.active == {third, fourth} and not rest.waiting
        assert [rest.lora_score(n) for n in (fourth, first)] == [1.0, 0.8]


def test_an_engine_that_is_away_has_nothing_ready(start: Callable[..., Server]) -> None:
    server = start({"adapters": {"preload": NAMES}}, "--wait", "2")
    with httpx.Client(base_url=server.url, timeout=20) as client:
        client.post("/v1/completions", json={"model": NAMES[0], "prompt": "hi", "max_tokens": 1})
        until(lambda: look(client).active == {NAMES[0]})
        server.engine().kill()
        until(lambda: client.get("/health").status_code == 503)
        assert look(client).active == set()


def test_the_newest_series_counts() -> None:
    def series(adapters: str, time: float) -> str:
        labels = f'max_lora="4",running_lora_adapters="{adapters}",waiting_lora_adapters=""'
        return f"jslora:lora_requests_info{{{labels}}} {time}\n"

    others = "".join(
        f"jslora:{name} 1\n"
        for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    )
    others += 'jslora:cache_config_info{page_size="16",num_pages="9"} 1\n'
    text = others + series("old", 10) + series("new, newer", 30) + series("stale", 20)
    assert read(text, engine_config()).active == {"new", "newer"}


# What the metrics say of a state ------------------------------------------------------------------


class Client:
    """As much of an `EngineClient` as the metrics look at."""

    info = None
    restarts = 0

    def __init__(self, stats: Stats, state: str = "ready") -> None:
        self.stats, self.state = stats, state


def labels(stats: Stats, limit: int) -> dict[str, str]:
    """Those of the series for routers."""
    settings = parse({"model": {"source": "m"}, "scheduler": {"max_running": limit}})
    metrics = EngineMetrics(Client(stats), settings)  # type: ignore[arg-type]
    families = {family.name: family for family in metrics.collect()}
    return families["jslora:lora_requests_info"].samples[0].labels


@given(
    st.integers(1, 600),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_idle_adapters_never_hide_that_there_is_room(
    limit: int, running: int, waiting: int, idle: int
) -> None:
    stats = Stats(
        running_adapters=tuple(f"r{n}" for n in range(running)),
        waiting_adapters=tuple(f"w{n}" for n in range(waiting)),
        idle_adapters=tuple(f"i{n}" for n in range(idle)),
    )
    said = labels(stats, limit)
    active = [name for name in said["running_lora_adapters"].split(",") if name]
    waits = [name for name in said["waiting_lora_adapters"].split(",") if name]
    runs, rest = min(running, MAX_NAMED), min(waiting, MAX_NAMED)
    assert tuple(active[:runs]) == stats.running_adapters[:MAX_NAMED]
    assert tuple(waits) == stats.waiting_adapters[:MAX_NAMED]
    assert (len(active) + rest < limit) == (runs + rest < limit)
    assert tuple(active[runs:]) == stats.idle_adapters[: len(active) - runs]
    assert len(active) <= MAX_NAMED
    if runs + rest + idle < min(limit, MAX_NAMED):
        assert len(active) == runs + idle, "there was room to tell of all"


def test_what_may_be_had_is_not_in_use() -> None:
    stats = Stats(pages_total=100, pages_free=10, pages_cached=20, pages_adapters=50, pages_idle=45)
    families = EngineMetrics(Client(stats), parse({"model": {"source": "m"}}))  # type: ignore[arg-type]
    values = {f.name: f.samples[0].value for f in families.collect() if f.samples}
    assert values["jslora:kv_cache_usage_perc"] == pytest.approx(0.25)
    assert values["jslora:lora_pages"] == 50 and values["jslora:lora_pages_idle"] == 45


def test_metrics_are_what_old_parsers_read(http: httpx.Client) -> None:
    """The picker refuses a whole scrape for one name outside Prometheus' old rule."""
    text = http.get("/metrics").text
    assert "# EOF" not in text  # that would be OpenMetrics
    for line in text.splitlines():
        assert line.startswith(("# HELP jslora:", "# TYPE jslora:", "jslora:")), line
    assert all(f.name.startswith("jslora:") for f in text_string_to_metric_families(text))
