"""Starting, failing, draining and dying, of either process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_engine
import httpx
import psutil
import pytest
from server_harness import BASE, HERE, SHAPE, Server, merged, metric, until

from jslora.server import stand_in

SLOW = {"model": "sql", "prompt": "slow", "max_tokens": 200, "stream": True}


def frames(text: str) -> list[str]:
    """The data of a stream's frames."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


class Stream(threading.Thread):
    """A stream read in the background; `text`, `status` and `broken` when it has ended."""

    def __init__(self, url: str, body: dict) -> None:
        super().__init__()
        self.url, self.body, self.text, self.status = url, body, "", 0
        self.begun = threading.Event()
        self.broken = False
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.RemoteProtocolError:
            self.broken = True
        self.begun.set()

    def _read(self) -> None:
        with (
            httpx.Client(base_url=self.url, timeout=20) as client,
            client.stream("POST", "/v1/completions", json=self.body) as response,
        ):
            self.status = response.status_code
            for part in response.iter_text():
                self.text += part
                self.begun.set()


def streams(server: Server, count: int, body: dict = SLOW) -> list[Stream]:
    """Streams that have had a token each."""
    started = [Stream(server.url, body) for _ in range(count)]
    assert all(stream.begun.wait(10) for stream in started)
    return started


def test_the_ready_line_says_where_and_what(start: Callable[..., Server]) -> None:
    server = start({"adapters": {"preload": ["a", "b", "c"]}})
    what = re.escape(f"{server.url} (base + 3 adapters, 1024 pages)")
    assert re.fullmatch(rf"Ready in \d+\.\d s: {what}\n", server.ready_line)
    code, errors = server.stop()
    assert code == 0 and "compile: 100 %" in errors
    assert "cuda" not in errors.lower()


def test_the_death_of_the_engine_ends_streams_with_an_error(
    start: Callable[..., Server],
) -> None:
    server = start()
    client = httpx.Client(base_url=server.url, timeout=10)
    load = {"lora_name": "poet", "lora_path": "poems"}
    assert client.post("/v1/load_lora_adapter", json=load).is_success
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "chat"}).is_success
    open_streams = streams(server, 4)
    whole = Stream(server.url, SLOW | {"stream": False})
    time.sleep(0.1)
    server.engine().kill()
    until(lambda: client.get("/health").status_code == 503, 3.0)
    for stream in (*open_streams, whole):
        stream.join(5)
    for stream in open_streams:
        *_, error, done = frames(stream.text)
        assert json.loads(error)["error"]["type"] == "engine_error" and done == "[DONE]"
    assert whole.status == 503 and json.loads(whole.text)["error"]["type"] == "engine_error"

    until(lambda: client.get("/health").status_code == 200, 10)
    assert metric(client, "jslora:engine_restarts_total") == 1
    # What was loaded and unloaded at run time is as it was.
    assert {info["name"] for info in client.get("/v1/adapters").json()["data"]} == {"sql", "poet"}
    answer = client.post("/v1/completions", json={"model": "poet", "prompt": "hi"}).json()
    assert answer["choices"][0]["text"] == fake_engine.text("poet", "hi", 16)
    client.close()
    assert server.stop()[0] == 0


def test_an_unload_that_the_engines_death_cuts_short_has_succeeded(
    start: Callable[..., Server],
) -> None:
    server = start()
    with httpx.Client(base_url=server.url, timeout=10) as client, ThreadPoolExecutor(1) as pool:
        stream = streams(server, 1)[0]
        unload = pool.submit(client.post, "/v1/unload_lora_adapter", json={"lora_name": "sql"})
        until(lambda: client.get("/v1/models/sql").status_code == 404)
        server.engine().kill()
        assert unload.result().status_code == 200
        stream.join(5)
        until(lambda: client.get("/health").status_code == 200, 10)
        # The new engine had it from the configuration.
        assert {info["name"] for info in client.get("/v1/adapters").json()["data"]} == {"chat"}
        assert client.get("/v1/models/sql").status_code == 404
        load = {"lora_name": "sql", "lora_path": "sql"}
        assert client.post("/v1/load_lora_adapter", json=load).is_success
        server.engine().kill()
        until(lambda: client.get("/health").status_code == 503, 3.0)
        assert client.get("/v1/adapters").status_code == 503
        until(lambda: client.get("/health").status_code == 200, 10)
        assert client.post("/v1/completions", json=SLOW | {"prompt": "hi"}).is_success


