"""The starvation watch: the longest waits by adapter and by tenant."""

from waiting_sequences import make_sequence

from jslora.request import TenantStats
from jslora.schedule.watch import LISTED, oldest, tenants


def test_the_longest_wait_of_each_adapter_comes_first() -> None:
    waiting = [
        make_sequence(0, adapter="x", since=8.0),
        make_sequence(1, adapter="x", since=3.0),
        make_sequence(2, since=1.0),
        make_sequence(3, adapter="b", since=3.0),
    ]
    assert oldest(waiting, 10.0) == (("", 9.0), ("b", 7.0), ("x", 7.0))
    assert oldest([], 10.0) == ()


def test_of_many_adapters_those_that_wait_longest_are_listed() -> None:
    waiting = [make_sequence(n, adapter=f"a{n:02}", since=float(n)) for n in range(40)]
    listed = oldest(reversed(waiting), 100.0)
    assert listed == tuple((f"a{n:02}", 100.0 - n) for n in range(LISTED))


def test_who_was_preempted_after_its_first_token_waits_no_more_for_it() -> None:
    waiting = [make_sequence(0, life=1, generated=2), make_sequence(1, life=1, since=4.0)]
    assert oldest(waiting[:1], 10.0) == (("", 0.0),)
    assert oldest(waiting, 10.0) == (("", 6.0),)


def test_a_clock_that_another_thread_read_later_makes_no_wait_negative() -> None:
    assert oldest([make_sequence(0, since=5.0)], 4.9) == (("", 0.0),)


def test_tenants_are_told_what_they_have_and_were_given() -> None:
    running = [make_sequence(0, tenant="a"), make_sequence(1, tenant="b")]
    waiting = [
        make_sequence(2, tenant="a", since=1.0),
        make_sequence(3, tenant="a", since=4.0),
        make_sequence(4, tenant="new", since=0.0),
    ]
    found = tenants(running, waiting, {"a": 7.0, "b": 3.0, "gone": 1.0}, 10.0)
    assert found == {
        "a": TenantStats(running=1, waiting=2, oldest_wait=9.0, service=7.0),
        "b": TenantStats(running=1, waiting=0, oldest_wait=0.0, service=3.0),
        "gone": TenantStats(service=1.0),
    }
