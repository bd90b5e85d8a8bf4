"""The scheduler with the real allocator and residency, before a device that notices everything."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
from fake_adapters import LAYERS, FakeStore, FakeUploads, make_registration, make_version
from fake_device import Answer, FakeDevice, continue_request
from hypothesis import event, given, settings
from hypothesis import strategies as st
from short_answers import QUANTILE, expect_short_answers

from jslora.adapters.version import Version
from jslora.errors import EngineFailed, InvalidRequest, Overloaded
from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency, Resident
from jslora.memory.room import Room
from jslora.memory.worth import Clock
from jslora.request import Request, SamplingParams, Scaled, TokenEvent
from jslora.schedule import watch
from jslora.schedule.plan import Limits, Plan, Results
from jslora.schedule.scheduler import Scheduler
from jslora.schedule.sequence import weights_key
from jslora.schedule.settings import SchedulerSection

VOCAB = 40
LIMITS = Limits(
    max_running=4, max_step_tokens=8, max_queued=100, max_queued_tokens=10000, max_model_len=64,
    page_size=4, vocab_size=VOCAB, eos_token_ids=(7,), max_rank=4, max_composed=3,
)  # fmt: skip
Scale = tuple[Version, float]
GREEDY = SamplingParams(temperature=0, max_tokens=6)


class Watched(Residency):
    """Notices when an adapter that came for somebody who waits leaves before it was used."""

    scheduler: Scheduler

    def evict(self, resident: Resident) -> None:
        wanted = any(resident.version.digest in s.digests for s in self.scheduler.waiting)
        alone = len(self.scheduler.running) <= 1
        assert alone or not (resident.version.digest in self.fresh and wanted), "it came in vain"
        super().evict(resident)


class Engine:
    """The engine's loop (see `jslora.core`) around a fake device; every step is checked.

    Attributes:
        drawn: tokens drawn on the device for each request.
        transfers: how many uploads become done before each turn, for ever repeated.
        lookahead: whether a step is planned before the one before it is read.
        foresight: whether room is kept for answers as long as `max_tokens`, or for the short ones
            that it was told of before.
    """

    def __init__(
        self, limits: Limits = LIMITS, pages: int = 40, *, transfers: tuple[int, ...] = (9,),
        lookahead: bool = True, chunk: int = 3, again: int = 0, prefix_cache: bool = True,
        foresight: bool = False, section: SchedulerSection | None = None,
    ) -> None:  # fmt: skip
        self.limits = limits
        self.pages, clock = PageAllocator(pages), Clock()
        self.prefix = PrefixCache(self.pages, clock, enabled=prefix_cache)
        self.store = FakeStore(again)
        self.residency = Watched(
            self.pages, clock, FakeUploads(), LAYERS, pages, LAYERS * pages, chunk
        )
        room = Room(self.pages, self.prefix, self.residency)
        section = section or SchedulerSection(reserve="declared" if foresight else QUANTILE)
        self.scheduler = self.residency.scheduler = Scheduler(limits, room, self.store, section)
        if not foresight:
            expect_short_answers(self.scheduler)
        self.device = FakeDevice(limits, pages)
        self.answers: dict[str, Answer] = {}
        self.requests: dict[str, Request] = {}
        self.drawn = Counter[str]()
        self.inflight: tuple[Plan, Results] | None = None
        self._transfers, self._lookahead = cycle(transfers), lookahead

    def add(self, request: Request, *adapters: Version | Scale, read: bool = True) -> None:
        """Submit a request; `read` says whether its adapters' contents are known already."""
        scaled = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
        bound = [make_registration(version, read=read) for version, _ in scaled]
        if not read:
            self.store.unread.update(zip(bound, (version for version, _ in scaled), strict=True))
        names = zip(bound, (scale for _, scale in scaled), strict=True)
        request = replace(request, adapters=tuple(Scaled(r.name, scale) for r, scale in names))
        self.scheduler.add(request, tuple(bound))
        for registration in bound:
            registration.uses += 1
        self.requests[request.id] = request
        self.answers[request.id] = Answer()

    def turn(self) -> Plan | None:
        """One step ahead, one step read."""
        if not self._lookahead:
            self.commit()
        self.store.turn()
        self.scheduler.fetch()
        self.residency.upload.finish(next(self._transfers))
        for chunk in self.residency.writes(4, 0):
            self.device.write(chunk)
        plan = self.scheduler.plan()
        if self.inflight:
            old, _ = self.inflight
            for sequence, samples in zip(old.sequences, old.rows.samples, strict=True):
                waits = sequence.slot is None and not sequence.finished
                assert not (waits and samples), "it was preempted before its token was read"
        if plan:
            self.check_host_tokens(plan)
        results = self.device.execute(plan) if plan else None
        self.commit()
        if plan is None:
            self.take(self.scheduler.failures())
        self.inflight = (plan, results) if plan else None
        return plan

    def commit(self) -> None:
        if self.inflight:
            self.take(self.scheduler.commit(*self.inflight))
            self.scheduler.check()
            self.inflight = None

    def check_host_tokens(self, plan: Plan) -> None:
        """What the host hands over, it was told before; what it was not told is fed back."""
        for row, sequence in zip(plan.rows, plan.sequences, strict=True):
            request = sequence.request
            known = [*request.prompt, *self.answers[request.id].tokens]
            end = row.position + len(row.tokens)
            assert list(row.tokens) == known[row.position : end]
            assert not row.fed or end == len(known)
            self.drawn[request.id] += row.samples

    def take(self, events: list[TokenEvent]) -> None:
        for news in events:
            answer = self.answers[news.id]
            assert answer.end is None, f"news of {news.id} after its end"
            assert news.finish_reason is None or news.error is None
            assert news.prompt_logprobs is None or not answer.tokens
            answer.tokens += news.tokens
            answer.logprobs += news.logprobs
            if news.prompt_logprobs is not None:
                answer.prompt_logprobs = list(news.prompt_logprobs)
            answer.stop_token = news.stop_token
            answer.end = news.error.type if news.error else news.finish_reason

    def run(self, at_most: int = 500) -> int:
        """Turn until nothing is left; the number of turns."""
        for turns in range(at_most):
            if self.scheduler.idle and self.inflight is None:
                return turns
            self.turn()
        raise AssertionError(f"{len(self.scheduler.waiting)} wait, {at_most} turns were not enough")


