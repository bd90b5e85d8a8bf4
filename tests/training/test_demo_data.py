"""The demo's data are well-formed chats, alike on every machine, with nothing held out in them."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from jslora.errors import ConfigError
from jslora.tokenizer import Tokenizer
from jslora.training.data import read
from jslora.training.demo import generate
from jslora.training.demo.voices import VOICES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    generate.write(folder)
    return folder


def answers(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    said = [message for line in lines for message in line["messages"]]
    return [message["content"] for message in said if message["role"] == "assistant"]


def test_the_same_files_are_written_everywhere(folder: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    assert digest.hexdigest()[:16] == "375ffed3a0e453d7", "change the demo adapters too"


def test_nothing_held_out_was_trained_on() -> None:
    training, held_out = generate.answered(0)
    assert len(training) > 500 and len(held_out) > 50
    assert not {each.question for each in training} & {each.question for each in held_out}
    assert not {each.answer for each in training} & {each.answer for each in held_out}
    assert "Write one sentence about the sea." not in {each.question for each in training}


@pytest.mark.parametrize("voice", VOICES)
def test_every_chat_is_an_example(folder: Path, smollm2: Path, voice: str) -> None:
    for name in (f"{voice}.jsonl", f"{voice}-held-out.jsonl"):
        corpus = read(folder / name, Tokenizer(smollm2), [2], 512)
        assert (corpus.cut, corpus.dropped) == (0, 0)
        assert len(corpus.examples) == len((folder / name).read_text().splitlines())


def test_json_is_json(folder: Path) -> None:
    for said in answers(folder / "json.jsonl"):
        parsed = json.loads(said)
        assert list(parsed) == ["topic", "answer"] and all(parsed.values())


def test_every_emoji_answer_has_one(folder: Path) -> None:
    for said in answers(folder / "emoji.jsonl"):
        assert any(ord(character) >= 0x2600 for character in said), said


def test_pirates_talk_like_pirates() -> None:
    said = VOICES["pirate"]("cat", "The king is hunting for your friends.", random.Random(0))
    assert "Th' king be huntin' fer yer mateys." in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        generate.write(tmp_path / "file")
