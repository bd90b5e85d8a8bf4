"""One sequence's answer while it grows: token events in, parts of the answer out.

A part is what the events since the last one add: text that can no longer change, ids and logprobs.
Ids and logprobs wait for text, so that a stream has no empty frames; the last part carries
whatever is left.
"""

from dataclasses import dataclass

from jslora.request import Request, TokenEvent, TokenLogprob
from jslora.text import TextAssembler
from jslora.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of an answer.

    Attributes:
        tokens: generated ids.
        scored: tokens with logprobs: generated ones, and the prompt's when it is echoed.
        scores: their logprobs; None for the first token of a prompt.
        offset: characters of all tokens scored before.
    """

    text: str
    tokens: list[int]
    scored: list[int]
    scores: list[TokenLogprob | None]
    offset: int


class Choice:
    """Choice `index` of an answer.

    Attributes:
        finish_reason: "stop" or "length" once the last part can be taken.
        stop_reason: the stop string or stop token id that ended it.
        parts: how many parts were taken.
        cached_tokens: how many of the prompt's tokens were in the prefix cache.
    """

    def __init__(self, index: int, request: Request, echo: str, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.parts = self.cached_tokens = 0
        self._over = False
        self._tokenizer = tokenizer
        self._assembler = TextAssembler(tokenizer, request.params, request.prompt)
        self._offset = 0
        self._begin_part(echo)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return self._assembler.tokens

    def feed(self, event: TokenEvent) -> None:
        """Take in an event.

        Raises:
            JsloraError: the event says that the sequence failed.
        """
        if event.error is not None:
            raise event.error.error()
        self.cached_tokens += event.cached_tokens
        scored = self.request.params.logprobs is not None
        if scored and event.prompt_logprobs is not None:
            self._scored += self.request.prompt
            self._scores += event.prompt_logprobs
        delta = self._assembler.push(event)
        self._text += delta.text
        self._tokens += delta.tokens
        if scored:
            self._scored += delta.tokens
            self._scores += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def take(self) -> Part | None:
        """What was added since the last part, or None while there is nothing to show."""
        if self._over or (not self._text and self.finish_reason is None):
            return None
        self._over = self.finish_reason is not None
        part = Part(
            text=self._text,
            tokens=self._tokens,
            scored=self._scored,
            scores=self._scores,
            offset=self._offset,
        )
        self._offset += sum(len(self._tokenizer.token_text(token)) for token in self._scored)
        self._begin_part("")
        self.parts += 1
        return part

    def _begin_part(self, text: str) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._scored: list[int] = []
        self._scores: list[TokenLogprob | None] = []