def make_request(name: str, length: int, params: SamplingParams = GREEDY) -> Request:
    return Request(
        id=name, prompt=tuple((ord(name[0]) + 3 * i) % VOCAB for i in range(length)), params=params
    )


# Whole traces ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request, the turn it comes at, its adapters, and the turns until its client leaves."""

    request: Request
    turn: int
    adapters: tuple[tuple[int, float], ...]
    patience: int | None
    read: bool


@dataclass(frozen=True)
class Trace:
    limits: Limits
    pages: int
    adapters: tuple[int, ...]
    arrivals: tuple[Arrival, ...]
    transfers: tuple[int, ...]
    delays: tuple[int, ...]
    refused: frozenset[int]
    pinned: frozenset[int]
    again: int
    chunk: int
    lookahead: bool
    prefix_cache: bool


SCALES = st.sampled_from([1.0, 1.0, 0.5, 0.0])


@st.composite
def params(draw: Callable) -> SamplingParams:
    most = draw(st.integers(0, 24))
    plain = draw(st.booleans())
    options = {} if plain else {
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "top_k": draw(st.sampled_from([0, 5])),
        "top_p": draw(st.sampled_from([1.0, 0.9])),
        "logprobs": draw(st.sampled_from([None, 0, 3])),
        "min_tokens": draw(st.integers(0, most)),
        "presence_penalty": draw(st.sampled_from([0.0, 0.5])),
        "logit_bias": draw(st.sampled_from([(), ((3, 1.0),)])),
        "stop_token_ids": tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=3))),
        "ignore_eos": draw(st.booleans()),
    }  # fmt: skip
    return SamplingParams(**{
        "max_tokens": most, "temperature": 0.0, "seed": draw(st.integers(0, 2**64 - 1)),
        "prompt_logprobs": draw(st.sampled_from([None, 0, 2])), **options,
    })  # fmt: skip


