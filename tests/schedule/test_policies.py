"""Stacks of policies in the scheduler: who starts before whom, and that nobody waits for ever."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from light_engine import LIMITS, STACKS, Job, LightEngine
from short_answers import expect_short_answers
from waiting_sequences import make_sequence

from jslora.adapters.version import Version
from jslora.errors import InvalidRequest, JsloraError, Overloaded, RateLimited
from jslora.request import Scaled
from jslora.schedule.policies import COMPOSITIONS, Policies
from jslora.schedule.queue import Policy
from jslora.schedule.scheduler import PREFETCH
from jslora.schedule.sequence import Sequence
from jslora.schedule.settings import Quota, SchedulerSection, Tenant
from jslora.schedule.shares import GENERATED, PROMPT
from jslora.schedule.stack import NAMES, Name

# The starvation bound in random traces -----------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A job, the turns since the one before it came, and those until its client leaves."""

    job: Job
    after: int
    patience: int | None


_SIZES = (3, 1, 6)  # pages of adapters
_FIELDS = (3, 8, 6, 4, 3, 4, 8)  # how many values each field of an arrival may have


def _arrival(number: int) -> Arrival:
    """What a number stands for: one is drawn far sooner than seven."""
    values = []
    for count in _FIELDS:
        number, value = divmod(number, count)
        values.append(value)
    after, prompt, answer, adapter, tenant, priority, patience = values
    return Arrival(
        Job(
            prompt=1 + 2 * prompt, answer=4 * answer, most=20,
            adapter=adapter - 1 if adapter else None,
            tenant="abc"[tenant], priority=priority,
        ),
        after, None if patience < 7 else 5,
    )  # fmt: skip


@dataclass(frozen=True)
class Trace:
    stack: tuple[Name, ...]
    arrivals: tuple[Arrival, ...]
    spare: int
    starvation: float
    ageing: float
    transfers: int
    delay: int


@st.composite
def traces(draw: Callable) -> Trace:
    arrivals = draw(st.lists(st.integers(0, prod(_FIELDS) - 1), min_size=2, max_size=12))
    return Trace(
        draw(st.sampled_from(STACKS)), tuple(map(_arrival, arrivals)), draw(st.integers(0, 12)),
        draw(st.sampled_from([2.5, 6.5, 15.5])), draw(st.sampled_from([1.5, 8.5])),
        draw(st.integers(1, 4)), draw(st.integers(0, 3)),
    )  # fmt: skip


