"""What one streamed answer brought and when: server-sent events in, arrival times and counts out.

Invariants: an answer is complete only when [DONE] came; an error event, an event that is not the
API's JSON or an endless line fails it. Nothing is decoded but the few fields below, and how the
bytes are cut into reads changes the arrival times only. Host only: no jax.
"""

from typing import Any

import msgspec

MAX_LINE = 2**20
MAX_DETAIL = 300


class Failure(Exception):
    """Why one request failed: a kind to group by, and the detail."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    object: str | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Events:
    """Cuts the body of an event stream into the payloads of its `data:` lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes.

        Raises:
            Failure: a line is longer than `MAX_LINE` bytes.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise Failure("malformed stream", f"a line of more than {MAX_LINE} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Stream:
    """What one answer has brought so far.

    Attributes:
        arrivals: one per chunk. A chunk is what one read delivered of text, one token or several.
        token_events: events that brought a token or more.
        usage: the server's own count, once it came.
    """

    def __init__(self) -> None:
        self._events = Events()
        self.arrivals: list[float] = []
        self.token_events = 0
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.done = False

    def feed(self, data: bytes, now: float) -> None:
        """Take what one read delivered at `now`, on any clock.

        Raises:
            Failure: an event is not JSON of the API's form, or is an error.
        """
        before = self.token_events
        for payload in self._events.feed(data):
            if payload == b"[DONE]":
                self.done = True
            else:
                self._take(payload)
        if self.token_events > before:
            self.arrivals.append(now)

    def finish(self) -> None:
        """Check that the stream came to its proper end.

        Raises:
            Failure: it did not, or it brought nothing.
        """
        if not self.done:
            raise Failure("truncated stream", "the stream ended without [DONE]")
        if not self.token_events and self.finish_reason is None:
            raise Failure("empty stream", "the stream held neither a token nor a finish reason")

    def _take(self, payload: bytes) -> None:
        try:
            event = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Failure("malformed stream", f"{error}: {printable(payload)}") from None
        if event.error or event.object == "error":
            raise Failure(f"error event {_type(event.error)}".strip(), printable(payload))
        self.usage = event.usage or self.usage
        for choice in event.choices:
            self.token_events += _brings_token(choice)
            self.finish_reason = choice.finish_reason or self.finish_reason


def _type(error: Any) -> str:
    """An error's type, if it says one that can be counted by."""
    told = error.get("type") if isinstance(error, dict) else None
    return printable(told)[:64] if isinstance(told, str) else ""


def _brings_token(choice: _Choice) -> bool:
    """Tell whether an event's choice brought a token.

    Text does. So does an event without any, since a token can end inside a character; but not the
    first of a chat, which only names the role, nor a last one that only gives the finish reason.
    """
    if choice.delta is None:
        return bool(choice.text) or choice.finish_reason is None
    if choice.delta.content:
        return True
    return choice.delta.role is None and choice.finish_reason is None


def printable(text: bytes | str) -> str:
    """Return what a server or a library said as one short line, fit for a terminal."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_DETAIL].strip()
