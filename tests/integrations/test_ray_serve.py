"""scripts/serve_ray.py with two replicas of a tiny model and adapters for both: who answers what,
how often adapters are loaded, and what clients see when a replica dies or hangs.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; it is the extra ray"
    ),
    pytest.mark.timeout(200),  # the first waits for two engines to compile
]

ROOT = Path(__file__).parents[2]
ADAPTERS, ROOM, RUNNING = 40, 20, 4
NAMES = [f"adapter-{index:03d}" for index in range(ADAPTERS)]
PAGES = 4  # of an adapter
MODELS = ["/v1/models"] * 16
JSON = {"Content-Type": "application/json"}
KEYS = {"root-secret": {"admin": True}, "user-secret": {"tenant": "someone"}}
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
    "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


def settings(folder: Path) -> dict[str, Any]:
    """Room for half of the adapters, and a page for each sequence that runs."""
    return {
        "cache_dir": str(folder / "cache"),
        "model": {
            "source": "dummy", "architecture": ARCHITECTURE, "dtype": "float32",
            "max_model_len": 64,
        },
        "pool": {"pages": PAGES * ROOM + 4 * RUNNING + 1, "prefix_cache": False},
        "adapters": {
            "roots": [str(folder / "adapters")], "max_rank": 8,
            "synthetic": {
                "count": ADAPTERS, "ranks": [8],
                "targets": [["q_proj", "k_proj", "v_proj", "o_proj"]],
            },
        },
        "scheduler": {"max_running": RUNNING, "max_step_tokens": 16},
        "server": {"port": 0, "max_body_bytes": 65536, "drain_seconds": 5},
        "auth": {"keys": KEYS},
    }  # fmt: skip


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": "Bearer root-secret"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def replicas(self) -> list[psutil.Process]:
        """The processes that Ray runs replicas in."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            if "ray::ServeReplica" in title and ":Replica" in title:
                found.append(child)
        return found

    def metric(self, name: str) -> dict[str, float]:
        """A metric of each replica."""
        pattern = rf'^jslora:{name}\{{.*replica="(\w+)".*\}} (\S+)$'
        text = self.http.get("/metrics").text
        return {id: float(value) for id, value in re.findall(pattern, text, re.MULTILINE)}

    def ask(self, model: str, tokens: int = 8, **fields: Any) -> httpx.Response:
        body = {
            "model": model, "prompt": "Hello!", "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        return self.http.post("/v1/completions", json=body | fields)

    def stream(self, model: str, tokens: int) -> tuple[int, str, list[Any]]:
        """Status, text, and the frames of a streamed answer."""
        body = {
            "model": model, "prompt": "Hello!", "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return answer.status_code, "", [json.loads(answer.read())]
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1:]
        frames = [json.loads(line) for line in lines[:-1]]
        text = "".join(f["choices"][0]["text"] for f in frames if "choices" in f)
        return 200, text, frames


def patiently(ask: Callable[..., httpx.Response], *arguments: Any, **fields: Any) -> httpx.Response:
    """Ask again when told to, as clients do."""
    for _ in range(50):
        answer = ask(*arguments, **fields)
        if answer.status_code != 503:
            return answer
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
    raise AssertionError(answer.text)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come to hold"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ray")
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings(folder)))  # JSON is YAML
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "serve_ray.py", "--config", config, "--replicas", "2"],
        stdout=log, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = (folder / "log").read_text
    until(lambda: "\nReady in" in lines() or process.poll() is not None, 120)
    found = re.search(r"\nReady in .* (http://\S+) \(base, 2 replicas\)", lines())
    assert found, lines()
    server = Server(process, found[1])
    with log, server.http:
        yield server
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, lines()
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left, f"still there: {left}"


def test_adapters_have_homes_and_are_loaded_once(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(server.ask, NAMES * 6))
    texts = [text_of(answer) for answer in answers]
    assert texts == texts[:ADAPTERS] * 6
    assert len(set(texts[:ADAPTERS])) > ADAPTERS // 2, "adapters answer differently"
    time.sleep(1.5)  # engines tell their statistics once a second
    assert sum(server.metric("lora_loads_total").values()) <= 1.2 * ADAPTERS
    assert [*server.metric("lora_adapters_device").values()] == [ROOM, ROOM]


def test_scaled_adapters_are_asked_for_where_they_are(server: Server) -> None:
    before = sum(server.metric("lora_loads_total").values())
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda n: server.ask("base", adapters=[{"name": n, "scale": 0.5}]), NAMES)
        )
    assert len({text_of(answer) for answer in answers}) > ADAPTERS // 2
    assert {answer.json()["model"] for answer in answers} == {"base"}
    time.sleep(1.5)
    assert sum(server.metric("lora_loads_total").values()) - before <= 0.2 * ADAPTERS


