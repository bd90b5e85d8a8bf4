"""Token events of one sequence → pieces of text: incremental detokenization and stop strings.

Invariant: however tokens are spread over events, the pieces joined are what decoding all tokens
adds to the prompt, cut at the stop string that completes first. Text that may still change is held
back: an unfinished character, and the longest end that may begin a stop string. Host only: no jax.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from jslora.request import SamplingParams, TokenEvent, TokenLogprob
from jslora.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What one event adds.

    Attributes:
        text: may be empty, or hold text of earlier tokens that was held back.
        tokens: new tokens up to the one that completed a stop string.
        logprobs: one entry per token of `tokens` when asked for.
        finish_reason: "stop" or "length" on the last delta.
        stop_reason: the stop string or the id in `stop_token_ids` that ended the text.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Detokenizer:
    """Tokens → text, whole characters only.

    Args:
        prompt: what comes before; a character it leaves unfinished is completed in the text, and a
            tokenizer that drops a space at the start of a text drops none after it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        before = self._last_bytes(prompt)
        self._decoder.decode(before)
        self._strip = tokenizer.strips_space and not before
        self._fed = False

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        data = b"" if token in self._skipped else self._tokenizer.token_bytes(token)
        self._fed |= bool(data)
        return self._stripped(self._decoder.decode(data))

    def flush(self) -> str:
        """U+FFFD if the last character was left unfinished."""
        return self._stripped(self._decoder.decode(b"", final=True)) if self._fed else ""

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _last_bytes(self, prompt: Sequence[int]) -> bytes:
        """At least the last 3 bytes of the prompt: no unfinished character is longer."""
        data = b""
        for token in reversed(prompt):
            if token not in self._skipped:
                data = self._tokenizer.token_bytes(token) + data
            if len(data) >= 3:
                break
        return data


class TextAssembler:
    """The text of one sequence, fed its `TokenEvent`s in order.

    Attributes:
        finished: nothing more will come; true as soon as a stop string is complete, when the
            caller should abort the request in the engine.
        tokens: how many tokens the text took, for usage.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()
    ) -> None:
        assert all(params.stop), f"an empty stop string in {params.stop}"
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, prompt, params.skip_special_tokens)
        self._held = ""
        self.finished = False
        self.tokens = 0

    def push(self, event: TokenEvent) -> TextDelta:
        """Add an event; after a stop string, events are ignored.

        Args:
            event: of this sequence; its error, if any, is the caller's to report.
        """
        if self.finished:
            return TextDelta()
        text = ""
        for kept, token in enumerate(event.tokens, 1):
            self.tokens += 1
            more, stop = self._settle(self._detokenizer.push(token))
            text += more
            if stop is not None:
                return self._end(text, event, kept, "stop", stop)
        if event.finish_reason is None:
            return TextDelta(text=text, tokens=event.tokens, logprobs=event.logprobs)
        more, stop = self._settle(self._detokenizer.flush())
        text += more + self._held
        if stop is not None:
            return self._end(text, event, len(event.tokens), "stop", stop)
        ended_by = event.stop_token if event.stop_token in self._params.stop_token_ids else None
        return self._end(text, event, len(event.tokens), event.finish_reason, ended_by)

    def _end(
        self, text: str, event: TokenEvent, kept: int, reason: str, stop: str | int | None
    ) -> TextDelta:
        self.finished = True
        self._held = ""
        return TextDelta(
            text=text,
            tokens=event.tokens[:kept],
            logprobs=event.logprobs[:kept],
            finish_reason=reason,
            stop_reason=stop,
        )

    def _settle(self, new: str) -> tuple[str, str | None]:
        """(text that can no longer change, the stop string that ended it) after `new` was added."""
        text = self._held + new
        # Stop strings count from the text after the first `min_tokens` tokens.
        stops = self._params.stop if self.tokens > self._params.min_tokens else ()
        if found := _first_stop(text, stops):
            start, stop = found
            self._held = ""
            end = start + len(stop) if self._params.include_stop_str else start
            return text[:end], stop
        held = max((_overlap(text, stop) for stop in stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the one that completes first; of two, the one that begins first."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
