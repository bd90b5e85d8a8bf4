"""Loading, unloading and listing adapters; the tokenizer's routes; metrics."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fake_engine
import httpx
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
