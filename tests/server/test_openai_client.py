"""The API as OpenAI's own client sees it, with made-up tokens behind it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fake_engine
import openai
import pytest
from server_harness import Server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def prompt_of_chat(text: str) -> str:
    return f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize("model", ["base", "sql", "chat"])
def test_each_model_answers_with_its_own_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="hello", max_tokens=12)
    adapter = None if model == "base" else model
    assert answer.choices[0].text == fake_engine.text(adapter, "hello", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == model and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)


def test_answers_of_concurrent_requests_do_not_mix(client: openai.OpenAI) -> None:
    def ask(i: int) -> bool:
        model = ["base", "sql", "chat"][i % 3]
        answer = client.completions.create(model=model, prompt=f"prompt {i}", max_tokens=30)
        adapter = None if model == "base" else model
        return answer.choices[0].text == fake_engine.text(adapter, f"prompt {i}", 30)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_streamed_parts_join_to_the_whole_answer(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="sql", prompt="hello", max_tokens=20, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == fake_engine.text("sql", "hello", 20)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert last.choices == [] and last.usage.total_tokens == 25
    used = [c.usage.completion_tokens for c in chunks]
    assert used == sorted(used) and used[-1] == 20


def test_chat_streams_a_role_then_content_then_a_reason(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_completion_tokens=8,
        stream=True,
    )
    first, *middle, last = list(stream)
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content for chunk in middle)
    ids = _chat_ids("hi")
    assert text == "".join(chr(fake_engine.letter("chat", ids, i)) for i in range(8))
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert {chunk.object for chunk in (first, *middle, last)} == {"chat.completion.chunk"}


def _chat_ids(text: str) -> tuple[int, ...]:
    """The fixture's chat template by hand: the markers are tokens 257 and 258."""
    start, end = 257, 258
    return (start, *f"user\n{text}".encode(), end, 10, start, *b"assistant\n")


def test_chat_without_max_tokens_fills_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content) == answer.usage.completion_tokens


def test_choices_of_several_prompts_come_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="sql", prompt=["one", "two"], n=2, max_tokens=6, seed=5
    )
    texts = [choice.text for choice in answer.choices]
    one, two = (fake_engine.text("sql", prompt, 6) for prompt in ("one", "two"))
    assert texts == [one, one, two, two]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 24)


def test_a_stream_interleaves_choices_and_echoes_prompts(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="sql", prompt=["one", "two"], n=2, max_tokens=5, stream=True, echo=True
    )
    texts = dict.fromkeys(range(4), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    one, two = (p + fake_engine.text("sql", p, 5) for p in ("one", "two"))
    assert texts == {0: one, 1: one, 2: two, 3: two}


def test_usage_tells_what_was_cached(client: openai.OpenAI) -> None:
    """The fake engine has a prompt's tokens but the last when it saw all of them before."""

    def cached(prompt: str | list[str], salt: str | None = None, **fields: object) -> int:
        extra = {} if salt is None else {"extra_body": {"cache_salt": salt}}
        answer = client.completions.create(
            model="sql", prompt=prompt, max_tokens=2, **extra, **fields
        )
        if fields.get("stream"):
            *_, answer = answer
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("to be seen twice") == 0
    assert cached("to be seen twice") == 15
    assert cached("to be seen twice", salt="mine") == 0
    assert cached("to be seen twice", salt="mine") == 15
    usage = {"include_usage": True}
    assert cached("to be seen twice", stream=True, stream_options=usage) == 15
    # A prompt counts once, whatever n is.
    assert cached(["to be seen twice", "never seen"], n=3) == 15
    assert cached(["to be seen twice", "never seen"], n=3) == 15 + 9


def test_chat_usage_tells_what_was_cached(client: openai.OpenAI) -> None:
    def create(**fields: object) -> object:
        messages = [{"role": "user", "content": "cached?"}]
        return client.chat.completions.create(
            model="chat", messages=messages, max_tokens=2, **fields
        )

    first = create().usage
    assert first.prompt_tokens_details.cached_tokens == 0
    *_, last = create(stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1


def test_every_choice_of_a_chat_stream_has_its_role(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="sql", messages=[{"role": "user", "content": "hi"}], n=3, max_tokens=4, stream=True
    )
    roles, reasons = [], []
    for chunk in stream:
        choice = chunk.choices[0]
        roles += [choice.index] if choice.delta.role else []
        reasons += [choice.index] if choice.finish_reason else []
    assert sorted(roles) == [0, 1, 2] and sorted(reasons) == [0, 1, 2]


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105], [97]]])
def test_prompts_may_be_token_ids(client: openai.OpenAI, prompt: list) -> None:
    answer = client.completions.create(model="base", prompt=prompt, max_tokens=4)
    assert answer.choices[0].text == fake_engine.text(None, "hi", 4)


