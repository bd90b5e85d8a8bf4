"""Bad input: the right status, OpenAI's error object, and a server that goes on serving."""

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_harness import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status and error["message"] and error["type"]
    assert "Traceback" not in error["message"] and "site-packages" not in error["message"]
    return error


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(COMPLETIONS, json={"model": "base", "prompt": "hi", "max_tokens": 2} | fields)


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"model": "base", "messages": MESSAGES, "max_tokens": 2} | fields)


def send_raw(http: httpx.Client, body: bytes, kind: str = "application/json") -> httpx.Response:
    return http.post(COMPLETIONS, content=body, headers={"content-type": kind})


BAD_JSON = {
    "empty": b"",
    "truncated": b'{"model": "base", "prompt": "hi"',
    "not an object": b'["base"]',
    "NaN": b'{"model":"base","prompt":"hi","temperature":NaN}',
    "Infinity": b'{"model":"base","prompt":"hi","temperature":Infinity}',
    "1e400": b'{"model":"base","prompt":"hi","temperature":1e400}',
    "30 digits": b'{"model":"base","prompt":"hi","seed":' + b"1" * 30 + b"}",
    "30 digits in an unknown field": b'{"model":"base","prompt":"hi","x":[' + b"1" * 30 + b"]}",
    "5000 digits": b'{"model":"base","prompt":"hi","seed":' + b"1" * 5000 + b"}",
    "lone high surrogate": b'{"model":"base","prompt":"\\ud800"}',
    "lone surrogate and text": b'{"model":"base","prompt":"\\ud800 and text"}',
    "lone low surrogate": b'{"model":"base","prompt":"\\udc00 and text"}',
    "not UTF-8": b'{"model":"base","prompt":"\xff"}',
    "byte order mark": b'\xef\xbb\xbf{"model":"base","prompt":"hi"}',
    "depth 65": b'{"model":"base","prompt":"hi","x":' + b"[" * 64 + b"]" * 64 + b"}",
    "depth 20000": b'{"model":"base","prompt":"hi","x":' + b"[" * 20000 + b"]" * 20000 + b"}",
    "open brackets": b"[" * 60000,
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_not_strict_is_refused(http: httpx.Client, name: str) -> None:
    error_of(send_raw(http, BAD_JSON[name]), 400)


def test_the_deepest_allowed_nesting_is_accepted(http: httpx.Client) -> None:
    body = b'{"model":"base","prompt":"hi","x":' + b"[" * 63 + b"]" * 63 + b"}"
    assert send_raw(http, body).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415(http: httpx.Client, kind: str) -> None:
    error_of(send_raw(http, b'{"model":"base","prompt":"hi"}', kind), 415)


def test_a_body_beyond_the_limit_is_413(http: httpx.Client) -> None:
    body = json.dumps({"model": "base", "prompt": "x" * 70000}).encode()
    error_of(send_raw(http, body), 413)
    chunks = (body[i : i + 1000] for i in range(0, len(body), 1000))  # without Content-Length
    response = http.post(COMPLETIONS, content=chunks, headers={"content-type": "application/json"})
    error_of(response, 413)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": 1.5}, "prompt"),
    ({"prompt": ["hi"] * 200, "n": 2}, "prompt"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2.0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**50}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["x" * 300]}, "stop"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(17))}, "stop_token_ids"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
]


@pytest.mark.parametrize(
    ("fields", "param"), BAD_FIELDS, ids=[f"{p}-{i}" for i, (_, p) in enumerate(BAD_FIELDS)]
)
def test_a_bad_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = error_of(complete(http, **fields), 400)
    assert (error["param"] or "").partition(".")[0] == param.partition(".")[0], error


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        {"logprobs": 1},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"max_completion_tokens": 0},
        {"max_tokens": 0},
        {"echo": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
    ids=str,
)
def test_a_bad_chat_field_is_refused(http: httpx.Client, fields: dict[str, Any]) -> None:
    assert error_of(chat(http, **fields), 400)["param"]


def test_null_and_unknown_fields_are_ignored(http: httpx.Client) -> None:
    nulls = dict.fromkeys(
        ("stop", "temperature", "top_p", "n", "seed", "logprobs", "stream", "stream_options",
         "logit_bias", "user", "best_of", "suffix", "tools", "response_format")
    )  # fmt: skip
    assert complete(http, **nulls, service_tier="auto", store=False).status_code == 200
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert chat(http, **harmless).status_code == 200


def test_a_request_that_can_never_fit_names_both_numbers(http: httpx.Client) -> None:
    error = error_of(complete(http, prompt="x" * 200, max_tokens=100), 400)
    assert "300" in error["message"] and "256" in error["message"]
    error = error_of(complete(http, prompt="x" * 256, max_tokens=None), 400)
    assert error["param"] == "prompt"
    error = error_of(complete(http, prompt="x" * 5000), 400)
    assert "5000 characters" in error["message"]
    error_of(chat(http, messages=[{"role": "user", "content": "x" * 5000}]), 400)
    # A default shrinks to what is left instead.
    assert complete(http, prompt="x" * 250, max_tokens=None).json()["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "//v1/models", 404),
        ("POST", "/v1/models/sql", 405),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/health", 405),
        ("OPTIONS", COMPLETIONS, 405),
        ("GET", "/v1/models/" + "x" * 300, 400),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/adapters/base", 404),
        ("GET", "/%2e%2e/etc/passwd", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    error_of(http.request(method, path), status)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {"model", "prompt", "messages", "max_tokens", "n", "stop", "logit_bias", "stream_options",
     "seed", "temperature", "logprobs", "stop_token_ids", "echo", "tools", "top_p", "priority",
     "ttft_slo", "adapters"}
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from([COMPLETIONS, CHAT, "/tokenize"]),
       body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))  # fmt: skip
def test_no_body_makes_a_server_error(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    fields = {"model": "base", "prompt": "hi", "max_tokens": 2, "stream": False} | body
    response = http.post(path, json=fields)
    assert response.status_code < 500, (fields, response.text)
    if response.status_code != 200:
        error_of(response, response.status_code)


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "bad version": b"GET /health HTTP/x\r\nhost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "bad header": b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
    "header of 1 MB": b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "negative length": b"POST /ping HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    "two lengths": b"POST /ping HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
    b"content-length: 2\r\n\r\n12",
    "bad chunk": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_is_refused(server: Server, http: httpx.Client, name: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        answer = b""
        try:
            raw.sendall(MALFORMED[name])
            while part := raw.recv(65536):
                answer += part
        except ConnectionError:
            pass
    # A server that stops reading may reset the connection before its answer is read.
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    if answer:
        body = answer.partition(b"\r\n\r\n")[2]
        assert json.loads(body)["error"]["code"] == 400
    assert http.get("/health").status_code == 200


def test_pipelined_and_bytewise_requests_are_served(server: Server) -> None:
    request = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        for byte in request:
            raw.sendall(bytes([byte]))
        raw.sendall(request + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 3
