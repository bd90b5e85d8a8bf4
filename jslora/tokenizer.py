"""Text ↔ token ids for one model folder, and the bytes that each token stands for.

Encoding is the `tokenizers` library's. Decoding joins the tokens' bytes and reads them as UTF-8,
which can be done a token at a time and gives what the library gives for byte-level and
sentencepiece decoders (but where byte tokens are not UTF-8, only the wrong bytes are replaced);
other decoders are refused. Safe to call from many threads: nothing changes after construction but
a cache. Host only: no jax.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from jslora import sentencepiece
from jslora.chat import ChatTemplate
from jslora.errors import InvalidRequest, ModelError
from jslora.files import read_optional_json
from jslora.vocabulary import SPACE

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer and chat template in a model folder.

    Attributes:
        vocab_size: number of entries, added tokens included; ids beyond it decode to nothing.
        bos_id, eos_id: ids of the start and end tokens, or None.
        special_ids: ids that `skip_special_tokens` leaves out.
        chat_template: the compiled template, or None where the model has none.
        strips_space: whether decoding drops one space at the start of a text.

    Raises:
        ModelError: the folder has no tokenizer, or one that is damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        config = read_optional_json(folder / "tokenizer_config.json")
        self._tokenizer = _load(folder, config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        older = read_optional_json(folder / "special_tokens_map.json")
        named = _named_tokens(older) | _named_tokens(config)
        _add_tokens(self._tokenizer, config, named)
        _set_post_processor(self._tokenizer, config, named)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id(named.get("bos_token"))
        self.eos_id = self._id(named.get("eos_token"))
        self._byte_level, self.strips_space = _decoder_kind(self._tokenizer)
        self._bytes: dict[int, bytes] = {}
        source = _template_source(folder, config)
        self.chat_template = None if source is None else ChatTemplate(source, named)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: put the start token first, for models that want one.

        Raises:
            InvalidRequest: the text holds a lone surrogate, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InvalidRequest(
                f"the text holds U+{code:04X} at position {error.start}, half of a surrogate pair"
            ) from None
        # Unlike `encode`, the batch call lets other threads run meanwhile.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            InvalidRequest: the model has no chat template, or it cannot render the messages.
        """
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for an id outside the vocabulary."""
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._find_bytes(token)
        return data

    def token_text(self, token: int) -> str:
        """A token as text; U+FFFD for the parts that are no whole character."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _find_bytes(self, token: int) -> bytes:
        text = self._added.get(token)
        if text is None and 0 <= token < 2**32:
            text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            if token in self._added or not all(c in _BYTE_OF for c in text):
                return text.encode("utf-8")
            return bytes(_BYTE_OF[c] for c in text)
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace(SPACE, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where it prints, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


# Files ------------------------------------------------------------------------------------------


def _load(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"cannot read tokenizer.json: {error}") from None
    if (folder / "tokenizer.model").exists():
        add_bos = bool(config.get("add_bos_token", True))
        return sentencepiece.load(folder / "tokenizer.model", add_bos=add_bos)
    raise ModelError(f"{folder} holds neither tokenizer.json nor tokenizer.model")


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Name → text of the special tokens that a file names."""
    named = {}
    for name in _NAMED:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[name] = value
    return named


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]
) -> None:
    """Add what tokenizer_config.json lists and the tokenizer lacks; make named tokens special."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token, added in _listed_tokens(config):
        if added.content in known:
            continue
        tokenizer.add_tokens([added])
        known.add(added.content)
        if (given := tokenizer.token_to_id(added.content)) != token:
            raise ModelError(
                f"tokenizer_config.json gives {added.content!r} the id {token}; it would be {given}"
            )
    extra = [token for token in named.values() if token not in known]
    # A name without an entry would get a new id, which the model has no embedding for.
    extra = [token for token in extra if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in extra])


def _listed_tokens(config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """(id, token) pairs of `added_tokens_decoder`, by id."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        listed = (config.get("added_tokens_decoder") or {}).items()
        tokens = {int(i): AddedToken(**{k: entry[k] for k in fields}) for i, entry in listed}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"tokenizer_config.json: added_tokens_decoder: {error!r}") from None
    return sorted(tokens.items(), key=lambda item: item[0])


def _set_post_processor(
    tokenizer: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]
) -> None:
    """Obey `add_bos_token` and `add_eos_token` where given; else tokenizer.json has its own."""
    if config.get("add_bos_token") is None and config.get("add_eos_token") is None:
        return
    template, special = ["$A"], []
    for name, place in (("bos", 0), ("eos", 1)):
        token = named.get(f"{name}_token")
        identity = None if token is None else tokenizer.token_to_id(token)
        if config.get(f"add_{name}_token") and identity is not None:
            template.insert(place * len(template), str(token))
            special.append((token, identity))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=special
    )


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {file.name}: {error}") from None
    separate = read_optional_json(folder / "chat_template.json")
    template = separate.get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ModelError(f"the chat template is a {type(template).__name__}, not a string")
    return template


def _decoder_kind(tokenizer: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(byte-level, strips a space at the start); refuse decoders that do anything else."""
    decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    if decoder.get("type") == "ByteLevel":
        return True, False
    steps = decoder.get("decoders", [])
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    sentencepiece_steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if steps[:3] == sentencepiece_steps and steps[3:] in ([], [strip]):
        return False, bool(steps[3:])
    raise ModelError(
        f"decoder {decoder.get('type')!r} in tokenizer.json is not supported; ByteLevel and "
        "sentencepiece's (Replace, ByteFallback, Fuse, Strip) are"
    )
