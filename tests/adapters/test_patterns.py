"""Patterns mean what they mean to Python's `re`, and hostile ones cost nothing."""

import re

import pytest
from adapter_folders import every_target, key
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.adapters.patterns import PatternTable, compile_pattern
from jslora.errors import AdapterRejected

NAMES = [key(*target) for target in every_target(12)]

_PIECES = [
    *"ab.19_|()[]{}*+?^$\\-,:", "q_proj", "self_attn", "layers", r"\.", r"\d", r"\w", ".*", ".+",
    "[0-9]", "[^.]", "(?:", "(?i:", "{2}", "{1,3}", "{,2}", "{01}", "[[:alpha:]]", "[a&&b]", r"\b",
    r"\1", "(?=", "(?<!",
]  # fmt: skip


@settings(deadline=None, max_examples=2000)
@given(
    text=st.lists(st.sampled_from(_PIECES), max_size=7).map("".join),
    name=st.sampled_from(NAMES),
)
def test_an_accepted_pattern_matches_as_in_python(text: str, name: str) -> None:
    try:
        table = PatternTable("rank_pattern", {text: 1}, 0)
        whole = compile_pattern("target_modules", text)
    except AdapterRejected:
        return
    # The pieces are too short to keep `re` busy.
    assert table.get(name) == bool(re.match(rf"(.*\.)?({text})$", name))
    assert bool(whole.fullmatch(name)) == bool(re.fullmatch(text, name))


def test_common_patterns_are_accepted() -> None:
    for text in (
        "q_proj",
        r"model\.layers\.(1|2[0-9])\..*",
        "^model.*[kv]_proj$",
        r"layers.\d+.mlp.\w*",
    ):
        assert compile_pattern("rank_pattern", text, r"(.*\.)?(", ")$")


@pytest.mark.parametrize(
    "text",
    [
        r"(\w+\.?)+!",
        r"(.*)*(.*)*(.*)*(.*)*x",
        "(a|aa|aaa|.)+!",
        r"((\w|\.)*)*!",
        r"(.+)+\.(.+)+\.(.+)+!",
        ".*" * 200 + "!",
    ],
)
def test_patterns_that_keep_python_busy_for_ever_end_at_once(text: str) -> None:
    table = PatternTable("rank_pattern", {text: 1}, 0)
    assert all(table.get(name) == 0 for name in NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(?=q)q", "linear time"),
        ("(?<!q)q", "linear time"),
        ("q++", "linear time"),
        ("(?>q)", "linear time"),
        ("q{1001}", "linear time"),
        ("(((q{100}){100}){100})", "linear time"),
        (r"(q)\1", "read differently"),
        (r"\x71_proj", "read differently"),
        (r"\Qq.proj\E", "read differently"),
        (r"q\z", "read differently"),
        ("[[:alpha:]]", "read differently"),
        ("[^[:alpha:]]", "read differently"),
        ("[a--b]", "read differently"),
        ("q{,3}", "read differently"),
        ("q{03}", "read differently"),
        ("\uff51", "read differently"),
        ("(?i)q", "is no regular expression"),
        ("q)", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(" * 500, "is no regular expression"),
        ("q" * 513, "has 513 characters"),
    ],
)
def test_a_pattern_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(AdapterRejected, match=f"rank_pattern: the pattern .*{message}"):
        PatternTable("rank_pattern", {text: 1}, 0)
