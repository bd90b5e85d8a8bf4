"""A tokenizer for models that have none (`model.source: dummy`): one token per byte.

Ids beyond the 256 bytes and three markers read as " t300" and so on, so that the output of random
weights is text like any other and streams.
"""

import json
from pathlib import Path

from jslora.errors import ModelError
from jslora.vocabulary import Kind, Vocabulary, byte_level

MARKERS = ("<|endoftext|>", "<|start|>", "<|end|>")
SMALLEST = 256 + len(MARKERS)
_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, size: int) -> None:
    """Write the tokenizer files of a vocabulary of `size`; id b is byte b, markers come next.

    Raises:
        ModelError: `size` has no room for all bytes.
    """
    if size < SMALLEST:
        raise ModelError(f"vocab_size {size} is too small to serve text; {SMALLEST} is the least")
    fillers = [f"Ġt{token}" for token in range(SMALLEST, size)]
    tokens = [*map(_letter, range(256)), *MARKERS, *fillers]
    kinds = [Kind.NORMAL] * 256 + [Kind.CONTROL] * len(MARKERS) + [Kind.NORMAL] * len(fillers)
    byte_level(Vocabulary(tokens, kinds), [], "gpt-2").save(str(folder / "tokenizer.json"))
    config = {"eos_token": MARKERS[0], "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
        return chr(byte)
    hidden = [b for b in range(256) if not (0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE)]
    return chr(0x100 + hidden.index(byte))
