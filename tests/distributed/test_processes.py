"""A group of real processes: `serve.py` on two hosts that are this machine, two devices each.

What it answers must be what transformers and PEFT answered. Then one thing after the other goes
wrong: each must be noticed in the stated time, end every open stream with an error frame and never
with a wrong token, and the group must serve again without anybody's help, with the adapters it had.
Between the hosts lies a proxy that can turn a bit. One group serves all tests, in their order.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import oracle
import psutil
import pytest
from engine_helpers import write_tokenizer
from goldens.cases import Case, cases
from loopback import free_ports

ROOT = Path(__file__).parents[2]
HEARTBEAT = 3.0
NOTICED = HEARTBEAT + 2.0
"""Seconds in which a loss must be noticed, whatever it is; most are in a tenth of one."""

AGAIN = 90.0
"""Seconds in which the group must serve again; a machine with other work takes most of a minute."""

STEPS = 120
ADAPTERS = ("r1", "r5", "r8-rslora", "r64-regex", "layer1", "patterns")
LATE = "late"


class Proxy:
    """Passes on what it gets; on request it turns one bit of what the leader says next."""

    def __init__(self, target: int) -> None:
        self._target, self._closed = target, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.turn = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                for ends, orders in (((near, far), False), ((far, near), True)):
                    threading.Thread(target=self._pass, args=(*ends, orders), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, orders: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if orders and len(data) > 200 and self.turn.is_set():  # no beat is so long
                    self.turn.clear()
                    data[150] ^= 4
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@dataclass
class Host:
    """A `serve.py` and what it prints."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def await_line(self, pattern: str, seconds: float, start: int = 0) -> re.Match[str]:
        """The first line, after so many, in which there is the pattern."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.lines[start:]:
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.02)
        pytest.fail(f"no {pattern!r} in {seconds} s:\n" + "".join(self.lines))

    def child(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, "".join(self.lines)


@dataclass
class Hosts:
    leader: Host
    follower: Host
    proxy: Proxy
    url: str
    roots: tuple[Path, Path]

    def ask(self, model: str, prompt: list[int], steps: int) -> list[int]:
        answer = self.post(request(model, prompt, steps))
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return list(choice["token_ids"])

    def stream(self, model: str, prompt: list[int], started: threading.Barrier) -> "Ending":
        """Follow a stream to its end, however that comes."""
        body, ending = request(model, prompt, STEPS) | {"stream": True}, Ending()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    before = len(ending.tokens)
                    ending.take(json.loads(line.removeprefix("data: ")))
                    if not before and ending.tokens:
                        started.wait(30)
        ending.at = time.monotonic()
        return ending

    def wait_for(self, model: str, prompt: list[int]) -> "Refusal":
        """Ask for an answer in one piece that the group does not live to give."""
        answer = self.post(request(model, prompt, STEPS))
        return Refusal(answer, time.monotonic())

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def health(self) -> int:
        return httpx.get(f"{self.url}/health", timeout=10).status_code

    def await_health(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.health() != 200:
            assert time.monotonic() < end, "".join(self.leader.lines + self.follower.lines)
            time.sleep(0.05)

    def load(self, name: str, path: str) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path}
        return httpx.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=60)


@dataclass
class Ending:
    """What came of a stream: its tokens, and the error frame that ended it, if one did."""

    tokens: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    at: float = 0.0

    def take(self, frame: dict[str, Any]) -> None:
        if "error" in frame:
            self.error = frame["error"]
        else:
            self.tokens += frame["choices"][0].get("token_ids") or []


@dataclass
class Refusal:
    """What came of a request that was not streamed, and when."""

    answer: httpx.Response
    at: float

    def check(self) -> None:
        """It is an error after which clients may try again."""
        assert self.answer.status_code == 503, self.answer.text
        assert self.answer.json()["error"]["code"] == 503
        assert int(self.answer.headers["Retry-After"]) >= 1


def request(model: str, prompt: list[int], steps: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": prompt, "max_tokens": steps, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, Case]:
    """The cases of the tiny model with four kv heads, by adapter."""
    found = {case.name.removeprefix("llama/"): case for case in cases()}
    return {name: found[name] for name in ("base", *ADAPTERS)}


@pytest.fixture(scope="module")
def hosts(golden: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    model = shutil.copytree(golden["base"].model_dir, folder / "model")
    write_tokenizer(model)
    roots = folder / "root-0", folder / "root-1"
    for root in roots:
        for name in ADAPTERS:
            shutil.copytree(golden[name].adapter_dir or "", root / name)
        shutil.copytree(root / "r5", root / "elsewhere" / LATE)
    coordinator, control = free_ports(2)
    proxy = Proxy(control)
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings(model, coordinator, control)))  # JSON is YAML
    own = [
        [f"adapters.roots=[{root}]", f"cache_dir={folder / f'cache-{n}'}"]
        for n, root in enumerate(roots)
    ]
    second = ["distributed.process_id=1", f"distributed.control_port={proxy.port}", *own[1]]
    with contextlib.ExitStack() as stack:
        stack.callback(proxy.close)
        leader = start(stack, config, own[0])
        refuse_another_configuration(stack, leader, config, second)
        follower = start(stack, config, second)
        found = leader.await_line(r"Ready in .*: (http://\S+) \(tiny \+ 6 adapters", AGAIN)
        yield Hosts(leader, follower, proxy, found[1], roots)
        leader.stop()
        follower.await_line("told to stop", 10)
        follower.stop()


def settings(model: Path, coordinator: int, control: int) -> dict[str, Any]:
    return {
        "model": {
            "source": str(model), "dtype": "float32", "served_name": "tiny", "max_model_len": 160,
        },
        "pool": {"pages": 40},  # not for all adapters beside a batch
        "adapters": {"max_rank": 64},
        "scheduler": {"max_running": 8, "max_step_tokens": 16},
        "mesh": {"model": 4, "lora": "fully_sharded"},
        "server": {"port": 0},
        "distributed": {
            "coordinator": f"127.0.0.1:{coordinator}", "control_port": control,
            "num_processes": 2, "token": "${GROUP_TOKEN}", "heartbeat_seconds": HEARTBEAT,
            "step_seconds": 20, "digest_every": 4,
        },
    }  # fmt: skip


def start(stack: contextlib.ExitStack, config: Path, overrides: list[str]) -> Host:
    """A `serve.py` that ends with the stack, if it did not before."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--config", str(config)]
    command += [part for override in overrides for part in ("--set", override)]
    environment = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "GROUP_TOKEN": "only for this test",
        # Programs are compiled at each start, and must not take long here.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    stack.enter_context(process)
    stack.callback(process.kill)
    return Host(process)


