"""Loading, unloading and listing adapters; the tokenizer's routes; metrics."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fake_engine
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Server, metric, until


def test_load_use_replace_unload(http: httpx.Client) -> None:
    def load(**body: object) -> httpx.Response:
        return http.post("/v1/load_lora_adapter", json={"lora_name": "poet", **body})

    body = {"model": "poet", "prompt": "hi", "max_tokens": 4}
    assert http.post("/v1/completions", json=body).status_code == 404
    response = load(lora_path="poet")
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'poet' added successfully."
    answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == fake_engine.text("poet", "hi", 4)

    first = http.get("/v1/adapters/poet").json()
    assert first["name"] == "poet" and first["rank"] == 8 and first["state"] == "host"
    error = load(lora_path="poet-2").json()["error"]
    assert error["code"] == 400 and error["param"] == "lora_name"
    assert load(lora_path="poet-2", load_inplace=True).status_code == 200
    assert http.get("/v1/adapters/poet").json()["digest"] != first["digest"]

    unload = {"lora_name": "poet"}
    assert http.post("/v1/unload_lora_adapter", json=unload).text.startswith("Success")
    assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 404
    assert http.post("/v1/completions", json=body).status_code == 404
    assert "poet" not in {card["id"] for card in http.get("/v1/models").json()["data"]}


def test_an_unload_waits_for_the_requests_that_hold_it(http: httpx.Client) -> None:
    http.post("/v1/load_lora_adapter", json={"lora_name": "poet"})
    body = {"model": "poet", "prompt": "slow", "max_tokens": 8, "stream": True}
    with ThreadPoolExecutor(1) as pool, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        unload = pool.submit(http.post, "/v1/unload_lora_adapter", json={"lora_name": "poet"})
        until(lambda: state_of(http, "poet") == ("draining", 1))
        # From its start, it is there for nobody else.
        assert http.post("/v1/completions", json=body).status_code == 404
        assert "poet" not in {card["id"] for card in http.get("/v1/models").json()["data"]}
        again = http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert again.status_code == 404
        assert not unload.done()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and "error" not in "".join(rest)
    assert unload.result().status_code == 200
    assert http.get("/v1/adapters/poet").status_code == 404


def state_of(http: httpx.Client, name: str) -> tuple[str, int]:
    found = {info["name"]: info for info in http.get("/v1/adapters").json()["data"]}
    one = http.get(f"/v1/adapters/{name}").json()
    assert one.keys() == found[name].keys() and one["digest"] == found[name]["digest"]
    return one["state"], one["in_flight"]


def test_a_drain_ends_in_time(http: httpx.Client) -> None:
    http.post("/v1/load_lora_adapter", json={"lora_name": "poet"})
    body = {"model": "poet", "prompt": "slow slow", "max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        unload = {"lora_name": "poet", "drain_seconds": 0.2}
        assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
        *_, error, done = [line for line in lines if line]
    assert "was unloaded" in error and '"code":503' in error and done == "data: [DONE]"


def test_the_configuration_has_a_drain_time(start: Callable[..., Server]) -> None:
    server = start({"adapters": {"preload": ["sql"], "drain_seconds": 0.1}})
    body = {"model": "sql", "prompt": "slow", "max_tokens": 200}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=10) as client:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=10)
        until(lambda: client.get("/v1/adapters/sql").json()["in_flight"] == 1)
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).is_success
        assert answer.result().status_code == 503
        assert answer.result().headers["retry-after"] == "5"


@pytest.mark.parametrize("seconds", [-1, 3601, "5", True, [1]])
def test_a_bad_drain_time_is_refused(http: httpx.Client, seconds: object) -> None:
    body = {"lora_name": "sql", "drain_seconds": seconds}
    response = http.post("/v1/unload_lora_adapter", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "drain_seconds"
    assert http.get("/v1/models/sql").is_success


def test_a_name_may_come_back_while_it_drains(http: httpx.Client) -> None:
    load = {"lora_name": "poet"}
    http.post("/v1/load_lora_adapter", json=load)
    body = {"model": "poet", "prompt": "slow", "max_tokens": 6, "stream": True}
    with ThreadPoolExecutor(1) as pool, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        unload = pool.submit(http.post, "/v1/unload_lora_adapter", json=load)
        until(lambda: http.get("/v1/models/poet").status_code == 404)
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 200
        for _ in lines:
            pass
    assert unload.result().status_code == 200
    # The end of the old one took nothing from the new one, in this pulse or the next.
    for _ in range(3):
        assert http.post("/v1/completions", json=body | {"prompt": "hi"}).is_success
        time.sleep(0.2)
    assert http.post("/v1/unload_lora_adapter", json=load).status_code == 200


def test_refused_loads_say_why(http: httpx.Client) -> None:
    for name, path, status in [
        ("poet", "bad-folder", 400),
        ("base", "poet", 400),
        ("../etc", "poet", 400),
        ("a" * 129, "poet", 400),
        ("poet", "", 400),
        ("poet", 5, 400),
    ]:
        response = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert response.status_code == status, (name, path, response.text)
    rejected = http.post(
        "/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "bad-folder"}
    )
    assert rejected.json()["error"]["type"] == "adapter_rejected"
    assert "lora_A is missing" in rejected.json()["error"]["message"]
    assert http.get("/v1/adapters/poet").status_code == 404


def test_runtime_loading_can_be_off(start: Callable[..., Server]) -> None:
    server = start({"adapters": {"preload": ["sql"], "runtime_loading": False}})
    for path in ("load", "unload"):
        response = httpx.post(f"{server.url}/v1/{path}_lora_adapter", json={"lora_name": "sql"})
        assert response.status_code == 403
        assert "runtime_loading" in response.json()["error"]["message"]


def test_tokenize_and_detokenize_are_inverse(http: httpx.Client) -> None:
    text = "Grüße, 世界"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == list(text.encode())
    assert answer["count"] == len(text.encode()) and answer["max_model_len"] == 256
    assert answer["token_strs"][:2] == ["G", "r"]
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"][0] == 257 and chat["count"] == len(chat["tokens"])
    assert http.post("/tokenize", json={"prompt": "a", "model": "nobody"}).status_code == 404
    assert http.post("/tokenize", json={"prompt": "a", "messages": []}).status_code == 200
    assert http.post("/tokenize", json={}).status_code == 400


def test_metrics_follow_the_requests(http: httpx.Client) -> None:
    def value(name: str, **labels: str) -> float:
        return metric(http, f"jslora:{name}", **labels)

    body = {"model": "sql", "prompt": "metrics", "max_tokens": 10, "stream": True}
    http.post("/v1/completions", json=body)
    before = value("request_success_total", finished_reason="length")
    tokens = value("inter_token_latency_seconds_count")
    http.post("/v1/completions", json=body)
    assert value("request_success_total", finished_reason="length") == before + 1
    assert value("inter_token_latency_seconds_count") == tokens + 9
    assert value("time_to_first_token_seconds_count") >= 2
    assert value("request_prompt_tokens_sum") >= 14
    assert value("engine_up") == 1 and value("engine_restarts_total") == 0
    assert value("page_ledger_errors_total") == 0
    assert value("cache_config_info", page_size="16", num_pages="1024") == 1
    until(lambda: value("generation_tokens_total") >= 20)


def test_metrics_tell_of_tiers_loading_and_the_prefix_cache(start: Callable[..., Server]) -> None:
    server = start()
    with httpx.Client(base_url=server.url, timeout=10) as client:

        def value(name: str, **labels: str) -> float:
            return metric(client, f"jslora:{name}", **labels)

        for name in ("poet", "cook"):
            client.post("/v1/load_lora_adapter", json={"lora_name": name})
        for _ in range(2):
            body = {"model": "poet", "prompt": "tiers", "max_tokens": 1}
            client.post("/v1/completions", json=body)
        until(lambda: value("prefix_cache_queries_total") == 10)
        assert value("prefix_cache_hits_total") == 4
        assert value("prefix_cache_evictions_total") == 3
        assert value("lora_adapters_registered") == value("lora_adapters_host") == 4
        assert value("lora_adapters_device") == 1
        assert value("lora_host_bytes") == 4000
        assert value("lora_load_seconds_total", stage="read") == 1
        assert value("lora_load_seconds_total", stage="pack") == 0.5
        until(lambda: value("num_requests_running") == 0)
        # Cached pages are there for the taking.
        assert value("pages_cached") == 7 and value("pages_free") == 1016
        assert value("kv_cache_usage_perc") == 0


def test_thousands_of_adapters_are_reported_seldom(start: Callable[..., Server]) -> None:
    names = [f"adapter-{n:04}" for n in range(2000)]
    server = start({"adapters": {"preload": names}})
    with httpx.Client(base_url=server.url, timeout=20) as client, ThreadPoolExecutor(8) as pool:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base", *names]
        lists = list(pool.map(lambda _: client.get("/v1/adapters").json()["data"], range(24)))
        assert all([info["name"] for info in found] == names for found in lists)
        until(lambda: metric(client, "jslora:recoveries_total") > 0)
        time.sleep(0.3)
        assert metric(client, "jslora:recoveries_total") <= 12  # the fake counts here
        assert client.get("/v1/adapters/adapter-1234").json()["name"] == "adapter-1234"
        # A list has all that was answered before it was asked for.
        client.post("/v1/load_lora_adapter", json={"lora_name": "poet"})
        found = client.get("/v1/adapters").json()["data"]
        assert "poet" in {info["name"] for info in found}


def test_metrics_have_no_series_per_adapter(http: httpx.Client) -> None:
    for model in ("base", "sql", "chat"):
        http.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    (series,) = families["jslora:lora_requests_info"].samples
    assert series.labels.keys() == {
        "max_lora", "running_lora_adapters", "waiting_lora_adapters"
    }  # fmt: skip
    assert series.value > 1.7e9
    for family in families.values():
        for sample in family.samples:
            if sample.name != series.name:
                assert not {"sql", "chat"} & set(sample.labels.values()), sample


def test_a_rejection_is_counted(start: Callable[..., Server]) -> None:
    server = start(
        {"scheduler": {"max_running": 1, "max_queued": 1}, "server": {"keep_alive_seconds": 0.2}}
    )
    slow = {"model": "base", "prompt": "slow", "max_tokens": 30, "stream": True}
    with httpx.Client(base_url=server.url, timeout=10) as client:
        with client.stream("POST", "/v1/completions", json=slow) as first:
            lines = first.iter_lines()  # dropping it would close the stream
            next(lines)
            with client.stream("POST", "/v1/completions", json=slow | {"prompt": "slow eos"}):
                full = client.post("/v1/completions", json=slow)
                assert full.status_code == 503
                assert full.headers["retry-after"] == "1"
                assert full.json()["error"]["type"] == "overloaded_error"
            lines.close()
        assert metric(client, "jslora:admission_rejections_total", reason="queue_full") == 1
        # What can never be admitted is the client's mistake.
        response = client.post("/v1/completions", json=slow | {"n": 3})
        assert response.status_code == 400
        # Both streams were left, so there is room again.
        until(lambda: client.post("/v1/completions", json=slow | {"prompt": "eos"}).is_success)


def test_queued_prompt_tokens_are_bounded(start: Callable[..., Server]) -> None:
    server = start({"scheduler": {"max_running": 4, "max_queued_tokens": 20}})
    body = {"model": "base", "prompt": "sleep 7890", "max_tokens": 2, "stream": True}
    with httpx.Client(base_url=server.url, timeout=10) as client:
        response = client.post("/v1/completions", json=body | {"prompt": "x" * 21})
        assert response.status_code == 400 and "20 tokens" in response.json()["error"]["message"]
        with ThreadPoolExecutor(3) as pool:
            answers = pool.map(lambda _: client.post("/v1/completions", json=body), range(3))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503]
