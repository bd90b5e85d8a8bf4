"""Training files: lines of JSON become examples, tokens of which some are to be learnt.

A line is `{"prompt": text, "completion": text}`, plain text as `/v1/completions` gets it, or
`{"messages": [{"role": ..., "content": ...}, ...]}`, to which the model's chat template is applied.
What is learnt are completions and assistants' turns, up to and with the token that ends them. The
tokens before them are exactly those that a request for them would have. Other keys of a line are
left alone. Rows of batches are made from examples in `jslora.training.packing`. Host only: no jax.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jslora.errors import ConfigError, InvalidRequest
from jslora.tokenizer import Tokenizer

MAX_LINE = 2**24  # bytes
_TOLD = 60  # characters of a wrong value


class DataError(ConfigError):
    """A training file cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One line: `tokens` int32 [n], and `learnt` bool [n], which of them are targets."""

    tokens: np.ndarray
    learnt: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The examples of one file, in its order, and what became of its lines.

    Attributes:
        cut: how many examples were longer than a row and lost their end.
        dropped: how many had nothing left to learn after that, and are not among `examples`.
    """

    name: str
    examples: tuple[Example, ...]
    cut: int
    dropped: int

    def split(self, fraction: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """(training, held out): `fraction` of the examples, drawn by the seed, is held out.

        Raises:
            DataError: one of them would be empty.
        """
        count = round(fraction * len(self.examples))
        if not 0 < count < len(self.examples):
            raise DataError(
                f"{self.name}: a held-out share of {fraction} of {len(self.examples)} examples is "
                f"{count}; both parts need at least one"
            )
        held = set(np.random.default_rng([seed, 1]).permutation(len(self.examples))[:count])
        kept = [example for index, example in enumerate(self.examples) if index not in held]
        apart = [example for index, example in enumerate(self.examples) if index in held]
        training = Corpus(self.name, tuple(kept), self.cut, self.dropped)
        return training, Corpus(self.name, tuple(apart), 0, 0)

    def told(self) -> str:
        """A line for people: how much there is, and what was cut or dropped."""
        tokens = sum(len(example) for example in self.examples)
        learnt = sum(int(example.learnt.sum()) for example in self.examples)
        lost = f", {self.cut} cut to the length of a row" if self.cut else ""
        lost += f", {self.dropped} more dropped whole" if self.dropped else ""
        return f"{self.name}: {len(self.examples)} examples, {tokens} tokens, {learnt} learnt{lost}"


def read(path: Path, tokenizer: Tokenizer, end_tokens: Sequence[int], length: int) -> Corpus:
    """Read a file of examples of at most `length` tokens.

    Args:
        end_tokens: ids that end an answer; a completion is followed by the tokenizer's own end
            token if that is one of them, else by the first.

    Raises:
        DataError: the model has no end token, the file cannot be read or holds no example, a line
            is not one of the two forms, or its tokens are not those that a request would have.
    """
    if not end_tokens:
        raise DataError(
            "the model's configuration names no end token, so nothing would end answers"
        )
    examples, cut, dropped = [], 0, 0
    for number, line in _lines(path):
        try:
            example = _example(line, tokenizer, end_tokens)
        except (_Wrong, InvalidRequest) as error:
            raise DataError(f"{path}:{number}: {error}") from None
        cut += len(example) > length
        example = Example(example.tokens[:length], example.learnt[:length])
        if example.learnt[1:].any():  # nothing comes before the first token to predict it
            examples.append(example)
        else:
            cut, dropped = cut - 1, dropped + 1
    if not examples:
        none = f"; in none of {dropped} is any of the first {length} tokens learnt"
        reason = none if dropped else ""
        raise DataError(f"{path} holds no example to learn from{reason}")
    return Corpus(path.name, tuple(examples), cut, dropped)


def read_parts(
    data: Path,
    held_out: float | Path,
    seed: int,
    tokenizer: Tokenizer,
    end_tokens: Sequence[int],
    length: int,
) -> tuple[Corpus, Corpus]:
    """(training, held out), read as `read` does.

    Args:
        held_out: a share of the examples of `data`, or another file.

    Raises:
        DataError: as `read`, or one of them would be empty.
    """
    corpus = read(data, tokenizer, end_tokens, length)
    if isinstance(held_out, Path):
        return corpus, read(held_out, tokenizer, end_tokens, length)
    return corpus.split(held_out, seed)


# Lines ------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with a line."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of lines that are not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE + 1):
                number += 1
                if len(data) > MAX_LINE:
                    raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes")
                if text := data.decode("utf-8").strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _example(line: str, tokenizer: Tokenizer, end_tokens: Sequence[int]) -> Example:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _Wrong(f"an object is expected, not {type(data).__name__}")
    chat, plain = "messages" in data, "prompt" in data or "completion" in data
    if chat == plain:
        raise _Wrong(
            'either "messages" or "prompt" and "completion" are expected; the keys are '
            f"{str(list(data))[:_TOLD]}"
        )
    if chat:
        return _conversation(_messages(data["messages"]), tokenizer, end_tokens)
    prompt, completion = _text(data, "prompt"), _text(data, "completion")
    return _completion(prompt, completion, tokenizer, end_tokens)


def _text(data: dict[str, Any], key: str) -> str:
    text = data.get(key)
    if not isinstance(text, str):
        raise _Wrong(f'"{key}" is {_shown(text)}; a string is expected')
    return text


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _Wrong(f'"messages" is {_shown(value)}; a list of at least one is expected')
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise _Wrong(f"messages[{index}] is {_shown(message)}; an object is expected")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _Wrong(
                    f"messages[{index}].{key} is {_shown(message.get(key))}; a string is expected"
                )
    if not any(message["role"] == "assistant" for message in value[1:]):
        raise _Wrong(
            'no message after the first has the role "assistant", so there is nothing to learn'
        )
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else json.dumps(value)[:_TOLD]


# Tokens -----------------------------------------------------------------------------------------


def _completion(
    prompt: str, completion: str, tokenizer: Tokenizer, end_tokens: Sequence[int]
) -> Example:
    if not completion:
        raise _Wrong('"completion" is empty')
    before, tokens = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    if tokens[: len(before)] != before:
        raise _Wrong(
            f"the completion changes the prompt's last tokens ({prompt[-10:]!r} and "
            f"{completion[:10]!r} meet); spaces and line ends between them belong to the completion"
        )
    own = tokenizer.eos_id
    end = own if own is not None and own in end_tokens else end_tokens[0]
    return _marked([*tokens, end], [(len(before), len(tokens) + 1)])


def _conversation(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, end_tokens: Sequence[int]
) -> Example:
    """All turns up to the last of an assistant, each after what a request for it would send.

    No request can be for a first turn, so that one is not learnt.
    """
    tokens: list[int] = []
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not index:
            continue
        before = tokenizer.apply_chat_template(messages[:index])
        after = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        if before[: len(tokens)] != tokens or after[: len(before)] != before:
            raise _Wrong(
                f"messages[{index}]: with the chat template its tokens do not follow those that a "
                "request for it would send; begin it without line ends or spaces, and where "
                "the template leaves out parts of earlier turns, train on one turn a line"
            )
        ends = [i for i in range(len(before), len(after)) if after[i] in end_tokens]
        if not ends:
            raise _Wrong(
                f"messages[{index}]: the chat template ends the turn with none of the model's end "
                f"tokens, {list(end_tokens)}"
            )
        tokens = after
        spans.append((len(before), ends[-1] + 1))
    return _marked(tokens[: spans[-1][1]], spans)


def _marked(tokens: list[int], spans: list[tuple[int, int]]) -> Example:
    learnt = np.zeros(len(tokens), bool)
    for first, end in spans:
        learnt[first:end] = True
    return Example(np.array(tokens, np.int32), learnt)
