"""Priorities, times and limits as clients and operators see them, with a fake engine behind."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from server_harness import BASE, HERE, SHAPE, Server, metric, until

from jslora import config, wire
from jslora.config import Key
from jslora.errors import InvalidRequest
from jslora.request import EngineInfo, ErrorInfo, Request, SamplingParams, Stats, TenantStats
from jslora.server import frontend
from jslora.server.metrics import MAX_LISTED, MAX_OLDEST, Metrics
from jslora.server.names import Names
from jslora.server.prepare import chat_job, completion_job
from jslora.server.protocol import ChatBody, CompletionBody

KEYS = {"alice's": {"tenant": "alice"}, "bob's": {"tenant": "bob", "adapters": ["sql"]}}
FAIR = {
    "policy": ["priority", "fair_tenants", "slo"],
    "tenants": {"alice": {"share": 3}, "bob": {"priority": 2, "ttft_slo": 30}},
}


@pytest.fixture(scope="module")
def fair() -> Iterator[Server]:
    """A server with two tenants; it must not log anything but its report."""
    changes = {"auth": {"keys": KEYS}, "scheduler": FAIR, "server": {"keep_alive_seconds": 0.3}}
    server = Server(changes)
    yield server
    code, errors = server.stop()
    assert code == 0, errors
    assert not {"error", "warning", "critical", "Traceback"} & {*errors.split()}, errors


@pytest.fixture
def client(fair: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fair.url}/v1", api_key="alice's", max_retries=0) as client:
        yield client


@pytest.fixture
def scrape(fair: Server) -> Iterator[Callable[..., float]]:
    """The value of a metric."""
    with httpx.Client(base_url=fair.url, timeout=10) as client:
        yield lambda name, **labels: metric(client, f"jslora:{name}", **labels)


# The configuration we ship ------------------------------------------------------------------------

SECRETS = {"SUPPORT_KEY": "sk-support", "BATCH_KEY": "sk-batch", "ADMIN_KEY": "sk-admin"}
SMALL = "model.architecture=" + json.dumps(SHAPE | {"max_position_embeddings": 2048})


def serve(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/serve.py with configs/fair.yaml."""
    program = [sys.executable, "scripts/serve.py", "--config", "configs/fair.yaml", *arguments]
    env = {**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run(
        program, capture_output=True, text=True, timeout=60, cwd=HERE.parents[1], env=env
    )


def test_the_fair_configuration_passes_the_check() -> None:
    """With a model that needs no download; its memory plan comes from an engine process."""
    sets = ["model.source=dummy", SMALL, "pool.pages=300"]
    done = serve("--check", *(word for text in sets for word in ("--set", text)), **SECRETS)
    assert done.returncode == 0 and "300 pages of 16 tokens" in done.stdout, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())


def test_the_fair_configuration_needs_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCH_KEY", raising=False)
    done = serve("--check", SUPPORT_KEY="sk-support", ADMIN_KEY="sk-admin")
    assert done.returncode == 2
    assert done.stderr == "error: auth: the environment variable BATCH_KEY is not set\n"


def test_the_effective_configuration_can_be_read_again() -> None:
    printed = yaml.safe_load(serve("--print-config", **SECRETS).stdout)
    assert printed["scheduler"]["tenants"]["batch"]["ttft_slo"] == 600
    assert config.parse(printed).scheduler.policy == ["fair_tenants", "cluster", "slo"]


# What clients send --------------------------------------------------------------------------------


