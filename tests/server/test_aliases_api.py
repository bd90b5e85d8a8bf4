"""Aliases: weighted names for adapters, changed and undone by one call."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fake_engine
import httpx
import pytest
from server_harness import Server, until

ADAPTERS = ["sql", "chat", "sql-v1", "sql-v2"]


@pytest.fixture(scope="module")
def canary() -> Iterator[Server]:
    server = Server({"adapters": {"preload": ADAPTERS}})
    yield server
    code, errors = server.stop()
    assert code == 0 and "Traceback" not in errors, errors


@pytest.fixture
def client(canary: Server) -> Iterator[httpx.Client]:
    """A client, after which no alias is left."""
    with httpx.Client(base_url=canary.url, timeout=20) as client:
        yield client
        for alias in client.get("/v1/aliases").json()["data"]:
            assert client.delete(f"/v1/aliases/{alias['name']}").is_success


def put(client: httpx.Client, name: str, **targets: float) -> httpx.Response:
    wanted = {target.replace("_", "-"): weight for target, weight in targets.items()}
    return client.put(f"/v1/aliases/{name}", json={"targets": wanted})


def ask(client: httpx.Client, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "hi", "max_tokens": 4} | fields
    return client.post("/v1/completions", json=body).json()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    return error


def test_an_alias_answers_with_its_target_and_says_which(client: httpx.Client) -> None:
    card = {"name": "prod", "object": "alias", "targets": {"sql-v1": 1.0}, "previous": None}
    assert put(client, "prod", sql_v1=1).json() == card
    answer = ask(client, "prod")
    assert answer["model"] == "sql-v1"
    assert answer["choices"][0]["text"] == fake_engine.text("sql-v1", "hi", 4)
    body = {"model": "prod", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    chunks = client.post("/v1/chat/completions", json=body | {"max_tokens": 2}).text
    assert '"model":"sql-v1"' in chunks and '"model":"prod"' not in chunks
    assert client.get("/v1/aliases/prod").json() == card
    assert client.get("/v1/aliases").json() == {"object": "list", "data": [card]}


def test_an_alias_is_a_model_by_every_route(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=1)
    models = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert models["prod"]["parent"] == "base"
    assert client.get("/v1/models/prod").json()["id"] == "prod"
    assert client.post("/tokenize", json={"model": "prod", "prompt": "hi"}).is_success
    assert "prod" not in {info["name"] for info in client.get("/v1/adapters").json()["data"]}
    assert client.delete("/v1/aliases/prod").json() == {
        "name": "prod", "object": "alias", "deleted": True
    }  # fmt: skip
    assert error_of(client.get("/v1/models/prod"), 404)["param"] == "model"
    error_of(client.post("/v1/completions", json={"model": "prod", "prompt": "hi"}), 404)
    error_of(client.delete("/v1/aliases/prod"), 404)
    error_of(client.get("/v1/aliases/prod"), 404)
    assert client.get("/v1/models/sql-v1").is_success


def test_requests_are_shared_out_by_weight(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=3, base=1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, "prod"), range(200)))
    models = Counter(answer["model"] for answer in answers)
    assert models.keys() == {"sql-v1", "base"}
    assert 110 < models["sql-v1"] < 185  # 150 ± 6 standard deviations
    for answer in answers:
        adapter = None if answer["model"] == "base" else answer["model"]
        assert answer["choices"][0]["text"] == fake_engine.text(adapter, "hi", 4)


def test_all_choices_of_a_request_are_of_one_target(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=1, sql_v2=1)
    answers = [ask(client, "prod", prompt=["hi", "hi"], n=4) for _ in range(30)]
    assert {answer["model"] for answer in answers} == {"sql-v1", "sql-v2"}
    for answer in answers:
        expected = fake_engine.text(answer["model"], "hi", 4)
        assert [choice["text"] for choice in answer["choices"]] == [expected] * 8


def test_a_user_stays_with_a_target(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=1, sql_v2=1)
    users = {f"user {n}": {ask(client, "prod", user=f"user {n}")["model"] for _ in range(4)}
             for n in range(24)}  # fmt: skip
    assert all(len(models) == 1 for models in users.values())
    assert set.union(*users.values()) == {"sql-v1", "sql-v2"}


def test_a_change_is_undone_by_one_call(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=1)
    error_of(client.post("/v1/aliases/prod/rollback"), 400)
    changed = put(client, "prod", sql_v1=95, sql_v2=5).json()
    assert changed["previous"] == {"sql-v1": 1.0}
    back = client.post("/v1/aliases/prod/rollback").json()
    assert back["targets"] == {"sql-v1": 1.0}
    assert back["previous"] == {"sql-v1": 95.0, "sql-v2": 5.0}
    assert {ask(client, "prod")["model"] for _ in range(20)} == {"sql-v1"}
    error_of(client.post("/v1/aliases/nobody/rollback"), 404)


def test_names_never_collide(client: httpx.Client) -> None:
    put(client, "prod", sql_v1=1)
    for name in ("base", "sql"):
        assert "taken" in error_of(put(client, name, chat=1), 400)["message"]
    load = {"lora_name": "prod", "lora_path": "elsewhere"}
    for inplace in (False, True):
        response = client.post("/v1/load_lora_adapter", json=load | {"load_inplace": inplace})
        assert "taken" in error_of(response, 400)["message"]
    assert client.get("/v1/adapters/prod").status_code == 404


def test_targets_must_be_there_and_stay(client: httpx.Client) -> None:
    assert "'sql-v3'" in error_of(put(client, "prod", sql_v1=1, sql_v3=1), 400)["message"]
    put(client, "prod", sql_v1=1)
    error_of(put(client, "other", prod=1), 400)
    unload = {"lora_name": "sql-v1"}
    error = error_of(client.post("/v1/unload_lora_adapter", json=unload), 400)
    assert "'prod'" in error["message"]
    assert ask(client, "sql-v1")["model"] == "sql-v1"
    # What an alias once led to may go, but then there is no way back.
    client.post("/v1/load_lora_adapter", json={"lora_name": "poet"})
    put(client, "prod", poet=1)
    put(client, "prod", sql_v1=1)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}).is_success
    assert "'poet'" in error_of(client.post("/v1/aliases/prod/rollback"), 400)["message"]
    assert client.get("/v1/aliases/prod").json()["targets"] == {"sql-v1": 1.0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_target_that_vanishes_is_never_the_base(client: httpx.Client, stream: bool) -> None:
    """The engine has forgotten the adapter, and the front end does not know it yet."""
    name = f"ghost-{stream}"
    load = {"lora_name": name, "lora_path": "fleeting"}
    assert client.post("/v1/load_lora_adapter", json=load).is_success
    assert client.put("/v1/aliases/prod", json={"targets": {name: 1}}).is_success
    body = {"model": "prod", "prompt": "hi", "stream": stream}
    error = error_of(client.post("/v1/completions", json=body), 404)
    assert error["type"] == "not_found_error"


@pytest.mark.parametrize(
    "body",
    [{}, {"targets": {}}, {"targets": []}, {"targets": {"sql": 0}}, {"targets": {"sql": -1}},
     {"targets": {"sql": "1"}}, {"targets": {"sql": True}}, {"targets": {"../x": 1}},
     {"targets": {"sql": 1e300}}, {"targets": {f"a{n}": 1 for n in range(17)}}],
    ids=str,
)  # fmt: skip
def test_a_bad_alias_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    assert error_of(client.put("/v1/aliases/prod", json=body), 400)["param"].startswith("targets")
    error_of(client.get("/v1/aliases/prod"), 404)


@pytest.mark.parametrize("name", ["a b", "-x", "x" * 129, "a%2fb", "%0a"])
def test_a_name_that_is_none_is_refused(client: httpx.Client, name: str) -> None:
    response = client.put(f"/v1/aliases/{name}", json={"targets": {"sql": 1}})
    assert response.status_code in (400, 404)
    assert client.get("/v1/aliases").json()["data"] == []


def test_aliases_outlive_the_engine(start: Callable[..., Server]) -> None:
    server = start({"adapters": {"preload": ADAPTERS}})
    with httpx.Client(base_url=server.url, timeout=10) as client:
        load = {"lora_name": "poet", "lora_path": "poems"}
        assert client.post("/v1/load_lora_adapter", json=load).is_success
        put(client, "prod", poet=1)
        put(client, "prod", sql_v1=1)
        server.engine().kill()
        until(lambda: client.get("/health").status_code == 503, 3.0)
        assert client.put("/v1/aliases/x", json={"targets": {"sql": 1}}).status_code == 503
        assert client.get("/v1/aliases/prod").json()["targets"] == {"sql-v1": 1.0}
        until(lambda: client.get("/health").status_code == 200, 10)
        assert ask(client, "prod")["model"] == "sql-v1"
        assert client.post("/v1/aliases/prod/rollback").is_success
        assert ask(client, "prod")["model"] == "poet"
