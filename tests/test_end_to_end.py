"""The real thing: scripts/serve.py on the real demo model in float32, called by the openai client.

What it answers must be what transformers and peft answered, all adapters in one batch, also after
the engine was killed; and it must survive the usual bad input.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
from goldens.cases import Case, smollm2_cases

ROOT = Path(__file__).parents[1]
STEPS = 24


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    cases: list[Case]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    cases = smollm2_cases(smollm2, folder / "adapters")
    config = folder / "config.yaml"
    settings = {
        "cache_dir": str(folder / "cache"),
        "model": {
            "source": str(smollm2), "dtype": "float32", "served_name": "smollm2",
            "max_model_len": 256,
        },
        "pool": {"pages": 512},
        "adapters": {"roots": [str(folder / "adapters")], "max_rank": 64},
        "scheduler": {"max_running": 16, "max_step_tokens": 64},
        "server": {"port": 0},
    }  # fmt: skip
    config.write_text(json.dumps(settings))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "serve.py", "--config", config],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout is not None
    log = []
    for line in process.stdout:
        log.append(line)
        if found := re.search(r"Ready in .*: (http://\S+) \(smollm2 \+ 3 adapters, 512", line):
            break
    else:
        pytest.fail("the server did not start:\n" + "".join(log))
    with process, ThreadPoolExecutor(1) as pool:
        rest = pool.submit(process.stdout.read)  # so that the pipe never fills
        yield Server(process, found[1], cases)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, rest.result()


def ask(server: Server, case: Case, i: int) -> openai.types.Completion:
    return server.client.completions.create(
        model=case.adapter_dir.name if case.adapter_dir else "smollm2",
        prompt=list(case.prompts[i]),
        max_tokens=STEPS,
        temperature=0,
        logprobs=20,
        extra_body={"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False},
    )


def test_text_and_logprobs_equal_peft_in_one_batch(server: Server) -> None:
    jobs = [(case, i) for i in range(4) for case in server.cases]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: ask(server, *job), jobs))
    for (case, i), answer in zip(jobs, answers, strict=True):
        choice = answer.choices[0]
        assert choice.model_extra["token_ids"] == list(case.greedy[i]), case.name
        assert choice.text == case.texts[i]
        np.testing.assert_allclose(choice.logprobs.token_logprobs, case.logprobs[i], atol=2e-3)
        # Keyed by text, so that two tokens which read alike take one place.
        top = np.array(list(choice.logprobs.top_logprobs[0].values()))
        assert len(top) >= 18
        assert np.abs(top[:, None] - case.first_logprobs[i]).min(axis=1).max() <= 2e-3


def test_a_stream_is_the_same_text_and_ends_with_usage(server: Server) -> None:
    case = server.cases[1]
    chunks = list(
        server.client.completions.create(
            model=case.adapter_dir.name,
            prompt=list(case.prompts[0]),
            max_tokens=STEPS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == case.texts[0]
    assert chunks[-1].usage.completion_tokens == STEPS


def test_chat_and_models(server: Server) -> None:
    models = {model.id: model.model_extra for model in server.client.models.list()}
    names = {case.adapter_dir.name for case in server.cases if case.adapter_dir}
    assert models.keys() == {"smollm2", *names}
    assert all(models[name]["parent"] == "smollm2" for name in names)
    answer = server.client.chat.completions.create(
        model="smollm2", temperature=0, max_tokens=16,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )  # fmt: skip
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_bad_input_is_refused_and_the_server_goes_on(server: Server) -> None:
    url = server.url
    for status, path, body in (
        (404, "completions", {"model": "nobody", "prompt": "a"}),
        (400, "completions", {"model": "smollm2", "prompt": "a", "max_tokens": 1000}),
        (400, "completions", {"model": "smollm2", "prompt": [10**6]}),
        (400, "chat/completions", {"model": "smollm2", "messages": [], "tools": [{}]}),
        (400, "load_lora_adapter", {"lora_name": "x", "lora_path": "../../etc"}),
    ):
        answer = httpx.post(f"{url}/v1/{path}", json=body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", content=b"{").status_code in (400, 415)
    case = server.cases[0]
    assert ask(server, case, 0).choices[0].text == case.texts[0]


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(server: Server) -> None:
    case = server.cases[2]
    stream = server.client.completions.create(
        model=case.adapter_dir.name, prompt=list(case.prompts[0]), max_tokens=200, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    server.engine().kill()
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)
    deadline = time.monotonic() + 90
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline, "the engine did not come back"
        time.sleep(0.2)
    assert ask(server, case, 1).choices[0].text == case.texts[1]