@st.composite
def traces(draw: Callable) -> Trace:
    adapters = tuple(draw(st.lists(st.integers(1, 12), max_size=5)))
    limits = replace(
        LIMITS,
        max_running=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.integers(4, 24)),
        page_size=draw(st.sampled_from([1, 4, 8])),
    )
    soon = draw(st.booleans())
    shared = draw(st.lists(st.integers(0, VOCAB - 1), min_size=18, max_size=18))
    numbers = st.sampled_from(range(len(adapters))) if adapters else st.nothing()
    arrivals = []
    for number in range(draw(st.integers(1, 10))):
        own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
        prompt = (*shared[: draw(st.integers(0, 18))], *own)
        owner = {"tenant": draw(st.sampled_from("ab")), "cache_salt": draw(st.sampled_from("cd"))}
        request = Request(id=str(number), prompt=prompt, params=draw(params()), **owner)
        chosen = draw(st.lists(numbers, unique=True, max_size=min(3, len(adapters))))
        scaled = tuple((n, draw(SCALES)) for n in sorted(chosen))
        patience = draw(st.one_of(st.none(), st.none(), st.integers(0, 40)))
        turn = draw(st.integers(0, 3 if soon else 30))
        arrivals.append(Arrival(request, turn, scaled, patience, draw(st.booleans())))
    some = st.frozensets(numbers)
    needed = [pages_for(limits, adapters, arrival) for arrival in arrivals]
    return Trace(
        limits=limits,
        pages=max(2, max(needed) + draw(st.integers(-2, 12))),
        adapters=adapters,
        arrivals=tuple(arrivals),
        transfers=(*draw(st.lists(st.integers(0, 4), max_size=4)), 1),
        delays=tuple(draw(st.integers(0, 5)) for _ in adapters),
        refused=draw(some),
        pinned=draw(some),
        again=draw(st.integers(0, 2)),
        chunk=draw(st.integers(1, 9)),
        lookahead=draw(st.booleans()),
        prefix_cache=draw(st.sampled_from([True, True, False])),
    )


