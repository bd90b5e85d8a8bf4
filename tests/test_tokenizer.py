"""Ids, texts and bytes equal the `tokenizers` library's, and llama.cpp's for the real model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, processors

from jslora.errors import InvalidRequest, ModelError
from jslora.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "tokenizer_goldens"
SPM = json.loads((GOLDENS / "sentencepiece.json").read_text())


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spm")
    shutil.copy(GOLDENS / "sentencepiece.model", folder / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def library(smollm2: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def edited(smollm2: Path, folder: Path, **config: Any) -> Path:
    """A copy of the real tokenizer's files with a changed tokenizer_config.json."""
    shutil.copy(smollm2 / "tokenizer.json", folder)
    whole = json.loads((smollm2 / "tokenizer_config.json").read_text()) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    return folder


def test_real_ids_equal_llama_cpp(smol: Tokenizer) -> None:
    golden = json.loads((GOLDENS / "smollm2.json").read_text())
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        assert smol.encode(text) == ids, text
        assert smol.decode(ids, skip_special_tokens=False) == text


def test_what_is_known_of_the_real_tokenizer(smol: Tokenizer, spm: Tokenizer) -> None:
    assert (smol.vocab_size, smol.bos_id, smol.eos_id) == (49152, 1, 2)
    assert smol.special_ids == set(range(17))
    assert not smol.strips_space
    assert (spm.vocab_size, spm.bos_id, spm.eos_id) == (len(SPM["vocabulary"]["tokens"]), 1, 2)
    assert spm.special_ids == {0, 1, 2}
    assert spm.strips_space


@settings(deadline=None)
@given(text=st.text())
def test_any_text_gives_what_the_library_gives(
    text: str, smol: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    ids = library.encode(text).ids  # some bytes are not in this vocabulary, and get lost
    assert smol.encode(text) == ids
    assert smol.decode(ids, skip_special_tokens=False) == library.decode(ids)


@settings(deadline=None)
@given(text=st.text().filter(lambda text: "▁" not in text))  # the sign for a space
def test_any_text_survives_sentencepiece(text: str, spm: Tokenizer) -> None:
    ids = spm.encode(text, add_special_tokens=False)
    assert spm.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 49151)), skip=st.booleans())
def test_any_ids_decode_as_the_library_decodes(
    ids: list[int], skip: bool, smol: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    assert smol.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(text=st.text(), skip=st.booleans())
def test_sentencepiece_decodes_as_the_library_decodes(
    text: str, skip: bool, spm: Tokenizer
) -> None:
    ids = spm.encode(text)
    assert ids[0] == spm.bos_id
    assert spm.decode(ids, skip) == spm._tokenizer.decode(ids, skip_special_tokens=skip)


def test_tokens_have_bytes_that_join_to_the_text(smol: Tokenizer, spm: Tokenizer) -> None:
    text = "naïve 日本 😀<|im_end|>\n"
    for tokenizer, lead in ((smol, b""), (spm, b" ")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == lead + text.encode()
    ids = smol.encode("😀")
    assert len(ids) > 1
    assert all("\ufffd" in smol.token_text(i) for i in ids)
    assert smol.token_text(2) == "<|im_end|>"
    assert spm.token_bytes(SPM["vocabulary"]["tokens"].index("<0x0A>")) == b"\n"


@pytest.mark.parametrize("token", [49152, 10**9, 2**40, -1])
def test_ids_outside_the_vocabulary_are_nothing(token: int, smol: Tokenizer) -> None:
    assert smol.token_bytes(token) == b""
    assert smol.decode([88, token, 88]) == "hh"


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_the_requests_fault(text: str, smol: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"holds U\+D[8F][0-9A-F]{2} at position \d+"):
        smol.encode(text)


def test_nul_is_a_character(smol: Tokenizer) -> None:
    assert smol.decode(smol.encode("a\0b")) == "a\0b"


def test_many_threads_encode_at_once(smol: Tokenizer) -> None:
    texts = [f"{i} bottles of beer on the wall, " * 200 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smol.encode, texts)) == [smol.encode(text) for text in texts]


# Files --------------------------------------------------------------------------------------------


def test_the_chat_template_becomes_ids(smol: Tokenizer) -> None:
    ids = smol.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    assert smol.decode(ids, skip_special_tokens=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    shorter = smol.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=False
    )
    assert ids[: len(shorter)] == shorter != ids


def test_a_model_without_a_template_refuses_chats(spm: Tokenizer) -> None:
    assert spm.chat_template is None
    with pytest.raises(InvalidRequest, match="no chat template"):
        spm.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_where_templates_come_from(smollm2: Path, tmp_path: Path) -> None:
    def source() -> str:
        template = Tokenizer(tmp_path).chat_template
        assert template is not None
        return template.source

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edited(smollm2, tmp_path, chat_template=named)
    assert source() == "D"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert source() == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert source() == "F"


@pytest.mark.parametrize(
    "add, expected", [({}, [1]), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [1])]
)
def test_the_start_token_of_sentencepiece_models(
    add: dict[str, bool], expected: list[int], tmp_path: Path
) -> None:
    shutil.copy(GOLDENS / "sentencepiece.model", tmp_path / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", **add}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    body = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == expected + body


def test_start_and_end_tokens_of_the_config_override(smollm2: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )

    def ids(**config: bool) -> list[int]:
        edited(smollm2, tmp_path, **config)
        backend.save(str(tmp_path / "tokenizer.json"))
        return Tokenizer(tmp_path).encode("h")

    assert ids() == [1, 88]
    assert ids(add_bos_token=False) == [88]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, 88, 2]


def test_truncation_in_the_file_is_ignored(smollm2: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    edited(smollm2, tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("a b c d e f g h i j")) == 10


def test_tokens_that_only_the_config_lists(smollm2: Path, tmp_path: Path) -> None:
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = {"49152": {"content": "<tool>", "special": True, **entry}}
    tokenizer = Tokenizer(edited(smollm2, tmp_path, added_tokens_decoder=listed))
    assert tokenizer.encode("h<tool>") == [88, 49152]
    assert 49152 in tokenizer.special_ids
    listed = {"49160": {"content": "<tool>", "special": True, **entry}}
    with pytest.raises(ModelError, match="gives '<tool>' the id 49160; it would be 49152"):
        Tokenizer(edited(smollm2, tmp_path, added_tokens_decoder=listed))
    with pytest.raises(ModelError, match="added_tokens_decoder"):
        Tokenizer(edited(smollm2, tmp_path, added_tokens_decoder={"1": "x"}))


def test_named_tokens_become_special(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(edited(smollm2, tmp_path, eos_token="the", pad_token="<absent>"))
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.vocab_size == 49152


def test_older_folders_name_special_tokens_apart(smollm2: Path, tmp_path: Path) -> None:
    shutil.copy(smollm2 / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path).eos_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer(tmp_path).eos_id == 2


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot read tokenizer\.json"):
        Tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="decoder 'WordPiece'"):
        Tokenizer(tmp_path)
