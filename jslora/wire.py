"""The messages between the front-end process and the engine process, as msgpack over one socket.

One tagged struct per message, so that a decoder given the wrong kind fails by name. Client to
engine: Submit, Abort, LoadAdapter, UnloadAdapter, Describe, Drain. Engine to client: Progress,
Ready, Events, Reply, Described, Pulse, Failed. Every command with a `seq` is answered by exactly
one Reply with that `seq`, or Described for a Describe. Host only: no jax.
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
    """Answered once nothing of the adapter is left; what still runs after so long is ended."""

    seq: int
    name: str
    drain_seconds: float


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Ask for reports with the present state; of all adapters if no name is given."""

    seq: int
    name: str | None = None


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


class Described(msgspec.Struct, tag=True, frozen=True):
    seq: int
    adapters: list[AdapterInfo]


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """Sent about once a second: the engine lives.

    `changed` and `removed` tell of names since the last pulse; where adapters are now is not told
    here (thousands would be) but when a Describe asks for it.
    """

    stats: Stats
    changed: list[AdapterInfo] = []
    removed: list[str] = []


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Start-up failed for a reason the user can mend; the process exits after it."""

    error: ErrorInfo


Command = Submit | Abort | LoadAdapter | UnloadAdapter | Describe | Drain
News = Progress | Ready | Events | Reply | Described | Pulse | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_news = msgspec.msgpack.Decoder(News).decode