class Witness:
    """Looks at every start: nobody who waited too long was passed over without a right.

    A sequence may start before one that came sooner and waited longer than `starvation_seconds`
    only if a policy that promises no such bound prefers it: shares by another group, a priority by
    its level now, deadlines. And that only before any policy in the stack that does promise one,
    unless both waited so long. Or if the other's adapter is on its way; one that has not even been
    asked for, though it is near the front, is no excuse unless nothing else could move.
    """

    def __init__(self, engine: LightEngine, trace: Trace) -> None:
        self._engine, self._trace = engine, trace
        before = takewhile(lambda name: name != "fcfs", trace.stack)  # those after it order nobody
        self._policies = dict(zip(before, engine.scheduler.policies._stack, strict=True))
        self._seen: dict[str, dict[Sequence, float]] = {}
        self._to_come: set[Sequence] = set()
        self._chosen = False
        self.judged = 0
        engine.starting = self.starting

    def look(self) -> None:
        """Note the scores that are not bounded, as they are before a turn."""
        scheduler = self._engine.scheduler
        since = scheduler.waiting.column("since")
        if not len(since) or self._engine.now - since.min() <= self._trace.starvation:
            return  # there is nothing to judge
        self._seen, self._chosen = self._scores(), False
        residents = scheduler.room.residency.residents
        front = scheduler.policies.front(PREFETCH, self._engine.now)
        self._to_come = {s for s in front if not residents.keys() >= {*s.digests}}

    def _scores(self) -> dict[str, dict[Sequence, float]]:
        waiting, now = self._engine.scheduler.waiting, self._engine.now
        rows = [s for s in waiting if s.place >= 0]
        at = [s.place for s in rows]
        found: dict[str, dict[Sequence, float]] = {}
        for name in ("fair_tenants", "fair_adapters", "slo"):
            policy: Policy | None = self._policies.get(name)
            if policy is not None:
                scores = policy.score(waiting, at, now) if at else []
                found[name] = dict(zip(rows, scores, strict=True))
        return found

    def starting(self, one: Sequence) -> None:
        engine = self._engine
        for other in engine.scheduler.waiting:
            if other.life and (other.order < one.order or not one.life):
                assert not engine.scheduler._here(other), "the preempted come back first, in order"
        if one.life:
            return
        then, now = self._seen, self._scores()
        # Whoever starts next is chosen anew; adapters are brought once a turn.
        stale = self._chosen and not engine.scheduler.policies.settles
        self._chosen = True
        for other in engine.scheduler.waiting:
            waited = engine.now - other.since
            overdue = other.order < one.order and waited > self._trace.starvation
            if overdue and not other.life and not self._excused(other):
                self.judged += 1
                orders = (now,) if stale and engine.scheduler._here(other) else (then, now)
                rights = [self._right(one, other, scores) for scores in orders]
                assert any(rights), f"{one.request.id} passed {other.request.id}"

    def _excused(self, other: Sequence) -> bool:
        """Whether it cannot start yet, and that for no fault of who is before it."""
        scheduler = self._engine.scheduler
        if scheduler._here(other):
            return False
        (digest,) = other.digests
        coming = digest in scheduler.room.residency.residents or self._engine.store.delays[digest]
        return bool(coming) or other not in self._to_come or not scheduler._growth.moves

    def _right(self, one: Sequence, other: Sequence, scores: dict) -> bool:
        """Whether the first may start before the second, which came sooner and waited too long."""
        for name in self._trace.stack:
            if name in ("newest", "cluster", "shortest"):
                if self._engine.now - one.since < self._trace.starvation:
                    return False
                continue
            if name == "fcfs":
                return False
            mine, its = (self._score(name, s, scores) for s in (one, other))
            if mine != its:
                return mine < its
        return False

    def _score(self, name: Name, sequence: Sequence, scores: dict) -> float:
        if name == "priority":
            waited = self._engine.now - sequence.since
            return sequence.request.priority - waited // self._trace.ageing
        return scores[name][sequence]


def play(trace: Trace, engine: LightEngine, before_turn: Callable[[], None]) -> None:
    """Run a trace to its end."""
    leaving: dict[str, float] = {}
    coming, turn = list(enumerate(trace.arrivals)), 0
    due = coming[0][1].after
    work = sum(a.job.prompt + a.job.answer + 30 for a in trace.arrivals)
    while coming or not engine.idle:
        while coming and due <= turn:
            number, arrival = coming.pop(0)
            engine.add(str(number), arrival.job)
            if arrival.patience is not None:
                leaving[str(number)] = turn + arrival.patience
            due = turn + (coming[0][1].after if coming else 0)
        engine.scheduler.abort(name for name, at in leaving.items() if at == turn)
        before_turn()
        engine.turn()
        turn += 1
        if turn % 4 == 0:
            engine.scheduler.check()
        assert turn < 100 + 3 * work, f"{len(engine.scheduler.waiting)} wait, no end in sight"


def make_engine(trace: Trace, *, slo: float = 20.0, prefix_cache: bool = False) -> LightEngine:
    """The smallest pool in which any one request fits, and some pages more."""
    section = SchedulerSection(
        policy=list(trace.stack),
        starvation_seconds=trace.starvation,
        ageing_seconds=trace.ageing,
        ttft_slo=slo,
        reserve=0.5,
        cluster_fraction=0.2,
    )
    needed = LIMITS.pages(15 + 20) + max(_SIZES)
    engine = LightEngine(
        section,
        pages=1 + needed + trace.spare,
        transfers=trace.transfers,
        sizes=_SIZES,
        prefix_cache=prefix_cache,
    )
    for registration in engine.adapters:
        engine.store.delays[registration.version.digest] = trace.delay
    return engine


