"""Several adapters in one request, as clients ask for them."""

import json
import re
from collections.abc import Iterator
from typing import Any

import fake_engine
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_harness import Server, until

from jslora import wire
from jslora.request import Request, SamplingParams, Scaled

ADAPTERS = ["sql", "chat", "poet", "fr", "sql-v1"]
KEYS = {
    "all": {"tenant": "all", "admin": True},
    "some": {"tenant": "some", "adapters": ["sql", "poet", "mine"]},
}
SUM = [{"name": "sql", "scale": 0.7}, {"name": "chat"}]
SPELLED = "chat+sql*0.7"


@pytest.fixture(scope="module")
def composing() -> Iterator[Server]:
    server = Server(
        {
            "adapters": {"preload": ADAPTERS},
            "auth": {"keys": KEYS},
            "logging": {"requests": True, "format": "json"},
        }
    )
    yield server
    code, errors = server.stop()
    assert code == 0 and "Traceback" not in errors, errors
    records = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    logged = [record["adapters"] for record in records if "completion_tokens" in record]
    assert {"sql": 0.7, "chat": 1.0} in logged and {} in logged and {"sql": 1.0} in logged


@pytest.fixture
def client(composing: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=composing.url, timeout=20, headers=bearer("all")) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(client: httpx.Client, adapters: Any, **fields: Any) -> httpx.Response:
    body = {"model": "base", "prompt": "hi", "max_tokens": 4, "adapters": adapters}
    return client.post("/v1/completions", json=body | fields)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status), error
    return error


def texts_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == "base"
    return [choice["text"] for choice in answer["choices"]]


def made(adapter: str | None) -> str:
    return fake_engine.text(adapter, "hi", 4)


def test_a_request_is_answered_by_the_sum_whatever_its_order(client: httpx.Client) -> None:
    assert texts_of(ask(client, SUM)) == [made(SPELLED)]
    assert texts_of(ask(client, SUM[::-1], prompt=["hi", "hi"], n=2)) == [made(SPELLED)] * 4
    four = [{"name": name, "scale": 0.5} for name in ADAPTERS[:4]]
    assert texts_of(ask(client, four)) == [made("chat*0.5+fr*0.5+poet*0.5+sql*0.5")]


@pytest.mark.parametrize(
    ("scale", "adapter"), [(0.3, "sql*0.3"), (2, "sql*2"), (0, "sql*0"), (None, "sql"), (1, "sql")]
)
def test_one_adapter_may_be_scaled(client: httpx.Client, scale: float | None, adapter: str) -> None:
    assert texts_of(ask(client, [{"name": "sql", "scale": scale}])) == [made(adapter)]


@pytest.mark.parametrize("adapters", [None, []])
def test_no_adapters_are_the_model_itself(client: httpx.Client, adapters: Any) -> None:
    assert texts_of(ask(client, adapters)) == [made(None)]
    assert ask(client, adapters, model="sql").json()["choices"][0]["text"] == made("sql")


