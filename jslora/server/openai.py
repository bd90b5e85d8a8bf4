"""How OpenAI's API words an answer: the JSON of completions and chat, whole and in chunks.

Only shapes live here, as msgspec structs, since one is encoded for every token. A field with a
default is left out when it holds it; one without is always there, as clients expect null.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from jslora.request import TokenLogprob
from jslora.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


Logprobs = ChatLogprobs | CompletionLogprobs


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chat message, or the part of one that a chunk adds."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    index: int
    delta: Message
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class CompletionChoice(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The same in a whole answer and in a chunk."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_token_ids: Sequence[int] | None = None
    token_ids: list[int] | None = None


AnyChoice = ChatChoice | ChatChunkChoice | CompletionChoice


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The envelope of a whole answer and of a chunk."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[AnyChoice]
    system_fingerprint: str
    usage: Usage | None = None
    prompt_token_ids: Sequence[int] | None = None


def usage(prompt: int, completion: int, cached: int) -> Usage:
    """Token counts; `cached` of the prompt's tokens were in the prefix cache."""
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def frame(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(payload) + b"\n\n"


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The logprobs of chat: every token as text and as bytes."""

    def top(token: int, logprob: float) -> TopLogprob:
        raw = tokenizer.token_bytes(token)
        return TopLogprob(tokenizer.token_text(token), _finite(logprob), list(raw))

    content = []
    for entry in entries:
        own = top(entry.token, entry.logprob)
        others = [top(token, logprob) for token, logprob in entry.top]
        content.append(ChatLogprob(own.token, own.logprob, own.bytes, others))
    return ChatLogprobs(content)


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    offset: int,
) -> CompletionLogprobs:
    """The logprobs of completions; `offset` counts the characters before the first token."""
    texts = [tokenizer.token_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        offsets,
        texts,
        [None if entry is None else _finite(entry.logprob) for entry in entries],
        [None if entry is None else _top(tokenizer, entry) for entry in entries],
    )


def _top(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """Alternatives by text, the likeliest winning where texts are equal, and the token itself."""
    found: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        found.setdefault(tokenizer.token_text(token), _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    """JSON has no infinity; NaN must not get here."""
    assert not math.isnan(logprob), "a NaN log-probability left the engine"
    return max(logprob, LOWEST_LOGPROB)
