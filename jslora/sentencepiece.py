"""Read a sentencepiece `tokenizer.model` into a `tokenizers.Tokenizer`.

The file is one protocol-buffer message (sentencepiece_model.proto), of which a dozen fields matter
here, so its wire format is read directly. BPE models without text normalisation are supported, as
Llama 1/2 and Mistral use them; the others are refused. Host only: no jax.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from jslora import vocabulary
from jslora.errors import ModelError
from jslora.vocabulary import SPACE, Kind, Vocabulary

_MAX_BYTES = 64 * 2**20
_BPE = 2
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

Field = tuple[int, int | bytes]
"""Field number and value: an integer, or the bytes of a string, message or fixed-size number."""


def load(path: Path, *, add_bos: bool) -> Tokenizer:
    """Build the tokenizer in `path`.

    Args:
        add_bos: put the model's start token before every text.

    Raises:
        ModelError: the file cannot be read, is damaged, or is not a plain BPE model.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path.name} is larger than {_MAX_BYTES} bytes")
        model = list(_fields(path.read_bytes()))
        pieces = [_piece(_message(value)) for number, value in model if number == 1]
        trainer = dict(_last(model, 2))
        normalizer = dict(_last(model, 3))
    except (OSError, ValueError, TypeError, IndexError, struct.error) as error:
        raise ModelError(f"{path.name} is not a readable sentencepiece model: {error}") from None
    _refuse_variants(trainer, normalizer)
    tokens, scores, kinds = zip(*pieces, strict=True) if pieces else ((), (), ())
    bos = _signed(trainer.get(41, 1)) if add_bos else None
    return vocabulary.sentencepiece(
        Vocabulary(tokens, kinds, bos), scores, space_prefix=bool(normalizer.get(3, 1))
    )


def _piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    """(text, score, kind) of one entry."""
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, Kind.NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("an entry's text, score or type is of the wrong wire type")
    token = text.decode("utf-8")
    # Text is matched against these entries before its spaces are replaced.
    token = token.replace(SPACE, " ") if kind == Kind.USER_DEFINED else token
    return token, struct.unpack("<f", score)[0], kind


def _refuse_variants(trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]) -> None:
    kind = trainer.get(3, 1)
    if kind != _BPE:
        name = _MODEL_TYPES.get(kind, kind) if isinstance(kind, int) else kind
        raise ModelError(f"sentencepiece model type {name!r} is not supported; bpe is")
    if not trainer.get(35, 0):
        raise ModelError("sentencepiece models without byte fallback are not supported")
    if normalizer.get(2):
        raise ModelError(f"sentencepiece normalisation {normalizer.get(1)!r} is not supported")
    if normalizer.get(4, 1):
        raise ModelError("sentencepiece models that remove extra spaces are not supported")
    if not normalizer.get(5, 1) or trainer.get(24, 0):
        raise ModelError("sentencepiece models with another treatment of spaces are not supported")


# Wire format (protobuf.dev/programming-guides/encoding) -----------------------------------------


def _message(value: int | bytes) -> dict[int, int | bytes]:
    if not isinstance(value, bytes):
        raise ValueError("a message is of the wrong wire type")
    return dict(_fields(value))


def _last(fields: list[Field], number: int) -> dict[int, int | bytes]:
    """The message in the last field of that number; empty where there is none."""
    return _message(next((value for n, value in reversed(fields) if n == number), b""))


def _fields(data: bytes) -> Iterator[Field]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"it ends inside field {number}")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {position}")


def _signed(value: int | bytes) -> int | None:
    """A token id; negative ones, which mean none, are written as 64-bit two's complement."""
    return value if isinstance(value, int) and value < 2**63 else None