@pytest.mark.parametrize("wishes", [{"priority": 0}, {"priority": 100, "ttft_slo": 3600}], ids=str)
def test_wishes_that_are_heeded_are_accepted(client: openai.OpenAI, wishes: dict) -> None:
    answer = client.completions.create(model="sql", prompt="hi", max_tokens=3, extra_body=wishes)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"priority": -1}, "priority"),
        ({"priority": 101}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"ttft_slo": 0}, "ttft_slo"),
        ({"ttft_slo": -1}, "ttft_slo"),
        ({"ttft_slo": 3601}, "ttft_slo"),
        ({"ttft_slo": "6"}, "ttft_slo"),
        ({"ttft_slo": True}, "ttft_slo"),
    ],
    ids=str,
)
def test_wishes_out_of_range_are_named(client: openai.OpenAI, wishes: dict, param: str) -> None:
    for create, prompt in (
        (client.completions.create, {"prompt": "hi"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            create(model="base", **prompt, extra_body=wishes)
        assert error.value.param == param


def test_wishes_that_the_policy_ignores_are_refused(http: httpx.Client) -> None:
    """The shared server's policy is fcfs."""
    body = {"model": "base", "prompt": "hi", "max_tokens": 2}
    assert http.post("/v1/completions", json=body | {"priority": 0}).is_success
    for name, value in (("priority", 1), ("ttft_slo", 5)):
        refused = http.post("/v1/completions", json=body | {name: value})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, name)
        assert "policy of this server has no" in error["message"]


def prepare(scheduler: dict[str, Any], body: CompletionBody | ChatBody) -> tuple[Request, ...]:
    """The sequences that a body of bob's becomes."""
    info = EngineInfo(
        model_name="base", max_model_len=256, vocab_size=300, eos_token_ids=(2,), page_size=16,
        pages=9, fingerprint="f", device="d",
    )  # fmt: skip

    async def render(*_: Any) -> list[int]:
        return [1, 2]

    service: Any = SimpleNamespace(
        config=config.parse({**BASE, "scheduler": scheduler}),
        engine=lambda: info,
        names=Names("base", SimpleNamespace(known={})),  # type: ignore[arg-type]
        render=render,
    )
    make = completion_job if isinstance(body, CompletionBody) else chat_job
    return asyncio.run(make(service, body, Key(tenant="bob"))).requests  # type: ignore[arg-type]


def test_the_engine_is_told_who_asks_and_what_for() -> None:
    wishes = {"priority": 7, "ttft_slo": 2, "model": "base", "n": 2}
    chat = ChatBody.model_validate({"messages": [{"role": "user", "content": "hi"}], **wishes})
    plain = CompletionBody.model_validate({"prompt": [[1], [2]], **wishes})
    for body, count in ((chat, 2), (plain, 4)):
        requests = prepare(FAIR, body)
        assert len(requests) == count
        assert {(r.tenant, r.priority, r.ttft_slo) for r in requests} == {("bob", 7, 2.0)}
        with pytest.raises(InvalidRequest, match="priority is 7, but the policy"):
            prepare({}, body)
    (plain_wish,) = prepare({}, CompletionBody(model="base", prompt=[1]))
    assert (plain_wish.priority, plain_wish.ttft_slo) == (0, None)


# What clients are told ----------------------------------------------------------------------------

REFUSALS = [
    ("quota", openai.RateLimitError, 429, "rate_limit_error", "7"),
    ("belated", openai.InternalServerError, 503, "too_late_error", "3"),
]


def count(scrape: Callable[..., float], name: str, **labels: str) -> float:
    """The value of a counter, which has no series before it counts."""
    try:
        return scrape(name, **labels)
    except AssertionError:
        return 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("word", "kind", "status", "name", "seconds"), REFUSALS)
def test_a_refusal_is_a_status_with_a_time_to_wait(
    client: openai.OpenAI, scrape: Callable[..., float], stream: bool, word: str,
    kind: type[openai.APIStatusError], status: int, name: str, seconds: str,
) -> None:  # fmt: skip
    reason = {"quota": "rate_limited", "belated": "too_late"}[word]

    def rejections() -> tuple[float, float]:
        return (
            count(scrape, "admission_rejections_total", reason=reason),
            count(scrape, "request_success_total", finished_reason="rejected"),
        )

    def timed() -> float:
        return scrape("e2e_request_latency_seconds_count")

    before, times = rejections(), timed()
    with pytest.raises(kind) as error:
        client.completions.create(model="sql", prompt=f"{word} {stream}", stream=stream)
    assert error.value.status_code == status and error.value.type == name
    assert error.value.response.headers["retry-after"] == seconds
    assert "x-should-retry" not in error.value.response.headers
    assert rejections() == (before[0] + 1, before[1] + 1)
    assert timed() == times, "what was refused has no latency"
    until(lambda: scrape(f"{reason}_total") >= 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("word", "kind", "status", "name", "seconds"), REFUSALS)
def test_openais_client_comes_back_when_it_was_told_to(
    fair: Server, monkeypatch: pytest.MonkeyPatch, stream: bool, word: str, kind: type,
    status: int, name: str, seconds: str,
) -> None:  # fmt: skip
    slept: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=slept.append))
    with openai.OpenAI(base_url=f"{fair.url}/v1", api_key="alice's", max_retries=1) as client:
        answer = client.completions.create(
            model="sql", prompt=f"{word} again {stream}", max_tokens=4, stream=stream
        )
        chunks = list(answer) if stream else [answer]
    assert slept == [float(seconds)]
    assert len("".join(chunk.choices[0].text for chunk in chunks)) == 4


