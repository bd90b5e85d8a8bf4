"""`tokenizer.model` files give sentencepiece's own ids and texts, or a refusal."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jslora import sentencepiece
from jslora.errors import ModelError

GOLDENS = Path(__file__).parent / "tokenizer_goldens"
SPM = json.loads((GOLDENS / "sentencepiece.json").read_text())
MODEL = (GOLDENS / "sentencepiece.model").read_bytes()


def test_ids_and_texts_equal_sentencepiece() -> None:
    tokenizer = sentencepiece.load(GOLDENS / "sentencepiece.model", add_bos=False)
    # Whole tokens inside a text are cut out before it gets its leading space, as Hugging Face and
    # llama.cpp do and sentencepiece does not.
    cases = [c for c in zip(SPM["texts"], SPM["ids"], SPM["decoded"], strict=True)]
    plain = [case for case in cases if "[INST]" not in case[0]]
    assert len(plain) > 25
    for text, ids, decoded in plain:
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded, text


def test_a_start_token_is_added_when_asked_for() -> None:
    tokenizer = sentencepiece.load(GOLDENS / "sentencepiece.model", add_bos=True)
    for text, ids in zip(SPM["texts"], SPM["llama_cpp_ids"], strict=True):
        assert tokenizer.encode(text).ids == ids, text


def field(number: int, value: int | bytes) -> bytes:
    """One protocol-buffer field with a small number and value."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


TRAINER, NORMALIZER = 2, 3


@pytest.mark.parametrize(
    "edit, message",
    [
        (field(TRAINER, field(3, 1)), "model type 'unigram' is not supported; bpe is"),
        (field(TRAINER, field(3, 2)), "without byte fallback"),
        (field(NORMALIZER, field(1, b"nmt_nfkc") + field(2, b"x")), "normalisation b'nmt_nfkc'"),
        (field(NORMALIZER, field(4, 1)), "remove extra spaces"),
        (field(NORMALIZER, field(4, 0) + field(5, 0)), "another treatment of spaces"),
        (field(1, field(1, b"<other>") + field(3, 2)), "2 unknown tokens"),
        (field(1, field(1, b"\xff")), "not a readable sentencepiece model"),
        (field(1, 5), "not a readable sentencepiece model"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x7f", "ends inside field 1"),
        (b"\x80" * 11, "longer than 64 bits"),
    ],
)
def test_refusals_name_what_is_wrong(edit: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL + edit)  # the last field of a kind counts
    with pytest.raises(ModelError) as refused:
        sentencepiece.load(path, add_bos=True)
    assert message in str(refused.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_end_in_a_message(data: st.DataObject, tmp_path: Path) -> None:
    damaged = bytearray(MODEL[: data.draw(st.integers(0, len(MODEL)), "length")])
    for _ in range(data.draw(st.integers(0, 5), "flips") if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged)
    try:
        tokenizer = sentencepiece.load(path, add_bos=False)
    except ModelError:
        return
    assert tokenizer.get_vocab_size() > 0
