"""However tokens arrive, the text is what decoding them all adds, cut at the first stop string."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.request import ErrorInfo, SamplingParams, TokenEvent, TokenLogprob
from jslora.text import TextAssembler, TextDelta
from jslora.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "tokenizer_goldens"
EMOJI = "😀"


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spm")
    shutil.copy(GOLDENS / "sentencepiece.model", folder / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def event(tokens: Sequence[int] = (), **fields: object) -> TokenEvent:
    return TokenEvent(id="x", tokens=tuple(tokens), **fields)  # type: ignore[arg-type]


def feed(
    assembler: TextAssembler, ids: Sequence[int], cuts: Sequence[int] | None = None
) -> list[TextDelta]:
    """One event a token, or events that end at `cuts`; then the end for "length"."""
    ends = range(1, len(ids) + 1) if cuts is None else [*sorted(cuts), len(ids)]
    deltas, start = [], 0
    for end in ends:
        deltas.append(assembler.push(event(ids[start:end])))
        start = end
    return [*deltas, assembler.push(event(finish_reason="length"))]


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def first_completed(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop) by looking at every prefix of the text, longest stop string first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


WORDS = ["the ", "stop", " st", "日本", EMOJI, "é", "\n\n", "<|im_end|>", "</s>", " ", "a", "ab"]


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_the_text_is_the_decoded_text_cut_at_the_first_stop(
    data: st.DataObject, smol: Tokenizer, spm: Tokenizer
) -> None:
    tokenizer = data.draw(st.sampled_from([smol, spm]), "tokenizer")
    some = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12)
    words = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
    ids = data.draw(some, "ids") + tokenizer.encode(data.draw(words, "text"), False)
    prompt = tokenizer.encode(data.draw(words, "prompt"))
    skip = data.draw(st.booleans(), "skip")
    whole = tokenizer.decode(prompt + ids, skip)[len(tokenizer.decode(prompt, skip)) :]
    inside = st.tuples(st.integers(0, len(whole)), st.integers(1, 6))
    stop = inside.map(lambda at: whole[at[0] : at[0] + at[1]]) | st.sampled_from(WORDS)
    stops = data.draw(st.lists(stop.filter(len), max_size=3), "stops")
    include = data.draw(st.booleans(), "include")
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4), "cuts")

    params = SamplingParams(
        stop=tuple(stops), include_stop_str=include, skip_special_tokens=skip, max_tokens=99
    )
    assembler = TextAssembler(tokenizer, params, prompt)
    deltas = feed(assembler, ids, cuts)

    found = first_completed(whole, stops)
    if found is None:
        assert text_of(deltas) == whole
        assert deltas[-1].finish_reason == "length"
        assert assembler.tokens == len(ids)
    else:
        start, matched = found
        assert text_of(deltas) == whole[: start + len(matched) * include]
        last = next(delta for delta in deltas if delta.finish_reason)
        assert (last.finish_reason, last.stop_reason) == ("stop", matched)
    assert sum(len(delta.tokens) for delta in deltas) == assembler.tokens
    assert assembler.finished


def test_unfinished_characters_are_held_back(smol: Tokenizer) -> None:
    ids = smol.encode(f"a{EMOJI}b")
    assert len(ids) == 5
    texts = [delta.text for delta in feed(TextAssembler(smol, SamplingParams()), ids)]
    assert texts == ["a", "", "", EMOJI, "b", ""]
    cut = feed(TextAssembler(smol, SamplingParams()), ids[:3])
    assert [delta.text for delta in cut] == ["a", "", "", "\ufffd"]


def test_a_character_begun_in_the_prompt_is_finished(smol: Tokenizer) -> None:
    first, *rest = smol.encode(EMOJI)
    assert text_of(feed(TextAssembler(smol, SamplingParams(), [88, first]), rest)) == EMOJI
    assert text_of(feed(TextAssembler(smol, SamplingParams(), [88, first]), [])) == ""


def test_leading_spaces(spm: Tokenizer) -> None:
    ids = spm.encode("the sea", add_special_tokens=False)
    bare = TextAssembler(spm, SamplingParams(), [1])
    after = TextAssembler(spm, SamplingParams(), spm.encode("sells"))
    assert text_of(feed(bare, ids)) == "the sea"
    assert text_of(feed(after, ids)) == " the sea"


def test_what_may_begin_a_stop_string_is_held_back(smol: Tokenizer) -> None:
    assembler = TextAssembler(smol, SamplingParams(stop=("lo wor",)), [1])
    hello = [smol.encode(text) for text in ("hel", "lo", " w", "ide")]
    texts = [assembler.push(event(ids)).text for ids in hello]
    assert texts == ["he", "l", "", "lo wide"]


def test_a_stop_string_ends_the_text_and_drops_later_tokens(smol: Tokenizer) -> None:
    ids = smol.encode("one. two. three")
    logprobs = tuple(TokenLogprob(token=i, logprob=-1.0, rank=1) for i in ids)
    assembler = TextAssembler(smol, SamplingParams(stop=("two",)), [1])
    delta = assembler.push(event(ids, logprobs=logprobs, finish_reason="length"))
    kept = len(smol.encode("one. two"))
    assert delta == TextDelta(
        text="one. ",
        tokens=tuple(ids[:kept]),
        logprobs=logprobs[:kept],
        finish_reason="stop",
        stop_reason="two",
    )
    assert assembler.finished
    assert assembler.tokens == kept < len(ids)
    assert assembler.push(event(ids, finish_reason="length")) == TextDelta()
    assert assembler.tokens == kept


def test_the_stop_string_that_completes_first_counts(smol: Tokenizer) -> None:
    (token,) = smol.encode(" the")
    for stops, text, matched in ((("the", "h"), " t", "h"), (("he", "the"), " ", "the")):
        assembler = TextAssembler(smol, SamplingParams(stop=stops), [1])
        delta = assembler.push(event([token]))
        assert (delta.text, delta.stop_reason) == (text, matched)


def test_held_text_comes_with_the_end(smol: Tokenizer) -> None:
    assembler = TextAssembler(smol, SamplingParams(stop=("stopped",)), [1])
    assert assembler.push(event(smol.encode("now stop"))).text == "now "
    end = assembler.push(event(finish_reason="stop", stop_token=2))
    assert end == TextDelta(text="stop", finish_reason="stop")


def test_a_stop_token_is_the_reason_when_it_was_asked_for(smol: Tokenizer) -> None:
    params = SamplingParams(stop_token_ids=(7,))
    end = TextAssembler(smol, params, [1]).push(event(finish_reason="stop", stop_token=7))
    assert end == TextDelta(finish_reason="stop", stop_reason=7)
    end = TextAssembler(smol, params, [1]).push(event(finish_reason="stop", stop_token=2))
    assert end == TextDelta(finish_reason="stop", stop_reason=None)


def test_stop_strings_wait_for_min_tokens(smol: Tokenizer) -> None:
    (token,) = smol.encode(" the")
    assembler = TextAssembler(smol, SamplingParams(stop=("the",), min_tokens=2), [1])
    assert text_of(feed(assembler, [token] * 4)) == " the the "
    assert assembler.tokens == 3


def test_an_error_ends_nothing_here(smol: Tokenizer) -> None:
    assembler = TextAssembler(smol, SamplingParams(), [1])
    assert assembler.push(event(error=ErrorInfo(type="engine_error", message=""))) == TextDelta()
    assert not assembler.finished