def test_a_stream_that_was_kept_alive_ends_with_the_refusal(
    fair: Server, client: openai.OpenAI, scrape: Callable[..., float]
) -> None:
    """The status line went out with the first keep-alive, so the error is a frame."""
    body = {"model": "sql", "prompt": "belated after a sleep", "stream": True}
    key = {"authorization": "Bearer alice's"}
    with httpx.stream("POST", f"{fair.url}/v1/completions", json=body, headers=key) as response:
        text = response.read().decode()
    assert response.status_code == 200 and text.startswith(": keep-alive")
    assert '"type":"too_late_error"' in text and text.endswith("data: [DONE]\n\n")
    before = scrape("admission_rejections_total", reason="too_late")
    with pytest.raises(openai.APIError, match="no token in time"):
        list(client.completions.create(**body))
    until(lambda: scrape("admission_rejections_total", reason="too_late") == before + 1)


def test_the_refusals_are_documented(client: openai.OpenAI) -> None:
    with httpx.Client(headers={"authorization": "Bearer alice's"}) as reader:
        document = reader.get(f"{client.base_url}".replace("/v1/", "/openapi.json")).json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"429", "503"} <= responses.keys()
        for status in ("429", "503"):
            assert responses[status]["headers"]["Retry-After"]["schema"]["type"] == "integer"
    assert "429" not in document["paths"]["/tokenize"]["post"]["responses"]
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    (priority,) = (option for option in fields["priority"]["anyOf"] if option["type"] == "integer")
    assert (priority["minimum"], priority["maximum"]) == (0, 100)
    (slo,) = (option for option in fields["ttft_slo"]["anyOf"] if option["type"] == "number")
    assert (slo["exclusiveMinimum"], slo["maximum"]) == (0, 3600)


# What operators see -------------------------------------------------------------------------------


def test_who_waits_is_told_by_tenant_and_adapter(
    fair: Server, scrape: Callable[..., float]
) -> None:
    def ask(key: str, model: str) -> None:
        body = {"model": model, "prompt": "sleep a while", "max_tokens": 2}
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(f"{fair.url}/v1/completions", json=body, headers=headers).is_success

    asks = [("alice's", "sql"), ("alice's", "base"), ("bob's", "sql")]
    threads = [threading.Thread(target=ask, args=a) for a in asks]
    for thread in threads:
        thread.start()
    try:
        until(lambda: scrape("tenant_waiting", tenant="alice") == 2)
        until(lambda: scrape("tenant_waiting", tenant="bob") == 1)
        until(lambda: scrape("oldest_waiting_seconds") > 0.5)
        for tenant in ("alice", "bob"):
            assert scrape("tenant_oldest_waiting_seconds", tenant=tenant) > 0.3
        for adapter in ("sql", "base"):
            assert scrape("adapter_oldest_waiting_seconds", adapter=adapter) > 0.3
    finally:
        for thread in threads:
            thread.join()
    until(lambda: scrape("tenant_waiting", tenant="alice") == 0)
    assert scrape("tenant_running", tenant="bob") == scrape("oldest_waiting_seconds") == 0
    assert scrape("tenant_service_tokens_total", tenant="bob") == 4
    with pytest.raises(AssertionError, match="no metric"):
        scrape("adapter_oldest_waiting_seconds")


