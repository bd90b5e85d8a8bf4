"""Examples hold the tokens that requests would have; what cannot is refused by file and line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jslora.tokenizer import Tokenizer
from jslora.training.data import Corpus, DataError, Example, read, read_parts

GOLDENS = Path(__file__).parents[1] / "tokenizer_goldens"
END = 2


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Sentencepiece with a start token, and Llama 2's way of writing turns."""
    folder = tmp_path_factory.mktemp("spm")
    shutil.copy(GOLDENS / "sentencepiece.model", folder / "tokenizer.model")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[' + m.content + ']' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def file_of(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def chat(*contents: str) -> dict[str, Any]:
    """A user and an assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def learnt(example: Example) -> list[list[int]]:
    """The runs of tokens that are learnt."""
    runs: list[list[int]] = []
    for i in np.flatnonzero(example.learnt):
        if i == 0 or not example.learnt[i - 1]:
            runs.append([])
        runs[-1].append(int(example.tokens[i]))
    return runs


def test_a_completion_follows_the_prompt_that_a_request_has(
    tmp_path: Path, smol: Tokenizer
) -> None:
    path = file_of(tmp_path, {"prompt": "The sea", "completion": " is blue.", "id": 7})
    (example,) = read(path, smol, [END], 64).examples
    prompt = smol.encode("The sea")
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert learnt(example) == [[*smol.encode(" is blue."), END]]


def test_every_turn_follows_what_a_request_for_it_sends(tmp_path: Path, smol: Tokenizer) -> None:
    line = chat("Hi", "Arr!", "Bye", "Farewell.", "never answered")
    (example,) = read(file_of(tmp_path, line), smol, [END], 128).examples
    text = smol.decode(example.tokens, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("Farewell.<|im_end|>")
    answers = [[*smol.encode("Arr!"), END], [*smol.encode("Farewell."), END]]
    assert learnt(example) == answers
    for turn, answer in ((1, answers[0]), (3, answers[1])):
        request = smol.apply_chat_template(line["messages"][:turn])
        assert example.tokens[: len(request) + len(answer)].tolist() == [*request, *answer]


def test_a_turn_that_nothing_asked_for_is_read_but_not_learnt(
    tmp_path: Path, smol: Tokenizer
) -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    line = {"messages": [greeting, *chat("Hi", "Arr!")["messages"]]}
    (example,) = read(file_of(tmp_path, line), smol, [END], 128).examples
    assert learnt(example) == [[*smol.encode("Arr!"), END]]
    assert "Welcome!" in smol.decode(example.tokens)


def test_spaces_of_sentencepiece_stay_with_their_words(tmp_path: Path, spm: Tokenizer) -> None:
    line = chat("the sea", "the ship", "and", "the sky")
    (example,) = read(file_of(tmp_path, line), spm, [END], 128).examples
    request = spm.apply_chat_template(line["messages"][:3])
    assert example.tokens[: len(request)].tolist() == request
    whole = spm.apply_chat_template(line["messages"], add_generation_prompt=False)
    assert example.tokens.tolist() == whole
    assert [run[-1] for run in learnt(example)] == [END, END]


def test_what_is_too_long_is_cut_or_dropped_and_told(tmp_path: Path, smol: Tokenizer) -> None:
    lines = [
        {"prompt": "a b c d", "completion": " e f"},
        {"prompt": "a b c", "completion": " d e f g h"},
        {"prompt": "a b c d e f g h i j", "completion": " k"},
        "",
    ]
    corpus = read(file_of(tmp_path, *lines), smol, [END], 7)
    assert [len(example) for example in corpus.examples] == [7, 7]
    assert (corpus.cut, corpus.dropped) == (1, 1)
    assert corpus.told() == (
        "data.jsonl: 2 examples, 14 tokens, 7 learnt, 1 cut to the length of a row, "
        "1 more dropped whole"
    )


def test_a_first_token_alone_cannot_be_learnt(tmp_path: Path, smol: Tokenizer) -> None:
    path = file_of(tmp_path, {"prompt": "", "completion": "Hello there"})
    (example,) = read(path, smol, [END], 64).examples
    assert example.learnt.all()
    with pytest.raises(DataError, match="in none of 1 is any of the first 1 tokens learnt"):
        read(path, smol, [END], 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "an object is expected, not list"),
        ({"mesages": []}, r"the keys are \['mesages'\]"),
        ({"prompt": "a", "messages": []}, "either"),
        ({"prompt": "a"}, '"completion" is missing'),
        ({"prompt": 3, "completion": "b"}, '"prompt" is 3; a string is expected'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "Answer: ", "completion": "yes"}, "meet.*belong to the completion"),
        ({"prompt": "a", "completion": "\ud800"}, "surrogate"),
        ({"messages": []}, '"messages" is \\[\\]'),
        ({"messages": [3]}, r"messages\[0\] is 3; an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        (chat("Hi"), "nothing to learn"),
        ({"messages": chat("Hi", "Arr")["messages"][1:]}, "nothing to learn"),
        ({f"key {i}": 0 for i in range(99)}, r"the keys are \['key 0', .{,200}$"),
        (chat("Hi", "\n\nArr"), r"messages\[1\]: .* begin it without line ends"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, smol: Tokenizer, line: object, message: str) -> None:
    path = file_of(tmp_path, chat("Hi", "Arr"), "", line)
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        read(path, smol, [END], 64)


def test_a_turn_without_an_end_is_refused(tmp_path: Path, smol: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"ends the turn with none of .* \[9\]"):
        read(file_of(tmp_path, chat("Hi", "Arr")), smol, [9], 64)


def test_wrong_files_are_named(tmp_path: Path, smol: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent.*No such file"):
        read(tmp_path / "absent", smol, [END], 64)
    with pytest.raises(DataError, match="holds no example to learn from"):
        read(file_of(tmp_path, "", " "), smol, [END], 64)
    with pytest.raises(DataError, match="names no end token"):
        read(file_of(tmp_path, chat("Hi", "Arr")), smol, [], 64)
    (tmp_path / "latin").write_bytes(b'\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin:2: byte 12 is not UTF-8"):
        read(tmp_path / "latin", smol, [END], 64)


def test_what_is_held_out_is_drawn_by_the_seed(tmp_path: Path, smol: Tokenizer) -> None:
    path = file_of(tmp_path, *({"prompt": "n", "completion": f" {i}"} for i in range(40)))

    def parts(seed: int) -> tuple[list[str], list[str]]:
        texts = [
            [smol.decode(example.tokens) for example in corpus.examples]
            for corpus in read_parts(path, 0.2, seed, smol, [END], 64)
        ]
        return texts[0], texts[1]

    training, held_out = parts(0)
    assert (len(training), len(held_out)) == (32, 8)
    assert len({*training, *held_out}) == 40
    assert parts(0) == (training, held_out) != parts(1)
    corpus, other = read_parts(path, path, 0, smol, [END], 64)
    assert len(corpus.examples) == len(other.examples) == 40


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 0), (0.95, 4)])
def test_empty_parts_are_refused(fraction: float, count: int) -> None:
    example = Example(np.zeros(3, np.int32), np.ones(3, bool))
    with pytest.raises(DataError, match=f"held-out share of {fraction} of 4 examples is {count}"):
        Corpus("d", (example,) * 4, 0, 0).split(fraction, 0)