def refuse_another_configuration(
    stack: contextlib.ExitStack, leader: Host, config: Path, second: list[str]
) -> None:
    """A host with another configuration is told so, and so is the leader, who waits on."""
    wrong = start(stack, config, [*second, "pool.pages=128"])
    words = "pool.pages is 40 on process 0 and 128 on process 1"
    wrong.await_line(f"the leader refuses process 1: {words}", 30)
    leader.await_line(f"process 1 is refused: {words}", 10)
    wrong.stop()


def expect(case: Case, prompt: list[int], tokens: list[int]) -> None:
    """Tokens are the oracle's, up to a near-tie of the two likeliest."""
    weights = oracle.load_tensors(case.model_dir / "model.safetensors")
    config = json.loads((case.model_dir / "config.json").read_text())
    adapter = oracle.load_adapter(case.adapter_dir) if case.adapter_dir else None
    logits = oracle.forward(weights, config, [*prompt, *tokens], adapter)[len(prompt) - 1 : -1]
    for found, row in zip(tokens, logits, strict=True):
        second, best = np.sort(row)[-2:]
        if best - second < 1e-4:
            return
        assert found == row.argmax()


# The tests, in order ------------------------------------------------------------------------------


def test_tokens_are_those_of_one_device(hosts: Hosts, golden: dict[str, Case]) -> None:
    """All adapters at once, in a pool that does not hold them all; they come and go."""
    asked = [
        (case, "tiny" if name == "base" else name, n)
        for name, case in golden.items()
        for n in range(len(case.prompts))
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = [
            pool.submit(hosts.ask, model, case.prompts[n], len(case.greedy[n]))
            for case, model, n in asked
        ]
        for (case, _, n), answer in zip(asked, answers, strict=True):
            ties = np.flatnonzero(case.gaps[n] < 1e-4)
            sure = int(ties[0]) if len(ties) else len(case.greedy[n])
            assert sure > 0 and answer.result()[:sure] == case.greedy[n][:sure]
    metrics = httpx.get(f"{hosts.url}/metrics").text
    assert re.search(r"^jslora:lora_evictions_total\S* [1-9]", metrics, re.MULTILINE), metrics


def test_nobody_listens_but_on_the_interface(hosts: Hosts) -> None:
    for process in (hosts.leader.child(), hosts.follower.child()):
        found = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        assert found and {ip.removeprefix("::ffff:") for ip in found} == {"127.0.0.1"}


def test_other_bytes_on_one_host_are_refused_by_its_name(
    hosts: Hosts, golden: dict[str, Case]
) -> None:
    for root in hosts.roots:
        shutil.copytree(root / "r5", root / "twisted")
    file = hosts.roots[1] / "twisted" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused = hosts.load("twisted", "twisted")
    assert refused.status_code == 400
    assert "process 1 has other contents in 'twisted'" in refused.json()["error"]["message"]
    case = golden["base"]
    expect(case, case.prompts[0], hosts.ask("tiny", case.prompts[0], 8))
    assert hosts.load(LATE, f"elsewhere/{LATE}").status_code == 200
    assert hosts.health() == 200


def kill_follower(hosts: Hosts) -> None:
    hosts.follower.child().kill()


def stop_follower(hosts: Hosts) -> None:
    hosts.follower.child().suspend()


def kill_leader(hosts: Hosts) -> None:
    hosts.leader.child().kill()


def stop_leader(hosts: Hosts) -> None:
    hosts.leader.child().suspend()


def turn_a_bit(hosts: Hosts) -> None:
    hosts.proxy.turn.set()


@pytest.mark.parametrize(
    ("fault", "follower_says"),
    [
        (turn_a_bit, "sent a message .* that was changed on its way"),
        (kill_follower, "ended with code -9"),
        (kill_leader, "the leader is gone|gives up: .* Gloo"),  # whichever is first
        (stop_follower, "has been silent for"),
        (stop_leader, "the leader was silent for 3 s|the leader is gone|gives up: .* Gloo"),
    ],
)
def test_a_fault_is_noticed_and_mended(
    hosts: Hosts, golden: dict[str, Case], fault: Callable[[Hosts], None], follower_says: str
) -> None:
    models = {"tiny": golden["base"], "patterns": golden["patterns"], LATE: golden["r5"]}
    said, started = len(hosts.follower.lines), threading.Barrier(len(models) + 1)
    with ThreadPoolExecutor(len(models) + 1) as pool:
        streams = {
            model: pool.submit(hosts.stream, model, case.prompts[0], started)
            for model, case in models.items()
        }
        whole = pool.submit(hosts.wait_for, "tiny", golden["base"].prompts[1])
        started.wait(30)
        fault(hosts)
        began = time.monotonic()
        endings = {model: stream.result(NOTICED + 10) for model, stream in streams.items()}
        refusal = whole.result(NOTICED + 10)
    refusal.check()
    assert refusal.at - began < NOTICED
    for model, case in models.items():
        ending = endings[model]
        assert ending.error is not None and ending.error["code"] == 503
        assert ending.at - began < NOTICED
        assert 0 < len(ending.tokens) < STEPS
        expect(case, case.prompts[0], ending.tokens)
    assert hosts.health() == 503
    asked = time.monotonic()
    at_once = hosts.wait_for("tiny", golden["base"].prompts[0])
    at_once.check()
    assert at_once.at - asked < HEARTBEAT
    hosts.await_health(AGAIN)
    hosts.follower.await_line(follower_says, 1, said)
    for model, case in models.items():
        expect(case, case.prompts[1], hosts.ask(model, case.prompts[1], 8))
