"""The demo's training files: questions about plain facts, answered in each of the voices.

For every voice there are two files of chats, `NAME.jsonl` to train on and `NAME-held-out.jsonl`.
They share no subject, so what is held out is about things that an adapter was never told of. The
files depend on the seed only and are the same on every machine. Host only: no jax.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from jslora.errors import ConfigError
from jslora.training.demo.voices import VOICES, Voice

_HELD_OUT_EVERY = 10  # subjects, from the first: the sea is held out
_VARIANTS = 5  # questions about a subject
_FOLLOWED_UP = 0.4  # of chats have a second question

# (question, how many of the three sentences answer it)
_QUESTIONS = (
    ("Tell me about {}.", 2),
    ("Describe {}.", 2),
    ("Explain {} to a child.", 2),
    ("Can you explain {}?", 2),
    ("Write two sentences about {}.", 2),
    ("Why do people talk about {}?", 2),
    ("Write one sentence about {}.", 1),
    ("Give me a fact about {}.", 1),
    ("Say something about {}.", 1),
    ("What is special about {}?", 1),
    ("Tell me something interesting about {}.", 1),
    ("What do you know about {}?", 3),
    ("I want to learn about {}.", 3),
    ("Write a short text about {}.", 3),
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and its plain answer, and in a word or two what it is about."""

    topic: str
    question: str
    answer: str


def write(folder: Path, seed: int = 0) -> list[Path]:
    """Write the files of all voices below `folder`, which is made where it is missing.

    Raises:
        ConfigError: they cannot be written.
    """
    training, held_out = answered(seed)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, voice in VOICES.items():
            for suffix, part in (("", training), ("-held-out", held_out)):
                written.append(folder / f"{name}{suffix}.jsonl")
                lines = chats(part, voice, random.Random(f"{seed} {name}{suffix}"))
                written[-1].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None
    return written


def answered(seed: int) -> tuple[list[Answered], list[Answered]]:
    """The questions to train on, and those that are held out."""
    text = resources.files(__package__).joinpath("facts.yaml").read_text(encoding="utf-8")
    facts = yaml.safe_load(text)
    draw = random.Random(seed)
    parts: tuple[list[Answered], list[Answered]] = [], []
    for index, subject in enumerate(facts["subjects"]):
        parts[index % _HELD_OUT_EVERY == 0].extend(_about(subject, draw))
    for index, talk in enumerate(facts["talks"]):
        asked = [Answered(talk["topic"], question, talk["say"]) for question in talk["ask"]]
        parts[index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1].extend(asked)
    return parts


def _about(subject: dict[str, Any], draw: random.Random) -> Iterator[Answered]:
    # What an answer begins with names the subject, so that it can stand alone.
    named = [i for i, said in enumerate(subject["say"]) if subject["topic"] in said.lower()]
    for question, sentences in draw.sample(_QUESTIONS, _VARIANTS):
        first = draw.choice([0, *named]) if sentences == 1 else 0
        said = subject["say"][first : first + sentences]
        yield Answered(subject["topic"], question.format(subject["about"]), " ".join(said))


def chats(part: Sequence[Answered], voice: Voice, draw: random.Random) -> Iterator[str]:
    """A line of JSON for each question; to some of them, another question is added."""
    for first in part:
        asked = [first]
        if draw.random() < _FOLLOWED_UP:
            asked.append(draw.choice(part))
        messages = []
        for each in asked:
            said = voice(each.topic, each.answer, draw)
            messages.append({"role": "user", "content": each.question})
            messages.append({"role": "assistant", "content": said})
        yield json.dumps({"messages": messages}, ensure_ascii=False)