def rendered(stats: Stats, **sections: Any) -> dict[str, dict[tuple[str, ...], float]]:
    """Each metric's series, by the values of their labels but the model's."""
    client: Any = SimpleNamespace(stats=stats, restarts=0, state="ready", info=None)
    text = Metrics(client, config.parse({**BASE, **sections})).render().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: v for name, v in sample.labels.items() if name != "model_name"}
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def test_however_many_tenants_there_are_the_series_are_bounded() -> None:
    tenants = {
        f"t{i}": TenantStats(waiting=i, running=1, oldest_wait=i / 2, service=i) for i in range(999)
    }
    oldest = tuple((f"a{i}", 999.0 - i) for i in range(99))
    found = rendered(
        Stats(tenants=tenants, oldest_adapters=oldest, oldest_wait=999.0),
        auth={"keys": {"k": {"tenant": "t3"}, "l": {"tenant": "silent"}}},
    )
    shown = {("t3",)} | {(f"t{i}",) for i in range(999 - MAX_LISTED, 999)}
    for name in ("running", "waiting", "oldest_waiting_seconds", "service_tokens_total"):
        assert found[f"jslora:tenant_{name}"].keys() == shown
    assert found["jslora:tenant_oldest_waiting_seconds"]["t3",] == 1.5
    assert len(found["jslora:adapter_oldest_waiting_seconds"]) == MAX_OLDEST
    assert found["jslora:oldest_waiting_seconds"] == {(): 999.0}
    series, least = (sum(map(len, some.values())) for some in (found, rendered(Stats())))
    assert series == least + 4 * (MAX_LISTED + 1) + MAX_OLDEST


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(name=NAMES.filter(bool))
def test_names_are_told_as_they_are(name: str) -> None:
    """Whatever is in them; the parser is prometheus_client's own."""
    stats = Stats(
        tenants={name: TenantStats(service=2.5)}, oldest_adapters=((name, 3.5), ("", 1.0))
    )
    found = rendered(stats)
    assert found["jslora:tenant_service_tokens_total"] == {(name,): 2.5}
    assert found["jslora:adapter_oldest_waiting_seconds"] == {(name,): 3.5, ("base",): 1.0}


def test_the_report_tells_a_long_wait() -> None:
    quiet, busy = Stats(), Stats(generated_tokens=100, waiting=3)
    assert frontend._report_line(quiet, Stats(oldest_wait=1.0)) is None
    line = frontend._report_line(quiet, busy)
    assert line and "generation throughput: 10.0 tokens/s" in line and "oldest" not in line
    stuck = frontend._report_line(quiet, Stats(waiting=3, oldest_wait=61.27))
    assert stuck and "Waiting: 3 reqs (oldest 61.3 s), Pages:" in stuck


# Between the processes ----------------------------------------------------------------------------

TENANTS = st.builds(
    TenantStats, running=st.integers(0, 9), waiting=st.integers(0, 9),
    oldest_wait=st.floats(0, 1e6), service=st.floats(0, 1e15),
)  # fmt: skip


@given(
    tenants=st.dictionaries(NAMES, TENANTS, max_size=4),
    oldest=st.lists(st.tuples(NAMES, st.floats(0, 1e6)), max_size=16).map(tuple),
)
def test_statistics_cross_the_wire(
    tenants: dict[str, TenantStats], oldest: tuple[tuple[str, float], ...]
) -> None:
    stats = Stats(tenants=tenants, oldest_adapters=oldest, too_late=2, rate_limited=3)
    assert wire.decode_news(wire.encode(wire.Pulse(stats))) == wire.Pulse(stats)


@given(
    priority=st.integers(0, 100), slo=st.none() | st.floats(1e-3, 3600),
    retry=st.none() | st.floats(0, 60),
)  # fmt: skip
def test_wishes_and_times_to_wait_cross_the_wire(
    priority: int, slo: float | None, retry: float | None
) -> None:
    request = Request(
        id="r", prompt=(1,), params=SamplingParams(), tenant="t", priority=priority, ttft_slo=slo
    )
    assert wire.decode_command(wire.encode(wire.Submit(request))) == wire.Submit(request)
    failed = wire.Failed(ErrorInfo(type="rate_limit_error", message="m", retry_after=retry))
    assert wire.decode_news(wire.encode(failed)) == failed
    assert failed.error.error().retry_after == (1.0 if retry is None else retry)


def test_a_tenant_that_fills_the_queue_leaves_places_to_others() -> None:
    """Five places, of which one tenant may have four."""
    scheduler = {"policy": ["fair_tenants"], "max_running": 1, "max_queued": 4}
    changes = {
        "auth": {"keys": KEYS},
        "scheduler": scheduler,
        "server": {"keep_alive_seconds": 0.2},
    }
    server = Server(changes)
    body = {"model": "base", "prompt": "slow", "max_tokens": 30, "stream": True, "n": 4}

    with httpx.Client(base_url=server.url, timeout=10) as client:
        headers = {"authorization": "Bearer alice's"}
        with client.stream("POST", "/v1/completions", json=body, headers=headers) as first:
            lines = first.iter_lines()  # dropping it would close the stream
            next(lines)
            refused = client.post("/v1/completions", json=body | {"n": 1}, headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "kept for other tenants" in refused.json()["error"]["message"]
            other = {"authorization": "Bearer bob's"}
            one = body | {"n": 1}
            with client.stream("POST", "/v1/completions", json=one, headers=other) as second:
                assert second.status_code == 200
            lines.close()
    code, errors = server.stop()
    assert code == 0, errors
