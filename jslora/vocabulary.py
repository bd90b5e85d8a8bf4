"""Vocabularies as lists (GGUF, sentencepiece) built into `tokenizers.Tokenizer`s.

There are two kinds. Byte-level BPE comes with its merges, and with the name of the rule that cuts
text into words; a rule not known here is refused, because another one gives other tokens.
Sentencepiece BPE has scores instead: the better-scored of two adjacent merges goes first, spaces
become "▁", and a character outside the vocabulary falls back to its UTF-8 bytes.
Host only: no jax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jslora.errors import ModelError

SPACE = "▁"

# Words as Llama 3 and Qwen 2 cut them: they differ in how many digits make one word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _SMOLLM, _LLAMA3, _QWEN2 = "gpt-2", "smollm", "llama-bpe", "qwen2"

PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""Names of word-cutting rules as GGUF files spell them, and the rule each one means."""


class Kind(IntEnum):
    """What a vocabulary entry is; sentencepiece's numbering, which GGUF shares."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Entries by id; `bos` is the id put before every text, or None."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    bos: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.kinds):
            raise ModelError(
                f"the vocabulary has {len(self.tokens)} tokens but {len(self.kinds)} token types"
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise ModelError("the vocabulary holds the same token twice")
        if self.bos is not None and not 0 <= self.bos < len(self.tokens):
            raise ModelError(f"bos token id {self.bos} is outside {len(self.tokens)} tokens")

    def entries(self) -> Iterator[tuple[str, int]]:
        """(token, kind) by id."""
        return zip(self.tokens, self.kinds, strict=True)


def byte_level(vocabulary: Vocabulary, merges: Sequence[str], pre: str) -> Tokenizer:
    """Build a byte-level BPE tokenizer (GPT-2's kind) from merges written "left right".

    Raises:
        ModelError: the pre-tokenizer is not known, or a merge is not made of vocabulary entries.
    """
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"pre-tokenizer {pre!r} is not supported; supported are {', '.join(PRE_TOKENIZERS)}"
        )
    rule = PRE_TOKENIZERS[pre]
    pairs = [_split_merge(merge) for merge in merges]
    tokenizer = Tokenizer(_bpe(vocabulary, pairs, ignore_merges=rule == _LLAMA3))
    if rule == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, vocabulary)


def sentencepiece(
    vocabulary: Vocabulary, scores: Sequence[float], *, space_prefix: bool
) -> Tokenizer:
    """Build a sentencepiece BPE tokenizer with byte fallback from scores.

    Args:
        space_prefix: put a space before a text, as Llama 2 and Mistral do.

    Raises:
        ModelError: the numbers of tokens and scores differ, or there is no unknown token.
    """
    if len(scores) != len(vocabulary.tokens):
        raise ModelError(f"{len(vocabulary.tokens)} tokens but {len(scores)} scores")
    unknown = [token for token, kind in vocabulary.entries() if kind == Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ModelError(f"the vocabulary has {len(unknown)} unknown tokens; one is needed")
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(
        _bpe(vocabulary, merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend(SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _finish(tokenizer, vocabulary)


def _bpe(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: bool | str
) -> models.BPE:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    try:
        return models.BPE(vocab=ids, merges=merges, **options)
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(f"the vocabulary and its merges do not fit together: {error}") from None


def _finish(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Tokenizer:
    """Entries that text is matched against whole, and the token before every text."""
    for token, kind in vocabulary.entries():
        if kind in (Kind.UNKNOWN, Kind.CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == Kind.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if vocabulary.bos is not None:
        bos = vocabulary.tokens[vocabulary.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary.bos)]
        )
    return tokenizer


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == _SMOLLM:
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = Regex(_WORDS.format(digits="{1,3}" if rule == _LLAMA3 else ""))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _split_merge(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator or not left or not right:
        raise ModelError(f"merge {merge!r} is not two tokens and a space between them")
    return left, right


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put an entry together from two others, best-scored entries first."""
    mergeable = {
        token: i
        for i, (token, kind) in enumerate(vocabulary.entries())
        if kind in (Kind.NORMAL, Kind.USER_DEFINED)
    }
    ranked = sorted(mergeable.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [pair for token, _ in ranked for pair in _halves(token, mergeable)]


def _halves(token: str, known: dict[str, int]) -> list[tuple[str, str]]:
    """Ways to cut a token into two known ones; lowest ids first, as published conversions do."""
    cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
    pairs = [(left, right) for left, right in cuts if left in known and right in known]
    return sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
