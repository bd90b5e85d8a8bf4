"""The keeper of a follower starts it again whatever ended it, kills it when it hangs, and stops it
when it is told to; the real keeper, with stand-ins for the follower."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
    "vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIG = {
    "model": {"source": "dummy", "architecture": SHAPE},
    "mesh": {"model": 2},
    "distributed": {
        "coordinator": "127.0.0.1:9", "num_processes": 2, "process_id": 1,
        "token": "a token that nobody else knows", "heartbeat_seconds": 0.5,
    },
}  # fmt: skip
KEEPER = """
import json, sys
from jslora import config
from jslora.server import follow
follow.STOP_SECONDS = 0.5
sys.exit(follow.main(config.parse(json.loads(sys.argv[1])), [sys.executable, "-c", sys.argv[2]]))
"""
BEGIN = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
assert order["config"]["distributed"]["token"] == "a token that nobody else knows"
pulse = int(sys.argv[sys.argv.index("--pulse") + 1])
print("began", flush=True)
"""
ENDS = BEGIN + "sys.exit(5)"
HANGS = BEGIN + "time.sleep(60)"
LIVES = (
    BEGIN
    + """
import threading
def beat():
    while True:
        os.write(pulse, b".")
        time.sleep(0.1)
threading.Thread(target=beat, daemon=True).start()
sys.stdin.read()
print("told to end", flush=True)
"""
)


class Keeper:
    def __init__(self, follower: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", KEEPER, json.dumps(CONFIG), follower],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def until(self, words: str) -> None:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if words in line:
                return
        pytest.fail(f"no {words!r} in " + "".join(seen))


@pytest.fixture
def keeper(request: pytest.FixtureRequest) -> Iterator[Keeper]:
    keeper = Keeper(request.param)
    with keeper.process:
        yield keeper
        keeper.process.kill()


def children(keeper: Keeper) -> list[psutil.Process]:
    return psutil.Process(keeper.process.pid).children()


@pytest.mark.parametrize("keeper", [ENDS], indirect=True)
def test_a_follower_that_ended_is_started_again_and_later_each_time(keeper: Keeper) -> None:
    for pause in ("0.2", "0.4", "0.8"):
        keeper.until("began")
        keeper.until(f"ended with code 5; the next starts in {pause} s")


@pytest.mark.parametrize("keeper", [HANGS], indirect=True)
def test_a_follower_that_hangs_is_killed(keeper: Keeper) -> None:
    keeper.until("began")
    keeper.until("silent for 2 s and is killed")
    keeper.until("ended with code -9")
    keeper.until("began")


@pytest.mark.parametrize("keeper", [LIVES], indirect=True)
def test_a_follower_that_beats_lives_until_the_keeper_is_told(keeper: Keeper) -> None:
    keeper.until("began")
    (child,) = children(keeper)
    time.sleep(2.5)
    assert children(keeper) == [child], "it beats, so it must not be killed"
    keeper.process.send_signal(signal.SIGTERM)
    keeper.until("told to end")
    assert keeper.process.wait(10) == 0 and not child.is_running()


@pytest.mark.parametrize("keeper", [HANGS], indirect=True)
def test_a_keeper_that_is_told_twice_or_early_ends_too(keeper: Keeper) -> None:
    keeper.until("began")
    keeper.process.send_signal(signal.SIGINT)
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(10) == 0


def test_a_token_that_cannot_be_read_is_told_before_anything_starts(tmp_path: Path) -> None:
    group = CONFIG["distributed"] | {"token": None, "token_file": str(tmp_path / "absent")}
    text = json.dumps(CONFIG | {"distributed": group})
    run = subprocess.run(
        [sys.executable, "-c", KEEPER, text, ENDS], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=30,
    )  # fmt: skip
    assert run.returncode == 2 and "cannot be read" in run.stderr and "began" not in run.stdout