def pages_for(limits: Limits, adapters: tuple[int, ...], arrival: Arrival) -> int:
    """Pages of the pool that are enough for a request alone, the null page included."""
    total = len(arrival.request.prompt) + arrival.request.params.max_tokens
    own = sum(adapters[number] for number, _ in arrival.adapters)
    return 1 + -(-total // limits.page_size) + own


@settings(max_examples=500, deadline=None)
@given(traces())
def test_any_trace_is_served_whole_and_leaves_nothing_behind(trace: Trace) -> None:
    engine = Engine(
        trace.limits, trace.pages, transfers=trace.transfers, lookahead=trace.lookahead,
        chunk=trace.chunk, again=trace.again, prefix_cache=trace.prefix_cache,
    )  # fmt: skip
    versions = [make_version(number, n) for number, n in enumerate(trace.adapters)]
    for version, delay in zip(versions, trace.delays, strict=True):
        engine.store.delays[version.digest] = delay
    engine.store.refused = {versions[number].digest for number in trace.refused}
    engine.residency.pinned = {versions[number].digest for number in trace.pinned}
    leaving: dict[str, int] = {}
    left: set[str] = set()
    last = max(arrival.turn for arrival in trace.arrivals)
    tokens = sum(len(a.request.prompt) + a.request.params.max_tokens for a in trace.arrivals)
    turns = 0
    while turns <= last or not engine.scheduler.idle or engine.inflight:
        for arrival in trace.arrivals:
            name = arrival.request.id
            if arrival.turn == turns:
                adapters = [(versions[number], scale) for number, scale in arrival.adapters]
                if pages_for(trace.limits, trace.adapters, arrival) > trace.pages:
                    with pytest.raises(InvalidRequest):
                        engine.add(arrival.request, *adapters)
                else:
                    engine.add(arrival.request, *adapters, read=arrival.read)
                    if arrival.patience is not None:
                        leaving[name] = turns + arrival.patience
            if leaving.get(name) == turns and engine.answers[name].end is None:
                engine.scheduler.abort([name])
                left.add(name)
        engine.turn()
        turns += 1
        assert turns <= last + 200 + 20 * tokens, "no end in sight"
    event(f"preempted: {engine.scheduler.preemptions > 0}")
    event(f"composed: {any(len(arrival.adapters) > 1 for arrival in trace.arrivals)}")
    event(f"evicted: {engine.residency.evictions > 0}")
    event(f"found in the prefix cache: {engine.scheduler.hit_tokens > 0}")
    event(f"forgotten by the prefix cache: {engine.prefix.evictions > 0}")
    rejected = 0
    for arrival in trace.arrivals:
        name = arrival.request.id
        if name not in engine.answers:
            continue
        answer = engine.answers[name]
        digests = [versions[number].digest for number, _ in arrival.adapters]
        weights = weights_key(digests, [scale for _, scale in arrival.adapters])
        expected = continue_request(arrival.request, weights, trace.limits)
        if answer.end == "adapter_rejected":
            rejected += 1
            assert any(number in trace.refused for number, _ in arrival.adapters)
            assert answer.tokens == []
        elif name in left:
            assert answer.end is None
            assert answer.tokens == expected.tokens[: len(answer.tokens)]
        else:
            assert answer == expected
            if answer.end == "length":
                assert engine.drawn[name] == len(answer.tokens), "no token is drawn in vain"
    assert rejected <= len(trace.refused)
    assert not engine.scheduler.running and not engine.scheduler.waiting
    engine.scheduler.check()
    assert not any(resident.users for resident in engine.residency.residents.values())
    while engine.residency.loading:  # for one who has left
        engine.residency.upload.finish(100)
        engine.residency.writes(100, 0)
    for digest in list(engine.residency.residents):
        engine.residency.retire(digest)
    engine.prefix.clear()
    engine.pages.check([])


# What is refused ---------------------------------------------------------------------------------


def refuse(
    engine: Engine, request: Request, message: str, *adapters: Version | Scale
) -> InvalidRequest:
    """A request is refused, and nothing of it stays behind."""
    waiting = len(engine.scheduler.waiting)
    with pytest.raises(InvalidRequest, match=message) as error:
        engine.add(request, *adapters)
    assert len(engine.scheduler.waiting) == waiting
    return error.value


def test_a_sequence_longer_than_the_context_is_refused_with_both_numbers() -> None:
    engine = Engine()
    error = refuse(
        engine,
        make_request("a", 60, replace(GREEDY, max_tokens=5)),
        "60 prompt tokens and max_tokens 5 make 65; the model's context is 64",
    )
    assert error.param == "max_tokens"
    engine.add(make_request("a", 60, replace(GREEDY, max_tokens=4)))
    engine.run()


def test_more_pages_than_the_pool_has_beside_the_adapter_are_refused_with_both_numbers() -> None:
    engine = Engine(pages=11)
    params = replace(GREEDY, max_tokens=8, ignore_eos=True, stop=("x",))
    refuse(engine, make_request("a", 33, params), "41 tokens need 11 pages .*; the pool has 10")
    refuse(
        engine, make_request("a", 17, params),
        "25 tokens need 7 pages beside the adapters' 4; the pool has 10", make_version(1, 4),
    )  # fmt: skip
    engine.add(make_request("a", 16, params), make_version(1, 4))
    engine.add(make_request("b", 32, params))
    engine.run()
    assert [len(answer.tokens) for answer in engine.answers.values()] == [8, 8]


# Several adapters --------------------------------------------------------------------------------


def test_adapters_that_do_not_fit_together_are_refused_with_all_numbers() -> None:
    engine = Engine()
    four = [make_version(number, 1) for number in range(4)]
    refuse(engine, make_request("a", 3), "4 adapters in one request; at most 3", *four)
    refuse(
        engine, make_request("a", 3), r"scale .* is 2\.5, not a number from 0 to 2", (four[0], 2.5)
    )
    refuse(engine, make_request("a", 3), "named twice", four[0], four[0])
    low = Engine(replace(LIMITS, max_rank=2))
    error = refuse(low, make_request("a", 3), r"ranks 1 \+ 1 \+ 1 make 3; .* may have 2", *four[:3])
    assert error.param == "adapters"
    params = replace(GREEDY, max_tokens=1)
    small = Engine(pages=9)
    message = "4 tokens need 1 pages beside the adapters' 8; the pool has 8"
    refuse(small, make_request("a", 3, params), message, make_version(1, 4), make_version(2, 4))


def test_a_request_gets_all_its_adapters_though_each_has_to_push_others_out() -> None:
    """The pool holds the two of one request, and nothing else beside its tokens."""
    engine = Engine(pages=10)
    params = replace(GREEDY, max_tokens=2, ignore_eos=True)
    versions = [make_version(number, 4) for number in range(4)]
    engine.residency.pinned = {version.digest for version in versions}
    for number, pair in enumerate([(0, 1), (2, 3), (1, 2), (0, 3)]):
        engine.add(make_request(str(number), 2, params), *(versions[n] for n in pair))
    engine.run()
    assert [len(answer.tokens) for answer in engine.answers.values()] == [2] * 4
    assert engine.residency.evictions > 0


def test_adapters_that_host_memory_cannot_hold_at_once_come_one_after_the_other() -> None:
    engine = Engine()
    engine.store.fits_host = lambda pages: pages <= 4  # type: ignore[method-assign]
    engine.add(make_request("a", 3), make_version(1, 3), make_version(2, 3), read=False)
    engine.run()
    assert engine.answers["a"].tokens


def test_scales_of_one_adapter_share_its_pages_and_no_keys() -> None:
    engine, version = Engine(), make_version(1, 4)
    params = replace(GREEDY, max_tokens=1)
    for name, scale in (("a", 1.0), ("b", 0.5), ("c", 0.5)):
        engine.add(replace(make_request("a", 9, params), id=name), (version, scale))
        engine.run()
    assert engine.residency.loads == 1
    assert engine.scheduler.hit_tokens == 8, "of the third request, from the second"


# What else is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"stop_token_ids": (3, VOCAB)}, "stop_token_ids", "token id 40 is not below 40"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", "token id -1 is not"),
        ({"stop_token_ids": (1,) * 17}, "stop_token_ids", "17 entries; at most 16"),
        ({"logit_bias": ((1, 1.0),) * 301}, "logit_bias", "301 entries; at most 300"),
    ],
)
def test_ids_that_do_not_exist_or_are_too_many_are_refused(
    change: dict, param: str, message: str
) -> None:
    request = make_request("a", 3, replace(GREEDY, **change))
    assert refuse(Engine(), request, message).param == param


