"""A front end in a process of its own, with the fake engine behind it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

HERE = Path(__file__).parent
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
BASE: dict[str, Any] = {
    "model": {
        "source": "dummy",
        "architecture": SHAPE,
        "served_name": "base",
        "max_model_len": 256,
    },
    "server": {"port": 0, "max_body_bytes": 65536, "drain_seconds": 5},
    "adapters": {"preload": ["sql", "chat"]},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with one level of sections updated."""
    sections = {
        name: base.get(name, {}) | section
        for name, section in changes.items()
        if isinstance(section, dict)
    }
    return base | changes | sections


class Server:
    """One front-end process; `url` once it is ready."""

    def __init__(self, config: dict[str, Any], *fake: str, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "serve_fake.py", json.dumps(merged(BASE, config)), *fake],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        )
        self.url = self.ready_line = ""
        if wait:
            assert self.process.stdout is not None
            self.ready_line = self.process.stdout.readline()
            found = re.search(r"http://\S+", self.ready_line)
            assert found, f"not ready: {self.ready_line!r} {self.stop()}"
            self.url = found[0]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def engine(self) -> psutil.Process:
        """The engine process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.signal()
        return self.wait()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come to hold"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """The value of a metric whose series has these labels."""
    for line in client.get("/metrics").text.splitlines():
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == name and all(
            f'{label}="{text}"' in series for label, text in labels.items()
        ):
            return float(value)
    raise AssertionError(f"no metric {name} with {labels}")
