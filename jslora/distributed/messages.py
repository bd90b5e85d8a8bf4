"""What the processes of a group tell each other, as msgpack, one tagged struct each.

The leader says what is to be done and in which order; a follower answers, and takes no decision.
Host only: no jax.
"""

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from jslora.calls import AdmitCall, StepCall
from jslora.distributed.deltas import Decoder, Delta, Encoder
from pallas_kernels.lora.pieces import STORAGES

MAX_TEXT = 500

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Storage = Annotated[str, Meta(pattern=f"^({'|'.join(STORAGES)})$")]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


# From the leader ----------------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """You are one of the group; wait for the others."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """You cannot be one of the group, for this reason."""

    reason: Text


class Begin(msgspec.Struct, tag=True, frozen=True):
    """All are here."""


class Agreed(msgspec.Struct, tag=True, frozen=True):
    """Bytes of a device's memory that every process has to divide."""

    available: int


class Step(msgspec.Struct, tag=True, frozen=True):
    """A `StepCall`.

    Attributes:
        parts: how many of `arrays`, after the first three, are work lists (-1: as before),
            sequences that take slots, and calls of the scoring program.
    """

    bucket: int
    sampler: str
    parts: tuple[int, int, int]
    arrays: list[Delta]


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Read the adapter in folder `path` below root number `root`, store it so, say what it is."""

    seq: int
    root: Annotated[int, Meta(ge=0)]
    path: Annotated[str, Meta(max_length=4096)]
    storage: Storage


class Bring(msgspec.Struct, tag=True, frozen=True):
    """Transfer your part of an adapter to these pages; number it so."""

    number: int
    digest: Digest
    root: Annotated[int, Meta(ge=0)]
    path: Annotated[str, Meta(max_length=4096)]
    storage: Storage
    pages: list[int]


class Write(msgspec.Struct, tag=True, frozen=True):
    """Write a transferred chunk into the pool."""

    number: int
    index: int


class Drop(msgspec.Struct, tag=True, frozen=True):
    """A transfer failed somewhere; what is left of it is not written."""

    number: int


class Forget(msgspec.Struct, tag=True, frozen=True):
    """Nobody asks for an adapter any more."""

    digest: Digest


class Reset(msgspec.Struct, tag=True, frozen=True):
    """Make the pool and the slots anew; all transfers are forgotten."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """The leader was told to stop."""


# From a follower ----------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Who asks to be one of the group, and what it was started with, by key."""

    process_id: int
    agreed: dict[str, Annotated[str, Meta(max_length=4096)]]


class Memory(msgspec.Struct, tag=True, frozen=True):
    """Bytes of a device's memory that this process could divide."""

    available: int


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """The digest of what was read, or why it cannot be served."""

    seq: int
    digest: Digest | None = None
    error: Text = ""


class Brought(msgspec.Struct, tag=True, frozen=True):
    """A chunk is on the devices."""

    number: int
    index: int


class NotBrought(msgspec.Struct, tag=True, frozen=True):
    """A transfer failed."""

    number: int
    error: Text


class Sampled(msgspec.Struct, tag=True, frozen=True):
    """Digest of the tokens sampled in the steps of a window, after so many resets."""

    resets: int
    window: int
    digest: str


class Failed(msgspec.Struct, tag=True, frozen=True):
    """This process gives up, for this reason."""

    reason: Text


# From both ----------------------------------------------------------------------------------------


class Beat(msgspec.Struct, tag=True, frozen=True):
    """I live."""


Order = (
    Welcome | Refused | Begin | Agreed | Step | Prepare | Bring | Write | Drop | Forget | Reset
    | Stop | Beat
)  # fmt: skip
Answer = Hello | Memory | Prepared | Brought | NotBrought | Sampled | Failed | Beat

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def encode_step(call: StepCall, encoder: Encoder) -> bytes:
    """The message of a call, whose arrays must not be written any more."""
    named = [("packed", call.packed), ("ints", call.ints), ("floats", call.floats)]
    named += [(f"work.{i}", array) for i, array in enumerate(call.work or ())]
    for admitted in call.admitted:
        named += zip(AdmitCall._fields, admitted, strict=True)
    for score in call.scores:
        named += zip(("index", "target"), score, strict=True)
    arrays = [encoder.encode(name, np.asarray(array)) for name, array in named]
    works = -1 if call.work is None else len(call.work)
    parts = works, len(call.admitted), len(call.scores)
    return encode(Step(call.bucket, call.sampler, parts, arrays))


def decode_step(message: Step, decoder: Decoder) -> StepCall:
    """The call that a message was made from.

    Raises:
        ValueError: the message was made from none.
    """
    works, admits, scores = message.parts
    width = len(AdmitCall._fields)
    expected = 3 + max(works, 0) + width * admits + 2 * scores
    if len(message.arrays) != expected or min(works + 1, admits, scores) < 0:
        raise ValueError(f"a step of {message.parts} parts has {len(message.arrays)} arrays")
    arrays = iter([decoder.decode(delta) for delta in message.arrays])
    packed, ints, floats = (next(arrays) for _ in range(3))
    return StepCall(
        bucket=message.bucket,
        packed=packed,
        work=None if works < 0 else tuple(next(arrays) for _ in range(works)),
        sampler=message.sampler,
        ints=ints,
        floats=floats,
        admitted=tuple(AdmitCall(*(next(arrays) for _ in range(width))) for _ in range(admits)),
        scores=tuple((next(arrays), next(arrays)) for _ in range(scores)),
    )