def test_errors_are_the_servers(server: Server) -> None:
    http = server.http
    cases = [
        (401, http.post("/v1/completions", json={}, headers={"Authorization": "Bearer wrong"})),
        (401, http.get("/v1/models", headers={"Authorization": ""})),
        (403, http.delete("/v1/aliases/x", headers={"Authorization": "Bearer user-secret"})),
        (404, server.ask("nobody")),
        (404, server.ask("base", adapters=[{"name": "nobody"}])),
        (400, server.ask("base", adapters=[{"name": NAMES[0]}, {"name": NAMES[1]}])),
        (400, server.ask("base", adapters=7)),
        (404, http.get("/nothing")),
        (405, http.put("/v1/completions", json={})),
        (400, server.ask("base", tokens=1000)),
        (400, http.post("/v1/completions", json={"model": "base"})),
        (400, http.post("/v1/completions", content=b'{"model":', headers=JSON)),
        (400, http.post("/v1/completions", content=b"[" * 10000, headers=JSON)),
        (413, http.post("/v1/completions", content=b" " * 70000, headers=JSON)),
        (415, http.post("/v1/completions", content=b"{}")),
    ]
    for status, answer in cases:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == status
        assert len(answer.headers.get_list("x-request-id", split_commas=True)) == 1
    assert http.get("/health", headers={"Authorization": ""}).json() == {"status": "ready"}
    assert http.get("/health/live").status_code == 200


def test_a_stream_is_a_stream_and_says_the_same(server: Server) -> None:
    whole = text_of(server.ask("adapter-003", tokens=50))
    status, text, frames = server.stream("adapter-003", 50)
    assert (status, text) == (200, whole)
    assert len(frames) > 5


def test_changes_reach_every_replica_and_those_that_come_later(server: Server) -> None:
    load = {"lora_name": "late", "lora_path": "adapter-007"}
    assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 400
    assert server.http.put("/v1/aliases/best", json={"targets": {"late": 1}}).status_code == 200
    gone = {"lora_name": "adapter-039"}
    assert server.http.post("/v1/unload_lora_adapter", json=gone).status_code == 200
    expected = text_of(server.ask("adapter-007"))

    def check() -> None:
        with ThreadPoolExecutor(8) as pool:
            lists = list(pool.map(lambda path: patiently(server.http.get, path), MODELS))
        for answer in lists:
            models = {model["id"] for model in answer.json()["data"]}
            assert {"late", "best"} <= models and "adapter-039" not in models
        assert patiently(server.ask, "adapter-039").status_code == 404
        for name in ("late", "best"):
            assert text_of(patiently(server.ask, name)) == expected

    check()
    before = server.metric("engine_up")
    server.replicas()[0].kill()
    until(lambda: len(server.metric("engine_up").keys() - before.keys()) == 1)
    check()


def test_a_killed_replica_is_told_as_503_or_an_error_frame(server: Server) -> None:
    names = NAMES[:10]
    whole = {name: text_of(patiently(server.ask, name, tokens=50)) for name in names}
    before, seen = server.metric("engine_up"), Counter[str]()
    assert len(before) == 2
    ends = time.monotonic() + 6

    def client(number: int) -> None:
        while time.monotonic() < ends:
            name = names[(number + seen.total()) % len(names)]
            if number % 2:
                answer = server.ask(name, tokens=50)
                status, failed = answer.status_code, False
                text = text_of(answer) if status == 200 else answer.headers["retry-after"]
            else:
                status, text, frames = server.stream(name, 50)
                failed = "error" in frames[-1]
            assert status in (200, 503), status
            if status == 200 and not failed:
                assert text == whole[name]
            elif status == 200:
                assert whole[name].startswith(text)
            seen["cut off" if failed else str(status)] += 1

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        time.sleep(1.5)
        server.replicas()[0].kill()
        for each in clients:
            each.result()
    assert seen["200"] > 20
    assert seen["503"] + seen["cut off"] <= 8, seen  # what the replica was at, and no more
    until(lambda: len(server.metric("engine_up").keys() - before.keys()) == 1)
    assert text_of(patiently(server.ask, names[0], tokens=50)) == whole[names[0]]


def test_nobody_waits_for_a_replica_that_hangs(server: Server) -> None:
    hung = server.replicas()[0]
    hung.suspend()
    try:
        # Homes are on both; the one that hangs is silent for less than the client waits.
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(server.ask, NAMES[:4]))
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert any(answer.status_code == 503 for answer in answers)
    finally:
        hung.resume()
    until(lambda: all(server.ask(name).status_code == 200 for name in NAMES[:4]))
