"""Keys: every route but the open ones needs one, and a tenant sees only its own adapters."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from server_harness import Server, until

from jslora.server import schema
from jslora.server.app import create_app

OPEN = {"/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"}
SECRETS = {"alice": "secret-of-alice", "bob": "schlüssel-of-bob", "root": "secret-of-root"}
KEYS = {
    SECRETS["alice"]: {"tenant": "alice", "adapters": ["sql", "for-alice"]},
    SECRETS["bob"]: {"tenant": "bob", "adapters": []},
    SECRETS["root"]: {"tenant": "root", "admin": True},
}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Any]:
    server = Server({"auth": {"keys": KEYS}, "logging": {"requests": True, "format": "json"}})
    with httpx.Client(base_url=server.url, timeout=10) as client:
        server.client = client
        yield server
    code, errors = server.stop()
    assert code == 0, errors
    for secret in SECRETS.values():
        assert secret not in errors


def bearer(name: str) -> dict[str, str | bytes]:
    return {"authorization": b"Bearer " + SECRETS[name].encode()}


def call(server: Any, method: str, path: str, who: str | None = None, **rest: Any) -> Any:
    headers = {**(bearer(who) if who else {}), **rest.pop("headers", {})}
    return server.client.request(method, path, headers=headers, **rest)


def all_routes() -> list[tuple[str, str]]:
    """Every (method, path) the application declares, and the documentation's."""
    app = create_app(None).app  # type: ignore[arg-type, attr-defined]
    found = [
        (method.upper(), path.replace("{name}", "sql"))
        for path, methods in schema.build(app)["paths"].items()
        for method in methods
    ]
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs")]


CLOSED = [route for route in all_routes() if route[1] not in OPEN]