@pytest.mark.parametrize("prompt", [(), (1, VOCAB), (-1,)])
def test_prompts_that_are_empty_or_hold_unknown_ids_are_refused(prompt: tuple[int, ...]) -> None:
    request = Request(id="a", prompt=prompt, params=GREEDY)
    assert refuse(Engine(), request, "empty|is not below 40").param == "prompt"


def test_an_id_can_be_used_again_only_after_its_request_ended() -> None:
    engine = Engine()
    engine.add(make_request("a", 3))
    assert refuse(engine, make_request("a", 3), "id 'a' is in use").param == "request_id"
    engine.run()
    engine.add(make_request("a", 3))
    engine.run()


def test_the_queue_is_bounded_in_requests() -> None:
    engine = Engine(replace(LIMITS, max_queued=2))
    for name in ("a", "b"):
        engine.add(make_request(name, 3))
    with pytest.raises(Overloaded, match="2 requests are waiting") as error:
        engine.add(make_request("c", 3))
    assert error.value.retry_after
    engine.turn()
    engine.add(make_request("c", 3))
    engine.run()


def test_the_queue_is_bounded_in_tokens_but_takes_any_one_prompt_that_fits() -> None:
    engine = Engine(replace(LIMITS, max_queued_tokens=20))
    engine.add(make_request("a", 30))
    with pytest.raises(Overloaded, match="1 requests are waiting"):
        engine.add(make_request("b", 1))
    engine.turn()
    engine.add(make_request("b", 10))
    engine.add(make_request("c", 10))
    with pytest.raises(Overloaded):
        engine.add(make_request("d", 1))
    engine.run()


# Who runs when -----------------------------------------------------------------------------------


def in_step(plan: Plan | None) -> dict[str, int]:
    """Tokens of each request in a step."""
    if plan is None:
        return {}
    pairs = zip(plan.sequences, plan.rows, strict=True)
    return {sequence.request.id: row.length for sequence, row in pairs}


LONG = replace(GREEDY, max_tokens=30, ignore_eos=True, stop=("x",))


def test_a_long_prompt_delays_no_stream() -> None:
    engine = Engine()
    engine.add(make_request("a", 3, LONG))
    engine.turn()
    engine.add(make_request("b", 30, LONG))
    steps = [in_step(engine.turn()) for _ in range(6)]
    assert steps == [*[{"a": 1, "b": 7}] * 4, {"a": 1, "b": 2}, {"a": 1, "b": 1}]


def test_an_older_prompt_delays_no_stream_either() -> None:
    engine = Engine()
    engine.store.delays["001"] = 1
    engine.add(make_request("a", 30, LONG), make_version(1, 1))
    engine.add(make_request("b", 3, LONG))
    steps = [in_step(engine.turn()) for _ in range(6)]
    assert [step["b"] for step in steps] == [3, 1, 1, 1, 1, 1]
    assert steps[3]["a"] == 7


