"""Traces as JSONL, one request a line: what a server was asked, or what a generator made.

    {"arrival": 0.25, "model": "adapter-007", "prompt": [17, 4], "output_tokens": 64}
    {"arrival": 0.5, "model": "base", "input_tokens": 300, "output_tokens": 8, "tenant": "acme"}

The prompt is one of: `prompt`, token ids or text; `messages`, those of a chat; `input_tokens`, a
length to be filled with random ids. `tenant`, `priority` and `ttft_slo` may be left out.

Invariants: what is written is read back equal; a line with anything else in it, out of its range
or out of order is refused by its number, and sizes are bounded before anything is made of them.
Host only: no jax.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from jslora.bench.traces import MAX_JOBS, MAX_TOKENS
from jslora.bench.workload import Job, Prompt, Trace, draw_prompt, fit, stream
from jslora.errors import ConfigError
from jslora.request import MAX_PRIORITY, MAX_SLO_SECONDS

MAX_LINE_BYTES = 2**24
MAX_ALL_TOKENS = 2**26

_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Count = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
_Token = Annotated[int, Meta(ge=0, lt=2**31)]
_Ids = Annotated[list[_Token], Meta(min_length=1, max_length=MAX_TOKENS)]


class _Line(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    arrival: Annotated[float, Meta(ge=0, lt=1e9)]
    model: _Name
    prompt: _Ids | Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count
    tenant: _Name = "default"
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] = 0
    ttft_slo: Annotated[float, Meta(gt=0, le=MAX_SLO_SECONDS)] | None = None


_decode = msgspec.json.Decoder(_Line).decode


def encode(trace: Trace) -> bytes:
    """Return a trace as the text of its file."""
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(_line(job)) + b"\n" for job in trace)


def load(path: Path, endpoint: str = "completions", *, seed: int = 0, vocab: int = 32000) -> Trace:
    """Read a trace to be sent to `endpoint`.

    Prompts given by their length are ids below `vocab`, a pure function of `seed` and their line.

    Raises:
        ConfigError: the file cannot be read, is empty or too large, or a line of it (named) is not
            of the form above, comes before the one above it, or does not fit the endpoint.
    """
    jobs: list[Job] = []
    tokens, arrival = 0, 0.0
    for where, number, text in _lines(path):
        line = _parse(text, where)
        tokens += line.input_tokens or (len(line.prompt) if isinstance(line.prompt, list) else 0)
        if len(jobs) == MAX_JOBS or tokens > MAX_ALL_TOKENS:
            limits = f"{MAX_JOBS} requests of {MAX_ALL_TOKENS} prompt tokens in all"
            raise ConfigError(f"{where}: a trace holds at most {limits}")
        if line.arrival < arrival:
            raise ConfigError(f"{where}: arrival {line.arrival} is before {arrival} above it")
        arrival = line.arrival
        if line.input_tokens:
            prompt: Prompt = draw_prompt(stream(seed, number), vocab, line.input_tokens)
        else:
            prompt = _written(line)
        jobs.append(_job(line, len(jobs), fit(prompt, endpoint, where)))
    if not jobs:
        raise ConfigError(f"{path} holds no requests")
    return tuple(jobs)


def _lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Where each line stands, its number, and its text; blank ones are passed over."""
    try:
        with path.open("rb") as file:
            number = 0
            while text := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}:{number}: more than {MAX_LINE_BYTES} bytes")
                if text.strip():
                    yield f"{path}:{number}", number, text
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None


def _parse(text: bytes, where: str) -> _Line:
    try:
        line = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if sum(each is not None for each in (line.prompt, line.messages, line.input_tokens)) != 1:
        raise ConfigError(f"{where}: expected one of prompt, messages and input_tokens")
    return line


def _written(line: _Line) -> Prompt:
    if line.messages is not None:
        return tuple(line.messages)
    assert line.prompt is not None, "checked when it was parsed"
    return line.prompt if isinstance(line.prompt, str) else tuple(line.prompt)


def _job(line: _Line, index: int, prompt: Prompt) -> Job:
    return Job(
        index=index,
        arrival=line.arrival,
        model=line.model,
        prompt=prompt,
        output_tokens=line.output_tokens,
        tenant=line.tenant,
        priority=line.priority,
        ttft_slo=line.ttft_slo,
    )


def _line(job: Job) -> _Line:
    chat = isinstance(job.prompt[0], dict)
    plain = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
    return _Line(
        arrival=job.arrival,
        model=job.model,
        prompt=None if chat else plain,  # type: ignore[arg-type]
        messages=plain if chat else None,  # type: ignore[arg-type]
        output_tokens=job.output_tokens,
        tenant=job.tenant,
        priority=job.priority,
        ttft_slo=job.ttft_slo,
    )