def test_the_open_routes_are_the_ones_meant_to_be() -> None:
    assert {path for _, path in all_routes()} - {path for _, path in CLOSED} == OPEN
    assert len(CLOSED) >= 12


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize(
    "authorization",
    [None, b"", b"Bearer", b"Bearer wrong", b"Basic secret-of-root", b"secret-of-root",
     b"Bearer secret-of-roo", b"Bearer secret-of-root2", b"Bearer \xff\xfe"],
    ids=repr,
)  # fmt: skip
def test_routes_need_a_valid_key(
    keyed: Any, method: str, path: str, authorization: bytes | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    response = call(keyed, method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_and_metrics_need_none(keyed: Any, path: str) -> None:
    assert call(keyed, "GET", path).status_code == 200


@pytest.mark.parametrize(
    "target",
    ["/v1/models", "//v1/models", "/v1/%6dodels", "/./v1/models", "/health/../v1/models",
     "/v1/models?x=/health", "http://health/v1/models", "/v1/models/", "/v1/models;/health"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["localhost", "/health", "x/health?", "a@b"])
def test_no_spelling_of_a_url_goes_round_the_key(keyed: Any, target: str, host: str) -> None:
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=5) as raw:
        head = f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        raw.sendall(head.encode())
        answer = b""
        while part := raw.recv(65536):
            answer += part
    status = int(answer.split(b" ", 2)[1])
    assert status in (307, 400, 401, 404), answer
    assert b'"data"' not in answer


@pytest.mark.parametrize("who", ["alice", "bob", "root"])
@pytest.mark.parametrize("model", ["base", "sql", "chat"])
def test_a_tenant_uses_its_own_adapters_only(keyed: Any, who: str, model: str) -> None:
    visible = {"alice": {"base", "sql"}, "bob": {"base"}, "root": {"base", "sql", "chat"}}[who]
    body = {"model": model, "prompt": "hi", "max_tokens": 2}
    statuses = {
        call(keyed, "POST", "/v1/completions", who, json=body).status_code,
        call(keyed, "GET", f"/v1/models/{model}", who).status_code,
        call(keyed, "POST", "/tokenize", who, json=body).status_code,
    }
    assert statuses == ({200} if model in visible else {404})
    listed = {card["id"] for card in call(keyed, "GET", "/v1/models", who).json()["data"]}
    assert listed == visible
    reports = {info["name"] for info in call(keyed, "GET", "/v1/adapters", who).json()["data"]}
    assert reports == visible - {"base"}


def test_a_foreign_adapter_looks_like_one_that_does_not_exist(keyed: Any) -> None:
    def message(model: str) -> str:
        body = {"model": model, "prompt": "hi"}
        error = call(keyed, "POST", "/v1/completions", "bob", json=body).json()["error"]
        return error["message"].replace(model, "X")

    assert message("chat") == message("nobody")


def test_only_administrators_load_and_unload(keyed: Any) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        response = call(keyed, "POST", path, "alice", json={"lora_name": "sql"})
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
    reports = call(keyed, "GET", "/v1/adapters", "alice").json()["data"]
    assert "path" not in reports[0] and "digest" in reports[0]
    assert "path" in call(keyed, "GET", "/v1/adapters", "root").json()["data"][0]


def test_only_administrators_change_aliases_and_only_their_users_see_them(keyed: Any) -> None:
    targets = {"targets": {"chat": 1}}
    for name in ("sql-latest", "for-alice"):
        assert call(keyed, "PUT", f"/v1/aliases/{name}", "root", json=targets).status_code == 200
    for method, path in [
        ("PUT", "/v1/aliases/mine"),
        ("PUT", "/v1/aliases/for-alice"),
        ("POST", "/v1/aliases/for-alice/rollback"),
        ("DELETE", "/v1/aliases/for-alice"),
    ]:
        response = call(keyed, method, path, "alice", json=targets)
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
    body = {"model": "for-alice", "prompt": "hi", "max_tokens": 2}
    for who, names in {
        "alice": {"for-alice"},
        "bob": set(),
        "root": {"sql-latest", "for-alice"},
    }.items():
        found = {alias["name"] for alias in call(keyed, "GET", "/v1/aliases", who).json()["data"]}
        assert found == names
        assert names <= {m["id"] for m in call(keyed, "GET", "/v1/models", who).json()["data"]}
        status = 200 if "for-alice" in names else 404
        assert call(keyed, "GET", "/v1/aliases/for-alice", who).status_code == status
        assert call(keyed, "GET", "/v1/models/for-alice", who).status_code == status
        # Who may use the alias may use what it leads to, by this name only.
        answer = call(keyed, "POST", "/v1/completions", who, json=body)
        assert answer.status_code == status
    assert call(keyed, "GET", "/v1/models/chat", "alice").status_code == 404
    for name in ("sql-latest", "for-alice"):
        assert call(keyed, "DELETE", f"/v1/aliases/{name}", "root").status_code == 200


def test_bodies_are_not_read_before_the_key_is_checked(keyed: Any) -> None:
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 60000\r\n\r\n{"
        )
        assert raw.recv(65536).startswith(b"HTTP/1.1 401")


def test_clients_cannot_forge_log_lines(start: Callable[..., Server]) -> None:
    server = start({"logging": {"requests": True, "level": "debug"}})
    evil = 'x\n12:00:00 error forged\x1b[31m\u2028"'
    with httpx.Client(base_url=server.url) as client:
        client.post("/v1/completions", json={"model": evil, "prompt": "hi"})
        client.post("/v1/completions", json={"model": "base", "prompt": "hi", "user": evil})
        client.get("/v1/models/" + "%0aforged%1b")
        answer = client.get("/version", headers={"x-request-id": "ok-1"})
        assert answer.headers["x-request-id"] == "ok-1"
        answer = client.get("/version", headers={"x-request-id": "a b<script>"})
        assert answer.headers["x-request-id"].isalnum()
        until(lambda: 'finished_reason="length"' in client.get("/metrics").text)
    _, errors = server.stop()
    assert "finished=['length']" in errors
    assert not any(line.startswith("12:00:00 error forged") for line in errors.splitlines())
    assert "\x1b" not in errors and "\u2028" not in errors
