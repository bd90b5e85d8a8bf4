"""Jobs: one at a time for each key, failures told once, nothing left."""

import threading
import time
from collections.abc import Iterator

import pytest
from stores import poll

from jslora.adapters.jobs import Jobs
from jslora.errors import AdapterRejected


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    made.close()


def settle(jobs: Jobs, key: str) -> None:
    poll(lambda: None if jobs.runs(key) else True)


def fail() -> None:
    raise AdapterRejected("it is bad")


def test_a_failure_is_told_once_and_then_it_starts_over(jobs: Jobs) -> None:
    for _ in range(2):
        jobs.want("a", fail)
        settle(jobs, "a")
        with pytest.raises(AdapterRejected, match="it is bad"):
            jobs.want("a", fail)
        assert not jobs.runs("a")


def test_starting_and_forgetting_drop_a_failure(jobs: Jobs) -> None:
    done: list[int] = []
    for drop in (lambda: jobs.start("a", lambda: done.append(1)), lambda: jobs.forget("a")):
        jobs.want("a", fail)
        settle(jobs, "a")
        drop()
        settle(jobs, "a")
        jobs.want("a", lambda: done.append(2))
        settle(jobs, "a")
    assert done == [1, 2, 2]


def test_a_job_that_was_forgotten_while_it_ran_tells_nothing(jobs: Jobs) -> None:
    go = threading.Event()
    jobs.want("a", lambda: go.wait(60) and fail())
    jobs.forget("a")
    go.set()
    settle(jobs, "a")
    jobs.want("a", lambda: None)


def test_a_long_rest_lets_short_jobs_pass(jobs: Jobs) -> None:
    go, order = threading.Event(), []

    def rest() -> None:
        go.wait(60)
        order.append("long")

    jobs.want("a", lambda: rest)
    jobs.want("a", lambda: order.append("again"))  # it runs: none is started
    jobs.want("b", lambda: order.append("short"))
    settle(jobs, "b")
    assert jobs.runs("a") and order == ["short"]
    go.set()
    settle(jobs, "a")
    assert order == ["short", "long"]


def test_closing_waits_for_what_runs_and_drops_the_rest() -> None:
    jobs, order, begun = Jobs(), [], threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        order.append("slow")

    jobs.want("a", slow)
    jobs.want("b", lambda: order.append("never"))
    assert begun.wait(60)
    jobs.close()
    jobs.start("c", lambda: order.append("never"))
    assert order == ["slow"]