def test_chat_and_streams_take_adapters_too(composing: Server) -> None:
    with openai.OpenAI(base_url=f"{composing.url}/v1", api_key="all", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        body = {"adapters": SUM}
        whole = client.chat.completions.create(
            model="base", messages=messages, max_tokens=6, extra_body=body
        )
        chunks = list(
            client.chat.completions.create(
                model="base", messages=messages, max_tokens=6, stream=True, extra_body=body
            )
        )
        plain = client.chat.completions.create(model="base", messages=messages, max_tokens=6)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == text != plain.choices[0].message.content
    assert {whole.model, *(chunk.model for chunk in chunks)} == {"base"}


@pytest.mark.parametrize(
    ("adapters", "named"),
    [
        ("sql", "'sql'"),
        (["sql"], "'sql'"),
        ([{"scale": 1.0}], "adapters.0.name"),
        ([{"name": ""}], "adapters.0.name"),
        ([{"name": "sql", "scale": 2.01}], "2.01"),
        ([{"name": "sql", "scale": -0.1}], "-0.1"),
        ([{"name": "sql"}, {"name": "chat", "scale": "1"}], "adapters.1.scale"),
        ([{"name": "sql", "scale": True}], "adapters.0.scale"),
        ([{"name": "sql"}, {"name": "sql", "scale": 0.5}], "'sql' is named twice"),
        ([{"name": "base"}], "'base' is the base"),
        ([{"name": name} for name in ADAPTERS], "5 adapters in one request; at most 4"),
        ([{"name": f"a{n}"} for n in range(17)], "at most 16"),
    ],
)
def test_a_bad_list_is_refused(client: httpx.Client, adapters: Any, named: str) -> None:
    error = error_of(ask(client, adapters), 400)
    assert named in error["message"] and error["param"].startswith("adapters"), error
    assert error["type"] == "invalid_request_error"


def test_only_the_base_is_added_to(client: httpx.Client) -> None:
    error = error_of(ask(client, SUM, model="poet"), 400)
    assert error["param"] == "adapters" and "'poet'" in error["message"]
    assert error_of(ask(client, SUM, model="nobody"), 404)["param"] == "model"


def test_each_name_must_be_there_for_the_caller(client: httpx.Client) -> None:
    """What another may use looks like what does not exist, and like any unknown model."""
    unknown = error_of(ask(client, [], model="nobody"), 404)
    for key, adapters, name in (
        ("all", [{"name": "sql"}, {"name": "nobody"}], "nobody"),
        ("some", [{"name": "nobody"}], "nobody"),
        ("some", [{"name": "sql"}, {"name": "chat"}], "chat"),
        ("some", [{"name": "chat", "scale": 0.0}, {"name": "sql"}], "chat"),
    ):
        client.headers.update(bearer(key))
        error = error_of(ask(client, adapters), 404)
        expected = unknown["message"].replace("nobody", name)
        assert error == unknown | {"message": expected, "param": "adapters"}


def test_aliases_lead_to_adapters(client: httpx.Client) -> None:
    def put(name: str, target: str) -> None:
        assert client.put(f"/v1/aliases/{name}", json={"targets": {target: 1}}).is_success

    put("mine", "sql-v1")
    put("none", "base")
    adapters = [{"name": "poet"}, {"name": "mine", "scale": 0.5}]
    assert texts_of(ask(client, adapters)) == [made("poet+sql-v1*0.5")]
    # Who may use an alias may use what it leads to.
    assert texts_of(ask(client, adapters, user="a")) == [made("poet+sql-v1*0.5")]
    assert texts_of(ask(client, [{"name": "poet"}, {"name": "none"}])) == [made("poet")]
    assert texts_of(ask(client, [{"name": "none", "scale": 0.1}])) == [made(None)]
    twice = error_of(ask(client, [{"name": "mine"}, {"name": "sql-v1"}]), 400)
    assert "'sql-v1' is named twice" in twice["message"]
    error_of(ask(client, [{"name": "sql"}], model="none"), 400)
    for name in ("mine", "none"):
        assert client.delete(f"/v1/aliases/{name}").is_success


def test_an_unload_waits_for_sums_and_metrics_name_their_adapters(client: httpx.Client) -> None:
    body = {"model": "base", "prompt": "slow", "max_tokens": 12, "stream": True}
    body |= {"adapters": [{"name": "fr"}, {"name": "poet", "scale": 0.5}]}

    def running() -> set[str]:
        found = re.search('running_lora_adapters="([^"]*)"', client.get("/metrics").text)
        return set(found[1].split(",")) if found else set()

    def users(name: str) -> int:
        return client.get(f"/v1/adapters/{name}").json()["in_flight"]

    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        frames = [next(lines)]
        until(lambda: running() >= {"fr", "poet"})
        assert (users("fr"), users("poet"), users("sql")) == (1, 1, 0)
        unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert unload.is_success
        frames += [line for line in lines if line.startswith("data: {")]
    texts = [json.loads(frame[6:])["choices"][0]["text"] for frame in frames]
    assert "".join(texts) == fake_engine.text("fr+poet*0.5", "slow", 12)
    error_of(ask(client, [{"name": "fr"}, {"name": "poet"}]), 404)
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "poet"}).is_success


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_vanishes_is_never_left_out(client: httpx.Client, stream: bool) -> None:
    """The engine has forgotten the adapter, and the front end does not know it yet."""
    name = f"ghost-{stream}"
    load = {"lora_name": name, "lora_path": "fleeting"}
    assert client.post("/v1/load_lora_adapter", json=load).is_success
    response = ask(client, [{"name": "sql"}, {"name": name}], stream=stream)
    assert error_of(response, 404)["type"] == "not_found_error"


def test_the_document_tells_of_adapters(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        kinds = schemas[body]["properties"]["adapters"]["anyOf"]
        (listed,) = (kind for kind in kinds if kind.get("type") == "array")
        assert listed["items"]["$ref"].endswith("/ScaledAdapter")
    scale = schemas["ScaledAdapter"]["properties"]["scale"]
    assert scale["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]
    assert scale["default"] == 1
    assert schemas["ScaledAdapter"]["required"] == ["name"]


@given(st.lists(st.builds(Scaled, st.text(max_size=4), st.floats(0, 2)), max_size=4))
def test_adapters_cross_the_wire(adapters: list[Scaled]) -> None:
    request = Request(id="r", prompt=(1,), params=SamplingParams(), adapters=tuple(adapters))
    back = wire.decode_command(wire.encode(wire.Submit(request)))
    assert back == wire.Submit(request)
    assert all(isinstance(adapter, Scaled) for adapter in back.request.adapters)