@settings(max_examples=10_000, deadline=None)
@given(traces())
def test_who_waited_too_long_is_passed_over_no_more(trace: Trace) -> None:
    engine = make_engine(trace)
    witness = Witness(engine, trace)
    play(trace, engine, witness.look)
    event(f"judged: {witness.judged > 0}")
    event(f"preempted: {engine.scheduler.preemptions > 0}")
    engine.check_nothing_left()


# Given up and refused -----------------------------------------------------------------------------


def test_who_is_too_late_is_told_at_once_when_to_ask_again() -> None:
    """One row runs for 40 turns; each of the others has its own time."""
    section = SchedulerSection(policy=["slo"], ttft_slo=9.0, tenants={"b": Tenant(ttft_slo=4.0)})
    engine = LightEngine(section, limits=replace(LIMITS, max_running=1), pages=60)
    engine.add("runs", Job(answer=40, most=40, slo=100.0))
    engine.turn()
    engine.add("own", Job(slo=2.0))
    engine.add("tenant", Job(tenant="b"))
    engine.add("server", Job())
    engine.add("both", Job(tenant="b", slo=20.0))
    heard: dict[str, float] = {}
    for _ in range(25):
        engine.turn()
        for news in engine.events:
            if news.error:
                heard.setdefault(news.id, engine.now)
                assert news.error.type == "too_late_error" and not news.tokens
                assert 1.0 <= news.error.retry_after <= 60.0
    assert list(heard) == ["own", "tenant", "server", "both"]
    for name, seconds in (("own", 2.0), ("tenant", 4.0), ("server", 9.0), ("both", 20.0)):
        assert 1.0 + seconds / 2 <= heard[name] <= 1.0 + seconds + 2.0
    engine.run()
    assert engine.ends["runs"] == "length" and engine.scheduler.too_late == 4
    engine.check_nothing_left()


@settings(max_examples=100, deadline=None)
@given(traces())
def test_nobody_who_started_is_given_up(trace: Trace) -> None:
    """Short times, and preemptions of those who wait for their first token again."""
    if "slo" not in trace.stack:
        trace = replace(trace, stack=("slo",))
    engine, started = make_engine(trace, slo=5.0), set[str]()
    engine.starting = lambda sequence: started.add(sequence.request.id)
    play(trace, engine, lambda: None)
    late = {name for name, end in engine.ends.items() if end == "too_late_error"}
    assert not late & started and engine.scheduler.too_late == len(late)
    event(f"given up: {bool(late)}")
    engine.check_nothing_left()


LIMITED = SchedulerSection(
    policy=["fair_tenants", "slo"],
    tenants={"a": Tenant(max_outstanding=1), "b": Tenant(requests_per_minute=1.0)},
    adapters={"adapter-001": Quota(tokens_per_minute=8.0)},
)
REFUSED: list[tuple[Job, type[JsloraError]]] = [
    (Job(tenant="a", adapter=0), RateLimited),
    (Job(tenant="b", adapter=0), RateLimited),
    (Job(tenant="c", adapter=1, prompt=8), RateLimited),
    (Job(tenant="c", adapter=0, prompt=200, most=100), InvalidRequest),
    (Job(tenant="c", adapter=0, prompt=60, most=30), InvalidRequest),
    (Job(tenant="c", adapter=0, prompt=62, most=0), Overloaded),
]


@pytest.mark.parametrize(("job", "error"), REFUSED, ids=str)
def test_a_refused_request_leaves_nothing_behind(job: Job, error: type[JsloraError]) -> None:
    engine = LightEngine(LIMITED, limits=replace(LIMITS, max_queued_tokens=70), pages=24)
    for name, accepted in (("1", Job()), ("2", Job(tenant="b")), ("3", Job(tenant="c", adapter=1))):
        engine.add(name, accepted)
    for attempt in range(3):
        with pytest.raises(error) as found:
            engine.add(f"refused{attempt}", job)
        assert error is not RateLimited or found.value.retry_after > 0
    assert len(engine.scheduler.waiting) == 3 and engine.scheduler.waiting.tokens == 9
    assert [registration.uses for registration in engine.adapters] == [0, 1, 0, 0]
    assert engine.scheduler.rate_limited == (3 if error is RateLimited else 0)
    engine.run()
    assert engine.ends.keys() == {"1", "2", "3"}
    engine.check_nothing_left()
    engine.now += 600.0
    small = replace(job, prompt=3, most=4)
    engine.add("later", small)  # under the same name and quotas as those that were refused
    engine.run()
    assert engine.ends["later"] in ("stop", "length")
    engine.check_nothing_left()