def test_an_engine_that_dies_on_a_request_takes_only_that_time(
    start: Callable[..., Server],
) -> None:
    server = start()
    with httpx.Client(base_url=server.url, timeout=10) as client:
        response = client.post("/v1/completions", json={"model": "base", "prompt": "die"})
        assert response.status_code == 503 and response.headers["retry-after"]
        until(lambda: client.get("/health").status_code == 200, 10)
        assert client.post("/v1/completions", json={"model": "base", "prompt": "hi"}).is_success


def test_an_engine_that_keeps_dying_is_given_up(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    marker = tmp_path / "die"
    server = start({}, "--die-at-start", str(marker))
    stream = streams(server, 1)[0]
    marker.touch()
    server.engine().kill()
    server.process.wait(30)
    stream.join(5)
    assert frames(stream.text)[-1] == "[DONE]"
    code, errors = server.wait()
    assert code == 4 and "not started again" in errors


def test_restarts_can_be_left_to_somebody_else(start: Callable[..., Server]) -> None:
    server = start({"server": {"restart_engine": False}})
    stream = streams(server, 1)[0]
    server.engine().kill()
    stream.join(5)
    assert "engine_error" in frames(stream.text)[-2]
    assert server.wait()[0] == 4


@pytest.mark.parametrize(("kind", "code"), [("config_error", 2), ("model_error", 3)])
def test_a_start_that_fails_says_why_once(
    start: Callable[..., Server], kind: str, code: int
) -> None:
    server = start({}, "--fail", kind, wait=False)
    found, errors = server.wait()
    assert found == code
    assert errors.count("the model has 3 legs") == 1 and "Traceback" not in errors


def test_an_engine_that_cannot_start_at_all(start: Callable[..., Server], tmp_path: Path) -> None:
    marker = tmp_path / "die"
    marker.touch()
    code, errors = start({}, "--die-at-start", str(marker), wait=False).wait()
    assert code == 4 and "exited with code 7" in errors


def test_before_the_engine_is_ready_nothing_is_served(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start({"server": {"port": port}}, "--wait", "30", wait=False)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        until(lambda: _answers(client), 10)
        assert client.get("/health").status_code == 503
        response = client.post("/v1/completions", json=SLOW)
        assert response.status_code == 503 and response.headers["retry-after"] == "5"
        assert client.get("/health/live").json() == {"status": "starting"}
        assert client.get("/metrics").status_code == 200
    server.signal()
    code, _ = server.wait()
    assert code == 0


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/version").is_success
    except httpx.ConnectError:
        return False


def test_a_taken_port_is_a_configuration_error(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, errors = start({"server": {"port": port}}, wait=False).wait()
    assert code == 2 and f"127.0.0.1:{port}" in errors


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"source": "/nowhere/to/be/found"}, "/nowhere/to/be/found"),
        ({"architecture": SHAPE | {"vocab_size": 100}}, "vocab_size 100"),
        ({"architecture": {"architectures": ["Foo"]}}, "'Foo'"),
    ],
    ids=["missing", "small vocabulary", "unknown architecture"],
)
def test_a_model_that_cannot_be_served(
    start: Callable[..., Server], model: dict[str, object], message: str
) -> None:
    code, errors = start({"model": model}, wait=False).wait()
    assert code == 3 and message in errors and "Traceback" not in errors


def test_a_model_folder_and_synthetic_adapters(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    model, adapters = tmp_path / "model", tmp_path / "adapters"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    (model / "model.safetensors").touch()
    stand_in.write_tokenizer(model, 300)
    server = start(
        {
            "model": {"source": str(model), "architecture": None},
            "adapters": {"roots": [str(adapters)], "synthetic": {"count": 3}},
            "cache_dir": str(tmp_path / "cache"),
        }
    )
    assert len(list(adapters.glob("*/adapter_model.safetensors"))) == 3
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "hi"}).json()["tokens"]
    assert ids == list(b"hi")
    code, errors = server.stop()
    assert code == 0 and "adapters: 100 %" in errors


def test_synthetic_adapters_need_a_root(start: Callable[..., Server]) -> None:
    code, errors = start({"adapters": {"synthetic": {"count": 1}}}, wait=False).wait()
    assert code == 2 and "adapters.roots" in errors


def test_sigterm_lets_running_requests_finish(start: Callable[..., Server]) -> None:
    server = start()
    open_streams = streams(server, 3, SLOW | {"max_tokens": 8})
    with httpx.Client(base_url=server.url, timeout=10) as client:
        server.signal()
        until(lambda: client.get("/health").status_code == 503, 3.0)
        refused = client.post("/v1/completions", json=SLOW)
        assert refused.status_code == 503 and refused.headers["connection"] == "close"
        assert client.get("/health/live").status_code == 200
    for stream in open_streams:
        stream.join(10)
        *chunks, done = frames(stream.text)
        text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert text == fake_engine.text("sql", "slow", 8) and done == "[DONE]"
    code, errors = server.wait()
    assert code == 0, errors