def test_those_who_came_first_start_first() -> None:
    engine = Engine(replace(LIMITS, max_running=2))
    for name in ("a", "b", "c"):
        engine.add(make_request(name, 3, replace(LONG, max_tokens=3 if name == "a" else 9)))
    steps = [in_step(engine.turn()) for _ in range(5)]
    assert steps[0] == {"a": 3, "b": 3} and set(steps[2]) == {"a", "b"}
    assert steps[4] == {"b": 1, "c": 3}


def test_an_adapter_that_is_being_read_holds_nobody_back() -> None:
    engine = Engine()
    engine.store.delays["001"] = 3
    engine.add(make_request("a", 3, LONG), make_version(1, 4))
    engine.add(make_request("b", 3, LONG))
    engine.add(make_request("c", 3, LONG), make_version(2, 4))
    steps = [in_step(engine.turn()) for _ in range(6)]
    assert steps[0] == {"b": 3, "c": 3}
    assert "a" not in steps[2] and "a" in steps[3]


def test_a_failed_read_ends_its_request_alone() -> None:
    engine = Engine()
    engine.store.refused.add("001")
    engine.add(make_request("a", 3), make_version(1, 4))
    engine.add(make_request("b", 3))
    engine.run()
    assert engine.answers["a"].end == "adapter_rejected"
    assert engine.answers["b"] == continue_request(engine.requests["b"], "", LIMITS)


def test_the_youngest_makes_way_and_comes_back_before_those_who_wait() -> None:
    engine = Engine(replace(LIMITS, max_running=3, max_step_tokens=32), pages=13)
    for name in ("a", "b", "c"):
        engine.add(make_request(name, 6, LONG))
    engine.turn()
    engine.add(make_request("d", 6, LONG))
    while not engine.scheduler.preemptions:
        engine.turn()
    assert [s.request.id for s in engine.scheduler.running] == ["a", "b"]
    assert [s.request.id for s in engine.scheduler.waiting] == ["c", "d"]
    engine.run()
    for name, request in engine.requests.items():
        assert engine.answers[name] == continue_request(request, "", LIMITS)


def test_idle_adapters_leave_before_anybody_is_preempted() -> None:
    engine = Engine(pages=20)
    engine.add(make_request("a", 3), make_version(1, 8))
    engine.run()
    engine.add(make_request("b", 20, LONG))
    engine.run()
    assert (engine.scheduler.preemptions, engine.residency.evictions) == (0, 1)


def test_an_adapter_that_is_loading_is_waited_for() -> None:
    """It was taken ahead of its turn, and its pages are wanted now; nobody else can give any."""
    engine = Engine(pages=11, transfers=(*[0] * 30, 9))
    engine.add(make_request("a", 8, LONG))
    engine.add(make_request("b", 3, GREEDY), make_version(1, 5))
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert engine.answers["a"] == continue_request(engine.requests["a"], "", LIMITS)


@pytest.mark.parametrize("length", [6, 30])
def test_a_pinned_adapter_leaves_when_nothing_else_lets_a_request_go_on(length: int) -> None:
    engine = Engine(pages=11)
    engine.residency.pinned.add("001")
    engine.add(make_request("a", 4), make_version(1, 6))
    engine.run()
    engine.add(make_request("b", length, replace(LONG, max_tokens=36 - length)))
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert engine.answers["b"] == continue_request(engine.requests["b"], "", LIMITS)


def test_a_pinned_adapter_leaves_for_one_that_has_no_room_beside_it() -> None:
    engine = Engine(pages=11)
    engine.residency.pinned.add("001")
    for number, name in ((1, "a"), (2, "b")):
        engine.add(make_request(name, 4), make_version(number, 6))
    engine.run()
    assert engine.answers["b"] == continue_request(engine.requests["b"], "002", LIMITS)


def test_a_pinned_adapter_stays_while_somebody_can_be_preempted() -> None:
    engine = Engine(pages=21)
    engine.residency.pinned.add("001")
    engine.add(make_request("a", 4), make_version(1, 6))
    engine.run()
    for name in ("b", "c"):
        engine.add(make_request(name, 20, LONG))
    engine.run()
    assert engine.scheduler.preemptions > 0 and engine.residency.evictions == 0


