"""The messages between the front-end process and the engine process, as msgpack over one socket.

One tagged struct per message, so that a decoder given the wrong kind fails by name. Client to
engine: Submit, Abort, LoadAdapter, UnloadAdapter, Drain. Engine to client: Progress, Ready, Events,
Reply, Pulse, Failed. Every command with a `seq` is answered by exactly one Reply with that `seq`.
Host only: no jax.
"""

import msgspec

from jslora.request import AdapterInfo, EngineInfo, ErrorInfo, Request, Stats, TokenEvent


class Submit(msgspec.Struct, tag=True, frozen=True):
    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    ids: list[str]


class LoadAdapter(msgspec.Struct, tag=True, frozen=True):
    seq: int
    name: str
    path: str | None = None
    replace: bool = False


class UnloadAdapter(msgspec.Struct, tag=True, frozen=True):
    seq: int
    name: str


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Finish what is running and waiting, then exit with code 0."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """One start-up stage's progress; `total` 0 means unknown."""

    stage: str
    done: int
    total: int
    note: str = ""


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Events(msgspec.Struct, tag=True, frozen=True):
    events: list[TokenEvent]


class Reply(msgspec.Struct, tag=True, frozen=True):
    seq: int
    adapter: AdapterInfo | None = None
    error: ErrorInfo | None = None


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """Sent about once a second and after every adapter change: the engine lives."""

    stats: Stats
    adapters: list[AdapterInfo] | None = None


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Start-up failed for a reason the user can mend; the process exits after it."""

    error: ErrorInfo


Command = Submit | Abort | LoadAdapter | UnloadAdapter | Drain
News = Progress | Ready | Events | Reply | Pulse | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_news = msgspec.msgpack.Decoder(News).decode
