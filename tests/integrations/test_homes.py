"""Homes: shares stay equal, few adapters move, and only what is overloaded is left."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from jslora.integrations.homes import CROWDED, FORGET_SECONDS, POPULAR, Homes

ROOM = 4


def placed(homes: Homes, adapters: list[str], replicas: list[str], now: float = 0) -> list[str]:
    return [homes.home(adapter, replicas, now) for adapter in adapters]


def names(count: int) -> list[str]:
    return [f"adapter-{index}" for index in range(count)]


@given(st.integers(1, 60), st.integers(1, 7))
def test_shares_are_equal_and_homes_are_kept(adapters: int, replicas: int) -> None:
    homes, there = Homes(ROOM), [f"r{index}" for index in range(replicas)]
    first = placed(homes, names(adapters), there)
    assert max(Counter(first).values()) == -(-adapters // replicas)
    assert placed(homes, names(adapters), there) == first


@given(st.integers(1, 60), st.integers(2, 7), st.data())
def test_a_replica_that_goes_hands_on_only_its_own(
    adapters: int, replicas: int, data: st.DataObject
) -> None:
    homes, there = Homes(ROOM), [f"r{index}" for index in range(replicas)]
    before = placed(homes, names(adapters), there)
    gone = data.draw(st.sampled_from(there))
    left = [name for name in there if name != gone]
    placed(homes, names(adapters), left)
    after = placed(homes, names(adapters), left)
    assert max(Counter(after).values()) == -(-adapters // len(left))
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    # Of the others' at most those that were above an equal share after the first had moved.
    assert moved <= before.count(gone) + len(left)


def test_a_new_replica_takes_its_share_and_no_more() -> None:
    homes = Homes(ROOM)
    before = placed(homes, names(40), ["a"])
    placed(homes, names(40), ["a", "b"])
    after = placed(homes, names(40), ["a", "b"])
    assert Counter(before) == {"a": 40} and Counter(after) == {"a": 20, "b": 20}


def test_what_nobody_asked_for_in_a_long_time_counts_no_more() -> None:
    homes = Homes(ROOM)
    placed(homes, names(10), ["a"])
    late = placed(homes, ["x", "y"], ["a", "b"], now=FORGET_SECONDS)
    assert sorted(late) == ["a", "b"]


def test_a_crowded_home_is_left_and_a_popular_adapter_leaves_early() -> None:
    homes = Homes(ROOM)
    home = homes.home("x", ["a", "b"], 0)
    other = "b" if home == "a" else "a"

    def first(load: int, alike: int) -> str:
        return homes.order("x", {home: load, other: 0}, alike, 0)[0]

    assert first(CROWDED * ROOM - 1, 1) == home
    assert first(CROWDED * ROOM, 1) == other
    assert first(POPULAR * ROOM, POPULAR * ROOM - 1) == home
    assert first(POPULAR * ROOM, POPULAR * ROOM) == other


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(1, 50))
def test_every_replica_is_in_the_order_once(loads: list[int], alike: int) -> None:
    by_name = {f"r{index}": load for index, load in enumerate(loads)}
    order = Homes(ROOM).order("x", by_name, alike, 0)
    assert sorted(order) == sorted(by_name)
    if all(load == loads[0] for load in loads):
        assert order[0] == Homes(ROOM).home("x", by_name, 0)
