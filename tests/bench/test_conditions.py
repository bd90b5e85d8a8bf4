"""What is compared, and in which order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora.bench.conditions import Experiment, Plan, Site, room, turns
from jslora.errors import ConfigError

SITE = Site(
    base="base",
    adapters=tuple(f"a{i}" for i in range(50)),
    room=20,
    wide=("w0", "w1"),
    spare=("s0",),
)


def plan(**values: object) -> Plan:
    return Plan(**{"blocks": {"room": 2, "loads": 1, "sweep": 2}, "sweep": (1, 20, 30), **values})  # type: ignore[arg-type]


def test_each_block_runs_every_condition_once_there_and_back() -> None:
    order = [(t.experiment, t.block, t.condition.name) for t in turns(plan(), SITE)]
    assert order == [
        ("room", 0, "fits"), ("room", 0, "twice"), ("room", 0, "all"),
        ("room", 1, "all"), ("room", 1, "twice"), ("room", 1, "fits"),
        ("loads", 0, "no probes"), ("loads", 0, "resident"),
        ("loads", 0, "absent"), ("loads", 0, "called"),
        ("sweep", 0, "1"), ("sweep", 0, "20"), ("sweep", 0, "30"),
        ("sweep", 1, "30"), ("sweep", 1, "20"), ("sweep", 1, "1"),
    ]  # fmt: skip


@given(st.integers(1, 6).map(lambda half: 2 * half))
def test_over_a_pair_of_blocks_no_condition_runs_earlier_than_another(blocks: int) -> None:
    order = turns(plan(blocks={"sweep": blocks}), SITE)
    places: Counter[str] = Counter()
    for place, turn in enumerate(order):
        places[turn.condition.name] += place
    assert len(set(places.values())) == 1


def test_working_sets_are_nested_and_sized_by_the_room() -> None:
    fits, twice, every = (t.condition for t in turns(plan(blocks={"room": 1}), SITE))
    assert (len(fits.models), len(twice.models), len(every.models)) == (20, 40, 50)
    assert fits.models == twice.models[:20] and twice.models == every.models[:40]
    work = {(c.streams, c.requests, c.input_tokens, c.output_tokens) for c in (fits, twice, every)}
    assert work == {(16, 64, 64, 64)}


def test_loads_leave_rows_for_probes_and_decode_as_long() -> None:
    found = [t.condition for t in turns(plan(blocks={"loads": 1}), SITE)]
    assert [c.probe for c in found] == [None, "resident", "absent", "called"]
    for condition in found:
        assert condition.models == ("base", *SITE.adapters[:7])
        assert (condition.streams, condition.requests) == (12, 12)
        assert (condition.input_tokens, condition.output_tokens) == (16, 256)


def test_the_room_is_what_rows_at_full_length_leave() -> None:
    asked = plan(streams=16, input_tokens=64, output_tokens=64)
    assert room(asked, pages=1 + 16 * 8 + 300, page_size=16, adapter_pages=3) == 100
    assert room(asked, pages=16 * 8 + 300, page_size=16, adapter_pages=3) == 99
    assert room(plan(input_tokens=65), pages=1 + 16 * 9 + 2, page_size=16, adapter_pages=3) == 0
    assert room(asked, pages=10, page_size=16, adapter_pages=3) == 0


@pytest.mark.parametrize(
    ("experiment", "room_for", "message"),
    [("room", 0, "no adapter fits"), ("room", 26, "52 adapters are needed"),
     ("sweep", 20, "60 adapters are needed for it, 50 are registered")],
)  # fmt: skip
def test_a_server_that_cannot_show_it_is_an_error(
    experiment: Experiment, room_for: int, message: str
) -> None:
    site = Site(
        base="base", adapters=SITE.adapters, room=room_for, wide=SITE.wide, spare=SITE.spare
    )
    with pytest.raises(ConfigError, match=message):
        turns(plan(blocks={experiment: 1}, sweep=(1, 60)), site)
    assert turns(plan(blocks={experiment: 0, "loads": 1}, sweep=(1, 60)), site)


@pytest.mark.parametrize(
    "wrong",
    [{"streams": 0}, {"load_rate": float("inf")}, {"blocks": {"room": 0}}, {"sweep": ()},
     {"blocks": {"room": 3, "loads": -1}}, {"sweep": (0, 1)}, {"output_tokens": -1}],
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        plan(**wrong)
