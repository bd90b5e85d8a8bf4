"""Parts of the front end by themselves: channels, choices, bodies, progress, imports."""

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_harness import HERE

from jslora.errors import EngineFailed, InvalidRequest
from jslora.request import Request, SamplingParams, TokenEvent
from jslora.server import body, stand_in
from jslora.server.bars import Bars
from jslora.server.channel import Channel
from jslora.server.choice import Choice
from jslora.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    stand_in.write_tokenizer(folder, 300)
    return Tokenizer(folder)


def test_the_stand_in_tokenizer_has_a_token_per_byte(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tokenizer.encode("Grüße\n🙂") == list("Grüße\n🙂".encode())
    assert tokenizer.decode([260, 261]) == " t260 t261"


@settings(deadline=None)
@given(data=st.data())
def test_parts_join_to_the_text_however_events_are_grouped(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokens = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=5).map(sorted))
    echo = data.draw(st.sampled_from(["", "prompt"]))
    request = Request(id="r", prompt=(97,), params=SamplingParams(max_tokens=len(tokens)))
    choice = Choice(0, request, echo, tokenizer)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        last = end == len(tokens) and choice.completion_tokens + end - start == len(tokens)
        event = TokenEvent(id="r", tokens=tuple(tokens[start:end]))
        if choice.finish_reason is None:
            reason = "length" if last else None
            choice.feed(TokenEvent(id="r", tokens=event.tokens, finish_reason=reason))
        if part := choice.take():
            assert part.text or choice.finish_reason
            parts.append(part)
        if choice.finish_reason:
            break
    assert "".join(part.text for part in parts) == echo + bytes(tokens).decode("utf-8", "replace")
    assert [token for part in parts for token in part.tokens] == tokens


def test_a_late_reader_gets_everything_in_one_batch() -> None:
    async def run() -> None:
        cancelled: list[str] = []
        channel = Channel(["a", "b"], cancelled.extend)
        for i in range(100):
            channel.push(TokenEvent(id="a", tokens=(i,)))
        events = await channel.next(1)
        assert [event.tokens[0] for event in events] == list(range(100))
        assert await channel.next(0.01) == []
        channel.push(TokenEvent(id="a", finish_reason="stop"))
        channel.fail(EngineFailed("died"))
        assert len(await channel.next(1)) == 1  # what came before the failure is not lost
        with pytest.raises(EngineFailed):
            await channel.next(1)
        channel.close()
        channel.close()
        assert cancelled == ["b"]

    asyncio.run(run())


def test_a_waiting_reader_is_woken() -> None:
    async def run() -> None:
        channel = Channel(["a"], lambda ids: None)
        reader = asyncio.create_task(channel.next(5))
        await asyncio.sleep(0)
        channel.push(TokenEvent(id="a", finish_reason="stop"))
        assert len(await asyncio.wait_for(reader, 1)) == 1
        assert not channel.open

    asyncio.run(run())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


def depth(value: object) -> int:
    """Levels of lists and objects."""
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, inner), default=0)  # type: ignore[arg-type]


def integers(value: object) -> list[int]:
    """All integers in parsed JSON."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for part in inner for number in integers(part)]
    return [value] if type(value) is int else []


@given(value=st.lists(JSON, max_size=3), wraps=st.integers(0, 70))
def test_values_are_refused_exactly_when_out_of_bounds(value: list, wraps: int) -> None:
    for _ in range(wraps):
        value = [value]
    good = depth(value) <= body.MAX_DEPTH
    good &= all(abs(number) <= body.MAX_INT for number in integers(value))
    try:
        body.check_values(value)
    except InvalidRequest:
        assert not good
    else:
        assert good


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_per_tenth_or_a_bar() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        bars = Bars(out)
        for done in range(1001):
            bars("download", done, 1000, "model")
        bars("read", 5, 0, "unknown size")
        bars.close()
    lines = plain.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[3] == "download:  30 % model" and lines[-1].startswith("read:")
    assert "download: 100%" in terminal.getvalue()


@pytest.mark.parametrize("module", ["jslora.server.frontend", "jslora.server.app"])
def test_the_front_end_never_imports_jax(module: str) -> None:
    program = (
        f"import sys, {module}; "
        "print(sorted({'jax', 'jaxlib', 'flax', 'optax', 'torch', 'pickle5'} & set(sys.modules)))"
    )
    root = HERE.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


def test_server_modules_import_what_they_may() -> None:
    allowed = {"adapters", "aliases", "chat", "composition", "config", "distributed",
               "errors", "fetch", "logs", "model", "progress", "request", "server", "text",
               "tokenizer", "vocabulary", "wire"}  # fmt: skip
    for path in (HERE.parents[1] / "jslora" / "server").glob("*.py"):
        for line in Path(path).read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("jslora."):
                assert words[1].split(".")[1] in allowed, (path.name, line)
