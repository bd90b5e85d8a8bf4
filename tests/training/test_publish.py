"""Publishing says exactly what a server needs, and tells what it answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jslora.errors import ConfigError
from jslora.server.protocol import LoadBody
from jslora.training.publish import PublishError, Server, key_from


class Listener(HTTPServer):
    """Answers everything alike and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str | None, Any]] = []
        self.answer: tuple[int, bytes] = (200, b"Success")
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = json.loads(body) if body else None
        self.server.asked.append((self.command, self.path, self.headers["authorization"], asked))
        self.send_response(self.server.answer[0])
        self.send_header("location", f"{self.server.url}/elsewhere")
        self.send_header("content-length", str(len(self.server.answer[1])))
        self.end_headers()
        self.wfile.write(self.server.answer[1])

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_adapter_is_loaded_by_its_absolute_path(listener: Listener, tmp_path: Path) -> None:
    server = Server(f"{listener.url}/proxy/", "secret")
    server.check()
    server.publish("pirate", tmp_path / "out" / ".." / "pirate")
    (seen, loaded) = listener.asked
    assert seen == ("GET", "/proxy/v1/models", "Bearer secret", None)
    assert loaded[:3] == ("POST", "/proxy/v1/load_lora_adapter", "Bearer secret")
    body = LoadBody.model_validate(loaded[3])
    assert body.lora_name == "pirate" and body.lora_path == str(tmp_path / "pirate")
    assert body.load_inplace
    assert "secret" not in repr(server)


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (400, b'{"error": {"message": "rank 600 is too large"}}', "400: rank 600 is too large"),
        (401, b'{"error": {"message": "no key"}}', "401: no key"),
        (502, b"<html>\n\x1b[31mbad", r"502: <html>  \[31mbad"),
        (302, b"", "302: "),
    ],
)
def test_refusals_are_told(listener: Listener, status: int, content: bytes, told: str) -> None:
    listener.answer = status, content
    with pytest.raises(PublishError, match=told):
        Server(listener.url, "key").check()
    assert len(listener.asked) == 1  # the key goes nowhere else
    with pytest.raises(PublishError, match=r"pirate is in here, but not published: .* answers"):
        Server(listener.url).publish("pirate", Path("here"))


def test_a_server_that_is_not_there_is_told(listener: Listener) -> None:
    with Listener() as gone:
        url = gone.url
    with pytest.raises(PublishError, match=f"{url} cannot be reached"):
        Server(url).check()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://h/\u00e9"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|no URL"):
        Server(url).check()


@pytest.mark.parametrize("user", ["user:hidden", ":hidden", "hidden"])
def test_a_secret_in_a_url_is_refused_and_not_told(user: str) -> None:
    with pytest.raises(ConfigError, match="expected") as told:
        Server(f"http://{user}@127.0.0.1:1").check()
    assert "hidden" not in str(told.value)


def test_the_key_comes_from_the_variable_that_is_named() -> None:
    assert key_from({}, None) is None
    assert key_from({"KEY": " secret\n"}, "KEY") == "secret"
    for environment in ({}, {"KEY": " "}):
        with pytest.raises(ConfigError, match="environment variable KEY"):
            key_from(environment, "KEY")
    for key in ("two\nlines", "caf\u00e9 \u20ac", "a\0b"):
        with pytest.raises(ConfigError, match="environment variable KEY") as told:
            key_from({"KEY": key}, "KEY")
        assert key not in str(told.value)