def test_a_stop_string_ends_the_text_and_the_sequence(client: openai.OpenAI) -> None:
    full = fake_engine.text("sql", "hello", 100)
    stop = full[10:13]
    cut = full[: full.index(stop)]
    plain = client.completions.create(model="sql", prompt="hello", max_tokens=100, stop=[stop])
    assert plain.choices[0].text == cut
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].stop_reason == stop
    assert plain.usage.completion_tokens == len(cut) + 3
    stream = client.completions.create(
        model="sql", prompt="hello", max_tokens=100, stop=stop, stream=True,
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == cut + stop


def test_end_tokens_and_stop_ids_end_the_sequence(client: openai.OpenAI) -> None:
    ended = client.completions.create(model="base", prompt="eos", max_tokens=9).choices[0]
    assert (len(ended.text), ended.finish_reason) == (3, "stop")
    assert not hasattr(ended, "stop_reason")
    ignored = client.completions.create(
        model="base", prompt="eos", max_tokens=9, extra_body={"ignore_eos": True}
    ).choices[0]
    assert (len(ignored.text), ignored.finish_reason) == (9, "length")
    text = fake_engine.text(None, "hello", 9)
    stopped = client.completions.create(
        model="base", prompt="hello", max_tokens=9, extra_body={"stop_token_ids": [ord(text[4])]}
    ).choices[0]
    assert stopped.text == text[: text.index(text[4])]
    assert stopped.stop_reason == ord(text[4])


def test_characters_are_streamed_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="base", prompt="umlaut", max_tokens=9, stream=True)
    texts = [chunk.choices[0].text for chunk in stream]
    assert texts == ["ä", "ä", "ä", "ä", "\ufffd"]


def test_completion_logprobs_with_echo(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model="base", prompt="abc", max_tokens=2, logprobs=2, echo=True
    ).choices[0]
    text = fake_engine.text(None, "abc", 2)
    assert choice.text == "abc" + text
    logprobs = choice.logprobs
    assert logprobs.tokens == [*"abc", *text]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"b": -0.5, "c": -1.5}
    assert logprobs.text_offset == [0, 1, 2, 3, 4]


def test_scoring_a_prompt_generates_nothing(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model="base", prompt="abc", max_tokens=0, logprobs=0, echo=True
    ).choices[0]
    assert choice.text == "abc" and choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    bare = client.completions.create(model="base", prompt="abc", max_tokens=0, echo=True)
    assert bare.choices[0].text == "abc" and bare.choices[0].logprobs is None


def test_streamed_completion_logprobs_have_running_offsets(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="base", prompt="abc", max_tokens=3, logprobs=1, stream=True
    )
    offsets = [offset for c in stream for offset in c.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=3,
        logprobs=True, top_logprobs=2, stream=stream,
    )  # fmt: skip
    if stream:
        entries = [
            e for c in answer if c.choices[0].logprobs for e in c.choices[0].logprobs.content
        ]
    else:
        entries = answer.choices[0].logprobs.content
    assert len(entries) == 3
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token and entry.logprob == -0.5
        assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5]
        assert entry.top_logprobs[0].token == entry.token


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned_on_request(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="base", prompt="abc", max_tokens=3, stream=stream,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert choices[0].prompt_token_ids == list(b"abc")
    assert all(not hasattr(choice, "prompt_token_ids") for choice in choices[1:])
    ids = [id for choice in choices for id in choice.token_ids]
    assert bytes(ids).decode() == fake_engine.text(None, "abc", 3)


def test_chat_token_ids(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert tuple(answer.prompt_token_ids) == _chat_ids("hi")
    assert bytes(answer.choices[0].token_ids).decode() == answer.choices[0].message.content


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() >= {"base", "sql", "chat"}
    assert models["base"].parent is None and models["sql"].parent == "base"
    assert client.models.retrieve("sql").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_unknown_model_is_never_the_base(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="hi")
    assert caught.value.status_code == 404 and caught.value.param == "model"


def test_a_stream_that_fails_raises_in_the_client(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="base", prompt="corrupt", max_tokens=9, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="not finite"):
        seen += stream
    whole = pytest.raises(openai.InternalServerError, match="not finite")
    with whole as caught:
        client.completions.create(model="base", prompt="corrupt", max_tokens=9)
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_is_a_status(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="base", prompt="refuse", stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