def test_an_adapter_leaves_pages_for_those_further_ahead() -> None:
    """The second's adapter would fit now, but not beside the tokens of the first."""
    engine = Engine(replace(LIMITS, max_running=2), pages=14)
    engine.store.delays["001"] = 3
    engine.add(make_request("a", 24, GREEDY), make_version(1, 5))
    engine.add(make_request("b", 3, GREEDY), make_version(2, 4))
    engine.turn()
    assert not engine.residency.residents, "13 pages are there, 6 and 5 of them spoken for"
    engine.run()
    assert engine.residency.evictions <= 1 and engine.scheduler.preemptions == 0


def test_what_is_found_in_the_prefix_cache_is_not_computed() -> None:
    engine = Engine()
    engine.add(make_request("a", 13))
    engine.run()
    engine.add(make_request("a", 13))
    assert in_step(engine.turn()) == {"a": 1}
    engine.run()
    assert (engine.scheduler.asked_tokens, engine.scheduler.hit_tokens) == (26, 12)
    for owner in ({"tenant": "other"}, {"cache_salt": "other"}):
        engine.add(replace(make_request("a", 13), **owner))
        engine.run()
    assert engine.scheduler.hit_tokens == 12, "nothing of somebody else's"


def test_a_preempted_sequence_goes_on_from_what_the_prefix_cache_still_has() -> None:
    engine = Engine(replace(LIMITS, max_running=2, max_step_tokens=32), pages=14)
    for name in ("a", "b"):
        engine.add(make_request(name, 8, LONG))
    while not engine.scheduler.preemptions:
        engine.turn()
    found = engine.scheduler.hit_tokens
    engine.run()
    assert engine.scheduler.hit_tokens > found
    for name, request in engine.requests.items():
        assert engine.answers[name] == continue_request(request, "", engine.limits)


# Ends --------------------------------------------------------------------------------------------


def test_what_runs_ends_with_the_error_and_what_waits_goes_on() -> None:
    engine = Engine(replace(LIMITS, max_running=2))
    for name in ("a", "b", "c"):
        engine.add(make_request(name, 3, LONG), make_version(1, 2))
    for _ in range(5):
        engine.turn()
    engine.inflight = None  # the device lost it
    engine.take(engine.scheduler.fail(engine.scheduler.running, EngineFailed("lost")))
    engine.residency.forget_all()
    engine.prefix.clear()
    assert [engine.answers[name].end for name in "abc"] == ["engine_error", "engine_error", None]
    engine.scheduler.check()
    engine.run()
    assert engine.answers["c"] == continue_request(engine.requests["c"], "001", LIMITS)


def test_all_can_be_ended() -> None:
    engine = Engine(replace(LIMITS, max_running=1))
    for name in ("a", "b"):
        engine.add(make_request(name, 3, LONG))
    engine.turn()
    engine.take(engine.scheduler.fail_all(EngineFailed("closing")))
    assert [engine.answers[name].end for name in "ab"] == ["engine_error"] * 2
    engine.prefix.clear()
    assert engine.scheduler.idle and engine.pages.free == 39


def test_output_that_is_not_finite_ends_its_request_alone() -> None:
    engine = Engine()
    for name in ("a", "b"):
        engine.add(make_request(name, 3, LONG))
    engine.turn()
    _, results = engine.inflight
    results.finite[0] = False
    engine.run()
    assert (engine.answers["a"].end, engine.scheduler.corrupt) == ("corrupt_output_error", 1)
    assert engine.answers["b"] == continue_request(engine.requests["b"], "", LIMITS)


def test_tokens_are_counted() -> None:
    engine = Engine()
    for name, length in (("a", 11), ("b", 9)):
        engine.add(make_request(name, length, LONG))
    engine.run()
    assert engine.scheduler.prompt_tokens == 20
    assert engine.scheduler.generated_tokens == sum(len(a.tokens) for a in engine.answers.values())
    assert watch.adapters([]) == ()


def test_nobody_hears_of_a_request_after_it_was_aborted() -> None:
    engine = Engine(replace(LIMITS, max_running=2))
    for name in ("a", "b", "c"):
        engine.add(make_request(name, 3, LONG))
    for _ in range(3):
        engine.turn()
    heard = len(engine.answers["a"].tokens)
    engine.scheduler.abort(["a", "c", "nobody"])
    engine.scheduler.check()
    engine.run()
    assert (engine.answers["a"].end, len(engine.answers["a"].tokens)) == (None, heard)
    assert engine.answers["c"] == Answer()
    assert engine.answers["b"] == continue_request(engine.requests["b"], "", LIMITS)
