"""Aliases: shares by weight, sticky picks, and what is undone by a rollback."""

import math
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.aliases import MAX_ALIASES, MAX_TARGETS, Alias, AliasTable
from jslora.errors import InvalidRequest, UnknownModel

WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=5
)


def make(**targets: float) -> AliasTable:
    table = AliasTable()
    table.put("sql", targets)
    return table


@pytest.mark.parametrize("sticky", [True, False])
def test_picks_follow_the_weights(sticky: bool) -> None:
    table = make(old=75, new=20, newest=5)
    n = 20_000
    found = Counter(table.pick("sql", str(i) if sticky else None) for i in range(n))
    for target, share in (("old", 0.75), ("new", 0.2), ("newest", 0.05)):
        assert abs(found[target] / n - share) < 6 * math.sqrt(share * (1 - share) / n)


@settings(deadline=None)
@given(WEIGHTS, st.text(), st.randoms())
def test_a_key_has_one_pick_wherever_it_is_made(
    targets: dict[str, float], key: str, random: Any
) -> None:
    pairs = list(targets.items())
    random.shuffle(pairs)
    first, second = AliasTable(), AliasTable()
    first.put("sql", targets)
    second.put("sql", dict(pairs))
    assert first.pick("sql", key) == second.pick("sql", key) in targets


def test_as_few_keys_move_as_must() -> None:
    keys = [str(i) for i in range(2000)]
    before, after = make(a=90, b=5, c=5), make(a=90, b=20, c=5)
    moves = {(before.pick("sql", k), after.pick("sql", k)) for k in keys}
    assert {(x, y) for x, y in moves if x != y} == {("a", "b"), ("c", "b")}


def test_aliases_split_their_keys_apart() -> None:
    table = make(old=50, new=50)
    table.put("chat", {"old": 50, "new": 50})
    same = sum(table.pick("sql", str(i)) == table.pick("chat", str(i)) for i in range(2000))
    assert 850 < same < 1150


def test_a_rollback_is_undone_by_another() -> None:
    table = make(old=1)
    with pytest.raises(InvalidRequest, match="alias 'sql' was never changed"):
        table.rollback("sql")
    table.put("sql", {"old": 95, "new": 5})
    table.put("sql", {"new": 5, "old": 95.0})  # the same again: nothing to undo
    assert table.rollback("sql") == Alias({"old": 1}, {"old": 95, "new": 5})
    assert table.targets_of("new") == [] and table.pick("sql", "x") == "old"
    assert table.rollback("sql") == table.get("sql") == Alias({"old": 95, "new": 5}, {"old": 1})


def test_names_and_targets() -> None:
    table = make(a=1, b=1)
    table.put("chat", {"b": 1})
    assert table.names() == ["chat", "sql"]
    assert (table.targets_of("a"), table.targets_of("b")) == (["sql"], ["chat", "sql"])
    assert table.remove("sql").targets == {"a": 1, "b": 1}
    assert table.names() == ["chat"] and table.get("sql") is None and table.targets_of("a") == []
    for method in (table.remove, table.rollback, table.pick):
        with pytest.raises(UnknownModel, match="there is no alias 'sql'"):
            method("sql")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "an alias has 1 to 16 targets, not 0"),
        ({f"t{i}": 1 for i in range(MAX_TARGETS + 1)}, "1 to 16 targets, not 17"),
        ({"a": 0}, "the weight of a is 0; finite numbers above zero"),
        ({"a": 1, "b": -1}, "the weight of b is -1;"),
        ({"a": math.nan}, "the weight of a is nan;"),
        ({"a": math.inf}, "the weight of a is inf;"),
        ({"a": 10**400}, "the weight of a is 1000"),
        ({"a\n": 0}, r"the weight of a\\n is 0;"),
    ],
)
def test_targets_are_checked_and_nothing_changes(targets: dict[str, float], message: str) -> None:
    table = make(old=1)
    with pytest.raises(InvalidRequest, match=message) as e:
        table.put("sql", targets)
    assert e.value.param == "targets" and table.get("sql") == Alias({"old": 1})
    with pytest.raises(InvalidRequest):
        table.put("other", targets)
    assert table.names() == ["sql"]


@pytest.mark.parametrize("name", ["", "a b", "../x", "x\n", "-x", "x" * 129])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no alias; expected is"):
        AliasTable().put(name, {"a": 1})


def test_weights_as_far_apart_as_numbers_go() -> None:
    table = make(a=5e-324, b=1.7e308, c=1)
    assert {table.pick("sql") for _ in range(50)} == {"b"}
    assert make(a=5e-324).pick("sql") == "a"


def test_their_number_is_bounded() -> None:
    table = AliasTable()
    for i in range(MAX_ALIASES):
        table.put(f"a{i}", {"x": 1})
    with pytest.raises(InvalidRequest, match=f"there are {MAX_ALIASES} aliases already"):
        table.put("one-more", {"x": 1})
    table.put("a0", {"y": 1})  # a change is none more


def test_a_pick_is_from_before_or_after_a_change() -> None:
    table = make(a=1, b=1)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            table.put("sql", {"c": 1})
            table.rollback("sql")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {table.pick("sql") for _ in range(3000)} <= {"a", "b", "c"}
    finally:
        stop.set()
        thread.join()
    assert table.names() == ["sql"]
