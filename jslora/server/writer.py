"""How a job's answer is worded, whole or as a stream: one writer for completions, one for chat.

A stream is, per choice: for chat a frame with the role, a frame for every part, a frame with the
finish reason (completions put it in the last part's); then the usage if it was asked for, and
`[DONE]`. An error anywhere takes the place of what is left before `[DONE]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from jslora.server import openai
from jslora.server.choice import Choice, Part
from jslora.server.prepare import Job
from jslora.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Writer(ABC):
    """The envelope that both kinds of answer share."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, job: Job, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.job = job
        self.tokenizer = tokenizer
        self._chunk = openai.Answer(
            id=job.id,
            object=self.chunk_object,
            created=job.created,
            model=job.model,
            choices=[],
            system_fingerprint=fingerprint,
        )

    @abstractmethod
    def part(self, choice: Choice, part: Part, usage: openai.Usage | None) -> bytes:
        """The frames of one part; `usage` so far if it was asked for in every frame."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: openai.Usage) -> bytes:
        """The whole answer, of choices that are finished."""

    def usage(self, usage: openai.Usage) -> bytes:
        """The frame that ends a stream with usage."""
        return openai.frame(msgspec.structs.replace(self._chunk, usage=usage))

    def _frame(self, choice: openai.AnyChoice, usage: openai.Usage | None) -> bytes:
        return openai.frame(msgspec.structs.replace(self._chunk, choices=[choice], usage=usage))

    def _whole(self, choices: Sequence[openai.AnyChoice], usage: openai.Usage) -> openai.Answer:
        return msgspec.structs.replace(
            self._chunk, object=self.whole_object, choices=choices, usage=usage
        )

    def _ids(self, part: Part) -> list[int] | None:
        return part.tokens if self.job.return_token_ids else None


class CompletionWriter(Writer):
    """`POST /v1/completions`."""

    whole_object = chunk_object = "text_completion"

    def part(self, choice: Choice, part: Part, usage: openai.Usage | None) -> bytes:
        return self._frame(self._choice(choice, part), usage)

    def whole(self, choices: Sequence[Choice], usage: openai.Usage) -> bytes:
        worded = [self._choice(choice, _last(choice)) for choice in choices]
        return openai.encode(self._whole(worded, usage))

    def _choice(self, choice: Choice, part: Part) -> openai.CompletionChoice:
        logprobs = None
        if choice.request.params.logprobs is not None:
            logprobs = openai.completion_logprobs(
                self.tokenizer, part.scored, part.scores, part.offset
            )
        first = self.job.return_token_ids and choice.parts == 1
        return openai.CompletionChoice(
            index=choice.index,
            text=part.text,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_token_ids=choice.request.prompt if first else None,
            token_ids=self._ids(part),
        )


class ChatWriter(Writer):
    """`POST /v1/chat/completions`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def part(self, choice: Choice, part: Part, usage: openai.Usage | None) -> bytes:
        frames = self._opening(choice) if choice.parts == 1 else b""
        if part.text or part.tokens:
            delta = openai.ChatChunkChoice(
                index=choice.index,
                delta=openai.Message(content=part.text),
                logprobs=self._logprobs(choice, part),
                finish_reason=None,
                token_ids=self._ids(part),
            )
            frames += self._frame(delta, usage)
        if choice.finish_reason is not None:
            end = openai.ChatChunkChoice(
                index=choice.index,
                delta=openai.Message(),
                logprobs=None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            frames += self._frame(end, usage)
        return frames

    def whole(self, choices: Sequence[Choice], usage: openai.Usage) -> bytes:
        worded = []
        for choice in choices:
            part = _last(choice)
            worded.append(
                openai.ChatChoice(
                    index=choice.index,
                    message=openai.Message(role="assistant", content=part.text),
                    logprobs=self._logprobs(choice, part),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=self._ids(part),
                )
            )
        answer = self._whole(worded, usage)
        if self.job.return_token_ids:
            answer = msgspec.structs.replace(answer, prompt_token_ids=choices[0].request.prompt)
        return openai.encode(answer)

    def _opening(self, choice: Choice) -> bytes:
        """The frame with the role."""
        opening = openai.ChatChunkChoice(
            index=choice.index,
            delta=openai.Message(role="assistant", content=""),
            logprobs=None,
            finish_reason=None,
        )
        prompt = choice.request.prompt if self.job.return_token_ids else None
        return openai.frame(
            msgspec.structs.replace(self._chunk, choices=[opening], prompt_token_ids=prompt)
        )

    def _logprobs(self, choice: Choice, part: Part) -> openai.ChatLogprobs | None:
        if choice.request.params.logprobs is None:
            return None
        return openai.chat_logprobs(self.tokenizer, [score for score in part.scores if score])


def writer(job: Job, tokenizer: Tokenizer, fingerprint: str) -> Writer:
    """The writer of this kind of job."""
    return (ChatWriter if job.chat else CompletionWriter)(job, tokenizer, fingerprint)


def _last(choice: Choice) -> Part:
    part = choice.take()
    assert part is not None and choice.finish_reason is not None, f"{choice.request.id} is not done"
    return part