@pytest.mark.parametrize("again", [False, True], ids=["late", "second signal"])
def test_a_drain_ends_in_time_with_error_frames(start: Callable[..., Server], again: bool) -> None:
    server = start({"server": {"drain_seconds": 30 if again else 0.3}})
    engine = server.engine()
    open_streams = streams(server, 3)
    server.signal()
    if again:
        time.sleep(0.2)
        server.signal(signal.SIGINT)
    for stream in open_streams:
        stream.join(10)
        *_, error, done = frames(stream.text)
        assert json.loads(error)["error"]["code"] == 503 and done == "[DONE]"
    assert server.wait()[0] == 0
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_the_engine_does_not_outlive_the_front_end(start: Callable[..., Server]) -> None:
    server = start()
    engine = server.engine()
    stream = streams(server, 1)[0]
    server.signal(signal.SIGKILL)
    stream.join(5)
    assert stream.broken
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(server: Server, stream: bool) -> None:
    body = json.dumps(SLOW | {"prompt": "slow slow", "stream": stream, "n": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with httpx.Client(base_url=server.url, timeout=10) as client:
        # The fake engine counts aborted sequences here.
        aborted = metric(client, "jslora:num_preemptions_total")
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            if stream:
                raw.recv(100)
            else:
                time.sleep(0.2)
        until(lambda: metric(client, "jslora:num_preemptions_total") == aborted + 3)
        assert metric(client, "jslora:request_success_total", finished_reason="abort") >= 3


def test_a_long_silence_is_filled_with_comments(server: Server) -> None:
    with (
        httpx.Client(base_url=server.url, timeout=10) as client,
        client.stream("POST", "/v1/completions", json=SLOW | {"prompt": "sleep", "max_tokens": 2})
        as response,
    ):  # fmt: skip
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == ": keep-alive" and lines[-1] == "data: [DONE]"
    assert 2 <= lines.count(": keep-alive") <= 3


def test_a_reader_that_stands_still_costs_bounded_memory(server: Server) -> None:
    memory = psutil.Process(server.process.pid).memory_info
    # More than what the kernel keeps for a connection: about 5 MB each.
    messages = [{"role": "user", "content": "x"}]
    wanted = {"messages": messages, "max_tokens": 220, "n": 16, "logprobs": True}
    body = json.dumps(SLOW | wanted | {"top_logprobs": 20}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    before = memory().rss
    readers = []
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for _ in range(3):
            raw = socket.create_connection(("127.0.0.1", server.port))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            readers.append(raw)
        until(lambda: metric(client, "jslora:num_requests_running") > 0)
        until(lambda: metric(client, "jslora:num_requests_running") == 0, 20)
        answer = client.post("/v1/completions", json={"model": "sql", "prompt": "hi"})
        assert answer.json()["choices"][0]["text"] == fake_engine.text("sql", "hi", 16)
        assert memory().rss - before < 64 * 2**20
        for raw in readers:
            raw.close()


# The command line ---------------------------------------------------------------------------------


def serve(tmp_path: Path, config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/serve.py."""
    file = tmp_path / "config.yaml"
    file.write_text(config)
    root = HERE.parents[1]
    return subprocess.run(
        [sys.executable, root / "scripts" / "serve.py", "--config", file, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    done = serve(tmp_path, "model: {source: x}\nserver: {prt: 1}\n")
    assert done.returncode == 2
    assert "server.prt" in done.stderr and "'port'" in done.stderr


def test_print_config_shows_no_keys(tmp_path: Path) -> None:
    config = "model: {source: x}\nauth: {keys: {very-secret: {tenant: t}}}\n"
    done = serve(tmp_path, config, "--print-config", "--set", "server.port=1234")
    assert done.returncode == 0
    assert "port: 1234" in done.stdout and "tenant: t" in done.stdout
    assert "very-secret" not in done.stdout


def test_check_forwards_the_plan_of_the_worker() -> None:
    program = (
        "import json, sys; from jslora import config; from jslora.server import frontend; "
        "sys.exit(frontend.check(config.parse(json.loads(sys.argv[1])), sys.argv[2:]))"
    )
    config = merged(BASE, {"pool": {"pages": 77}})
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(config), sys.executable,
         HERE / "fake_engine.py"],
        capture_output=True, text=True, timeout=30, cwd=HERE.parents[1],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "plan: 77 pages\n"), done.stderr
