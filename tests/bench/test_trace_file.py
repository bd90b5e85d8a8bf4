"""A trace is read back as it was written, and anything else is refused by its line."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.bench import trace_file
from jslora.bench.workload import Job, Trace
from jslora.errors import ConfigError

NAMES = st.text(min_size=1, max_size=20)
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8).map(tuple)
CHAT = st.lists(
    st.fixed_dictionaries({"role": NAMES, "content": st.text(max_size=9)}), min_size=1, max_size=3
).map(tuple)


def traces(prompts: st.SearchStrategy[Any]) -> st.SearchStrategy[Trace]:
    job: st.SearchStrategy[dict[str, Any]] = st.builds(
        dict, arrival=st.floats(0, 1e8), model=NAMES, prompt=prompts,
        output_tokens=st.integers(1, 2**20), tenant=NAMES, priority=st.integers(0, 100),
        ttft_slo=st.none() | st.floats(0, 3600, exclude_min=True),
    )  # fmt: skip
    return st.lists(job, min_size=1, max_size=6).map(
        lambda jobs: tuple(
            Job(index=index, **values)
            for index, values in enumerate(sorted(jobs, key=lambda values: values["arrival"]))
        )
    )


def read(content: bytes, endpoint: str = "completions", **how: int) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_bytes(content)
        return trace_file.load(path, endpoint, **how)


@settings(deadline=None)
@given(traces(IDS | st.text(min_size=1, max_size=9)))
def test_what_is_written_is_read_back(trace: Trace) -> None:
    content = trace_file.encode(trace)
    assert read(content) == trace
    assert read(content.replace(b"\n", b"\r\n\n")) == trace
    assert len(content.splitlines()) == len(trace)
    assert all(isinstance(json.loads(line), dict) for line in content.splitlines())


@settings(deadline=None)
@given(traces(CHAT))
def test_chats_are_read_back_for_the_chat_endpoint(trace: Trace) -> None:
    assert read(trace_file.encode(trace), "chat") == trace


def line(**values: Any) -> bytes:
    given = {"arrival": 1, "model": "m", "output_tokens": 4, **values}
    return json.dumps({key: each for key, each in given.items() if each != "leave out"}).encode()


def test_a_length_stands_for_random_ids_of_its_line() -> None:
    some = read(line(input_tokens=40) + b"\n" + line(input_tokens=9), vocab=50, seed=3)
    assert [job.input_tokens for job in some] == [40, 9]
    assert all(isinstance(token, int) and 0 <= token < 50 for token in some[0].prompt)
    assert read(line(input_tokens=40), vocab=50, seed=3)[0] == some[0]
    assert read(line(input_tokens=40), vocab=50, seed=4)[0].prompt != some[0].prompt
    assert some[0].prompt[:9] != some[1].prompt


def test_what_is_left_out_is_the_default() -> None:
    [job] = read(line(prompt=[7]))
    assert job == Job(index=0, arrival=1.0, model="m", prompt=(7,), output_tokens=4)
    assert (job.tenant, job.priority, job.ttft_slo) == ("default", 0, None)
    [text] = read(line(prompt="hi"), "chat")
    assert text.prompt == ({"role": "user", "content": "hi"},) and text.input_tokens == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b"\xff", "malformed"),
        (b'{"model": "\xff"}', "utf-8"),
        (b'{"messages": [' + b'{"a":' * 100_000, "recursion"),
        (line(), "one of prompt, messages and input_tokens"),
        (line(prompt=[1], input_tokens=3), "one of prompt, messages and input_tokens"),
        (line(prompt=[]), "prompt"),
        (line(prompt=""), "prompt"),
        (line(prompt=[-1]), "prompt"),
        (line(prompt=[1.5]), "prompt"),
        (line(prompt=[2**31]), "prompt"),
        (line(input_tokens=0), "input_tokens"),
        (line(input_tokens=2**20 + 1), "input_tokens"),
        (line(prompt=[1], output_tokens=0), "output_tokens"),
        (line(prompt=[1], output_tokens="leave out"), "output_tokens"),
        (line(prompt=[1], arrival=-1), "arrival"),
        (line(prompt=[1], arrival="0"), "arrival"),
        (line(prompt=[1], arrival=1).replace(b": 1,", b": 1e999,"), "arrival"),
        (line(prompt=[1], arrival=0.5), "arrival 0.5 is before 1.0 above it"),
        (line(prompt=[1], model=""), "model"),
        (line(prompt=[1], tenant=""), "tenant"),
        (line(prompt=[1], priority=101), "priority"),
        (line(prompt=[1], ttft_slo=0), "ttft_slo"),
        (line(prompt=[1], slo=3), "unknown field `slo`"),
        (line(messages=[]), "messages"),
        (line(messages=[{"role": "user"}]), "only be sent to the chat endpoint"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(line(prompt=[1]) + b"\n\n" + bad + b"\n")
    with pytest.raises(ConfigError, match=message) as error:
        trace_file.load(path)
    assert error.value.message.startswith(f"{path}:3: ")


def test_token_ids_are_not_for_the_chat_endpoint() -> None:
    with pytest.raises(ConfigError, match=r":1: the chat endpoint takes no token ids"):
        read(line(prompt=[1]), "chat")


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=":1: more than 16777216 bytes"):
        read(b" " * (trace_file.MAX_LINE_BYTES + 1))
    with pytest.raises(ConfigError, match=":65: a trace holds at most"):
        monkeypatch.setattr(trace_file, "draw_prompt", lambda rng, vocab, length: (1,))
        read((line(input_tokens=2**20) + b"\n") * 65)
    with pytest.raises(ConfigError, match="holds no requests"):
        read(b"\n\n")
    with pytest.raises(ConfigError, match="cannot read the trace"):
        trace_file.load(tmp_path / "none")


@settings(deadline=None)
@given(st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["arrival", "model", "prompt", "messages", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_a_trace_or_an_error_of_their_own(content: bytes) -> None:
    with suppress(ConfigError):
        assert read(content)