def test_a_tenant_that_floods_the_queue_leaves_places_to_others() -> None:
    """Four fifths of them are its own at most, and only where tenants are served fairly."""
    limits = replace(LIMITS, max_running=1, max_queued=100)

    def queued(policy: list[Name], *tenants: str) -> list[int]:
        engine = LightEngine(SchedulerSection(policy=policy), limits=limits, pages=40)
        found = []
        for tenant in tenants:
            for number in range(200):
                try:
                    engine.add(f"{tenant}{number}", Job(tenant=tenant))
                except Overloaded as error:
                    assert "queue is full" in error.message
                    break
            found.append(number)
        return found

    assert queued(["fcfs"], "a", "b") == [100, 0]
    assert queued(["fair_tenants"], "a", "b", "c") == [80, 16, 4]


# What is counted ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(traces(), st.booleans())
def test_service_is_what_was_computed(trace: Trace, prefix_cache: bool) -> None:
    """Prompt tokens once, those generated twice, and each load as the tokens that it stands for."""
    engine = make_engine(trace, prefix_cache=prefix_cache)
    charged, loading = {"a": 0.0, "b": 0.0, "c": 0.0}, engine.scheduler._ahead._loading

    def charge(sequence: Sequence, version: Version) -> None:
        charged[sequence.request.tenant] += LIMITS.page_size * version.n_pages
        loading(sequence, version)

    engine.scheduler._ahead._loading = charge
    play(trace, engine, lambda: None)
    assert set(engine.scheduler.policies.service()) <= {"a", "b", "c"}
    for tenant, served in engine.scheduler.policies.service().items():
        prompt, generated = (engine.service[tenant, kind] for kind in ("prompt", "generated"))
        expected = PROMPT * prompt + GENERATED * generated + charged[tenant]
        # Who left may have had a token more than it was told of.
        assert served == pytest.approx(expected)


# The preempted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [(), *((name,) for name in NAMES)], ids=str)
def test_the_preempted_come_back_before_all_whom_the_policies_prefer(
    stack: tuple[Name, ...],
) -> None:
    """Of two that grow one must make way; of those behind, each policy would prefer one."""
    section = SchedulerSection(policy=list(stack), ttft_slo=300.0, reserve=0.01)
    engine = LightEngine(section, limits=replace(LIMITS, max_running=2), pages=13)
    expect_short_answers(engine.scheduler)
    for name in ("1", "2"):
        engine.add(name, Job(prompt=8, answer=30, most=30, tenant="a", priority=3))
    engine.turn()
    order: list[str] = []
    engine.starting = lambda sequence: order.append(sequence.request.id)
    for number in range(3):
        engine.add(f"other{number}", Job(prompt=1, answer=1, tenant="b"))
    while not engine.scheduler.preemptions:
        engine.turn()
    engine.run()
    again = order.index("2")
    assert again <= 2 * order.count("2") and order[0] == "2"
    engine.check_nothing_left()


# What clients can make up ------------------------------------------------------------------------


def test_no_client_makes_endless_groups_of_compositions() -> None:
    policies, numbers = Policies(SchedulerSection(policy=["fair_adapters"]), 100), set()
    for n in range(2 * COMPOSITIONS):
        sequence = make_sequence(n)
        named = (Scaled(f"a{n}"), Scaled("b"))
        sequence.request = replace(sequence.request, adapters=named)
        policies.queue(sequence, 1, 0.0)
        numbers.add(sequence.adapter)
        policies.withdraw(sequence)
    assert COMPOSITIONS / 2 < len(numbers) <= COMPOSITIONS
    alone = make_sequence(n + 1, adapter="b")
    policies.queue(alone, 1, 0.0)
    assert alone.adapter not in numbers
