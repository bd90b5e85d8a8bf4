"""Random work for an engine whose every token tells which weights made it (see `fingerprint`).

A hypothesis state machine keeps a model of what is registered under which name, and lets requests,
loads, unloads, aliases, cancels and faults overlap; it waits for one only where a rule says so.
Checked at once: every token is of an adapter that the request may have been bound to when it was
sent, and all of one; those that it names with the scale 0 do not show, though they are held like
the others; every error has a cause that the machine knows of. Checked whenever all is
quiet, and at the end of every example: pages, host bytes, slots and the ledger are accounted for by
what is registered, and nothing is left of anything else.

One engine serves all examples of a run; after an example that failed comes a new one.
"""

import contextlib
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fingerprint import IDS, LENGTH, token
from fuzz_world import (
    AT_START,
    BAD,
    CONTENTS,
    LIVE,
    PAGE_SIZE,
    POOL_PAGES,
    READS,
    STEPS,
    World,
    Wrong,
)
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jslora.engine import _Job
from jslora.errors import AdapterRejected, InvalidRequest, Unavailable, UnknownModel
from jslora.request import AdapterInfo, SamplingParams, TokenEvent

NAMES = ("red", "green", "blue", "black", "white", "grey")
ALIASES = ("day", "night")
MOST_OPEN = 24
"""Requests that are out at once; one more waits for one to end."""
UNSETTLED = 40
"""Requests at least between two times that all is quiet, and a fifth of those between restarts."""
EXAMPLES, STEPS_EACH = 4, 300
"""Of one seed."""

names, contents, families = st.sampled_from(NAMES), st.sampled_from(CONTENTS), st.integers(0, 2)


def run_seed(world: World, number: int) -> None:
    """Do `EXAMPLES` times about `STEPS_EACH` random operations and more.

    Raises:
        Wrong: the engine did something wrong; notes tell the seed and what was done before.
    """
    try:
        run_state_machine_as_test(
            seed(number)(lambda: EngineMachine(world)),
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=STEPS_EACH, phases=[Phase.generate],
                deadline=None, database=None, verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    except BaseException:
        # Threads do not run twice alike, so what hypothesis makes of it may be misleading.
        if world.failure is None:
            raise
        world.failure.add_note(f"found with seed {number}; before it, the newest last:")
        world.failure.add_note("\n".join(map(repr, world.trail)))
        raise world.failure from None


@dataclass
class Sent:
    """A request that is out.

    Attributes:
        names: of its adapters.
        who: numbers that may answer; None among them if it may have been refused.
        held: numbers it may have been bound to, those that do not show among them.
        before: the machine's `causes` when it was sent.
        tokens: how many came back.
    """

    job: _Job
    names: tuple[str, ...]
    who: set[int | None]
    held: set[int | None]
    family: int
    before: Counter[str]
    tokens: int = 0


@dataclass
class _Load:
    """A load under way, and the machine's causes when it began."""

    number: int
    done: Future[AdapterInfo]
    before: Counter[str]


class EngineMachine(RuleBasedStateMachine):
    """What may happen to an engine, in any order.

    Attributes:
        bound: name → number of the adapter that has it.
        loading: name → the load that will give it another.
        aliases: alias → its targets before the last change, if there was one, and after it.
        rewritten: names whose folder may have other contents by now.
        unsettled, since_start: requests since all was quiet, and since the engine started.
        causes: what may explain errors, beside the faults: unloads, and losses of the disk tier.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        if world.failure is not None:
            raise world.failure  # hypothesis tries again what failed
        self.world, self.tally = world, world.tally
        self.engine, self.faults = world.open()
        self.bound = self._at_start()
        self.loading: dict[str, _Load] = {}
        self.aliases: dict[str, list[dict[str, float]]] = {}
        self.unloading: list[Future[AdapterInfo]] = []
        self.rewritten: set[str] = set()
        self.causes: Counter[str] = Counter()
        self.since_start = self.unsettled = 0
        self.sent: dict[str, Sent] = {}
        self.cancelled: dict[str, Sent] = {}
        self.news: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.recoveries = self.engine.stats().recoveries - self._steps_failed()

    def _at_start(self) -> dict[str, int]:
        """What an engine has if nobody loaded anything."""
        return {name: AT_START[name] for name in self.engine.core.adapters.registered()}

    @initialize(numbers=st.lists(contents, min_size=4, max_size=4))
    def begin(self, numbers: list[int]) -> None:
        for name, number in zip(NAMES, numbers, strict=False):
            self.load(name, number, False, True)

    # Requests ------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from((None, *NAMES, *NAMES, *ALIASES)),
        family=families,
        prefix=st.sampled_from((0, 8, 16, 24, 48)),
        shapes=st.lists(
            st.tuples(st.integers(1, 10), st.integers(1, 12), st.booleans()), min_size=1, max_size=9
        ),
        salt=st.sampled_from(("", "", "salt")),
        silent=st.just(()) | st.just(()) | st.lists(names, max_size=3, unique=True),
    )
    def arrive(
        self, name: str | None, family: int, prefix: int, shapes: list, salt: str,
        silent: Sequence[str],
    ) -> None:  # fmt: skip
        """Requests with a common beginning; each has (own tokens, tokens wanted, stops early).

        Adapters in `silent` have the scale 0, even if `name` is among them.
        """
        common = [token(family, i * i % IDS) for i in range(prefix)]
        for own, wanted, stops in shapes:
            rest = [token(family, (7 * own + i) % IDS) for i in range(own)]
            self._send(name, family, [*common, *rest], wanted, stops, salt, silent)

    @rule(
        name=st.sampled_from((None, *NAMES)),
        family=families,
        more=st.integers(0, 20),
        count=st.integers(1, 3),
    )
    def press(self, name: str | None, family: int, more: int, count: int) -> None:
        """Requests that take much of the pool; some are longer than any may be."""
        for own in range(count):
            prompt = [token(family, (i + own) % IDS) for i in range(70 + more)]
            self._send(name, family, prompt, LENGTH - len(prompt) + more // 19, False)

    def _send(
        self,
        name: str | None,
        family: int,
        prompt: list[int],
        wanted: int,
        stops: bool,
        salt: str = "",
        silent: Sequence[str] = (),
    ) -> None:
        self._did("arrive", name, family, len(prompt), wanted, stops, salt, *silent)
        self.unsettled += 1
        self.since_start += 1
        self._wait(lambda: len(self.sent) < MOST_OPEN, "a request to end")
        if name in ALIASES and not (name := self._picked(name)):
            return
        scales = {name: 1.0} if name else {}
        scales |= dict.fromkeys(silent, 0.0)
        parts = {name: self._may_be(name) for name in scales}
        held: set[int | None] = set().union(*parts.values())
        who = self._may_be(None if name in silent else name) | (held & {None})
        ids = tuple(token(family, n) for n in who if n is not None) if stops else ()
        params = SamplingParams(temperature=0, max_tokens=wanted, stop_token_ids=ids)
        job = self.engine._job(prompt, params, self.engine._resolve(scales), cache_salt=salt)
        self.sent[job.request.id] = Sent(job, tuple(parts), who, held, family, self._causes())
        self.tally.requests += 1
        self.engine._submit(job, self.news.put)

    def _may_be(self, name: str | None) -> set[int | None]:
        """The numbers that a name may stand for now."""
        if name is None:
            return {0}
        found: set[int | None] = {self.bound.get(name)}
        if name in self.loading:
            found.add(self.loading[name].number)
        return found

    def _picked(self, alias: str) -> str | None:
        """Where an alias leads this time; None if it is not known."""
        (found,), targets = self.engine._resolve(alias), self.aliases.get(alias)
        name = found.name
        self._expect(name in (targets[-1] if targets else (alias,)), f"{alias} led to {name}")
        return name if targets else None

    @rule(which=st.integers(0, MOST_OPEN - 1))
    def cancel(self, which: int) -> None:
        if self.sent:
            self._did("cancel", which)
            request = list(self.sent)[which % len(self.sent)]
            self.engine.core.abort([request])
            self.cancelled[request] = self.sent.pop(request)

    # Adapters ------------------------------------------------------------------------------------

    @rule(name=names, number=contents, replace=st.booleans(), wait=st.booleans())
    def load(self, name: str, number: int, replace: bool, wait: bool) -> None:
        self._did("reload" if name in self.bound else "load", name, number, replace, wait)
        self._load(name, f"content-{number}", number, replace, wait)

    @rule(name=names, folder=st.sampled_from(LIVE), number=contents)
    def load_rewritten(self, name: str, folder: str, number: int) -> None:
        """Other contents in the same place."""
        self._did("rewrite and reload", name, folder, number)
        self.world.rewrite(folder, number)
        self.rewritten.add(name)
        self._load(name, folder, number, True, True)

    @rule(name=names, number=contents, family=families, pages=st.integers(1, 6))
    def swap(self, name: str, number: int, family: int, pages: int) -> None:
        """The same prompts before and after a reload."""
        prompt = [token(family, i * i % IDS) for i in range(8 * pages + 1)]
        self._send(name, family, prompt, 4, False)
        self.load(name, number, True, True)
        self._send(name, family, prompt, 4, False)

    def _load(self, name: str, path: str, number: int, replace: bool, wait: bool) -> None:
        refused = name in self.loading or (name in self.bound and not replace)
        before = self._causes()
        future = self.engine._load(name, path, replace)
        if refused and future.done():
            self._expect(isinstance(future.exception(), AdapterRejected), f"{name} loads twice")
            return
        # A load that was under way may have ended a moment ago, and this one begun.
        self.take_news()
        self.loading[name] = _Load(number, future, before)
        if wait:
            self._wait(lambda: name not in self.loading, f"{name} to be loaded")

    @rule(name=names, kind=st.sampled_from(BAD))
    def load_bad(self, name: str, kind: str) -> None:
        self._did(f"load {kind}", name)
        error = self.engine._load(name, f"bad-{kind}", True).exception(self.world.patience)
        right = isinstance(error, AdapterRejected) or self._happened(*READS)
        self._expect(right, f"a {kind} adapter was loaded: {error}")

    @rule(name=names, number=contents)
    def register(self, name: str, number: int) -> None:
        """Only by its metadata, as at the start."""
        self._did("register", name, number)
        try:
            self.engine.core.store.register(name, f"content-{number}")
        except AdapterRejected as error:
            known = name in self.bound or name in self.loading
            self._expect(known, f"{name}: {error}")
        else:
            self._expect(name not in self.bound, f"{name} is registered twice")
            self.take_news()
            self.bound[name] = number

    @rule(name=names, drain=st.sampled_from((0.0, 0.01, 20.0, 20.0)), wait=st.booleans())
    def unload(self, name: str, drain: float, wait: bool) -> None:
        self._did("unload", name, drain, wait)
        led = any(name in targets[-1] for targets in self.aliases.values())
        try:
            future = self.engine._unload(name, drain)
        except UnknownModel:
            self._expect(None in self._may_be(name), f"{name} is unknown")
            return
        except AdapterRejected as error:
            self._expect(name in self.loading, f"{name}: {error}")
            return
        except InvalidRequest as error:
            self._expect(led, f"{name}: {error}")
            return
        self._expect(not led, f"{name} was unloaded under an alias")
        self._wait(lambda: name not in self.loading, f"{name} to be loaded")
        number = self.bound.pop(name)
        self.unloading.append(future)
        if drain < self.world.patience / 2:
            self.causes[f"unload {name}"] += 1
        if wait:
            self._wait(lambda: future not in self.unloading, f"{name} to be unloaded")
            self._check_gone(number)

    def _check_gone(self, number: int) -> None:
        """Nothing is left of contents that nobody has."""
        digest, core = self.world.digests[number], self.engine.core
        holders = {*self.bound.values(), *(load.number for load in self.loading.values())}
        for sent in (*self.sent.values(), *self.cancelled.values()):
            holders |= sent.who | sent.held
        if number not in holders:
            self._expect(digest not in core.residency.residents, f"{number} is on the device")
            self._expect(digest not in self._cached(), f"KV of {number} is cached")
            self._expect(not core.store.holds(digest), f"{number} is held")

    def _cached(self) -> set[str]:
        """Adapters whose KV is in the prefix cache."""
        prefix = self.engine.core.prefix
        return self._on_engine(
            lambda: {d for entry in prefix._entries.values() for d in entry.digests}
        )

    # Aliases -------------------------------------------------------------------------------------

    @rule(alias=st.sampled_from(ALIASES), members=st.lists(names, min_size=1, max_size=3))
    def lead(self, alias: str, members: list[str]) -> None:
        self._did("alias", alias, members)
        weights = {name: 1.0 + i for i, name in enumerate(members)}
        if self._leads(weights, lambda: self.engine.alias(alias, weights)):
            before = self.aliases.get(alias, [])
            if before[-1:] != [weights]:
                self.aliases[alias] = [*before[-1:], weights]

    @rule(alias=st.sampled_from(ALIASES), remove=st.booleans())
    def undo(self, alias: str, remove: bool) -> None:
        """Take back an alias, or the last change of it."""
        self._did("remove alias" if remove else "rollback alias", alias)
        targets = self.aliases.get(alias, [])
        if not targets or (len(targets) == 1 and not remove):
            with self._refused(InvalidRequest if targets else UnknownModel):
                (self.engine.remove_alias if remove else self.engine.rollback_alias)(alias)
        elif remove:
            self.engine.remove_alias(alias)
            del self.aliases[alias]
        elif self._leads(targets[0], lambda: self.engine.rollback_alias(alias)):
            targets.reverse()

    def _leads(self, targets: Collection[str], change: Callable[[], None]) -> bool:
        """Whether an alias was changed to lead to `targets`, all of which must be registered."""
        try:
            change()
        except UnknownModel:
            self._expect(any(None in self._may_be(name) for name in targets), f"{targets}")
            return False
        self._expect(all(self._may_be(name) != {None} for name in targets), f"{targets}")
        return True

    @contextlib.contextmanager
    def _refused(self, kind: type[Exception]) -> Iterator[None]:
        try:
            yield
        except kind:
            return
        raise Wrong(f"no {kind.__name__}")

    # Faults --------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from((*STEPS, "upload", *READS)), after=st.integers(1, 400))
    def fail(self, kind: str, after: int) -> None:
        self._did(f"fail: {kind}", after)
        self.faults.countdown[kind] = after

    @rule(damage=st.booleans())
    def lose_cache(self, damage: bool) -> None:
        self._did("damage cache" if damage else "empty cache")
        self.world.lose_cache(damage)
        self.causes["cache"] += 1

    @precondition(lambda self: self.since_start >= 5 * UNSETTLED)
    @rule()
    def restart(self) -> None:
        """Close the engine with all that goes on; another works on with the same folders."""
        self._did("restart")
        self.since_start = self.unsettled = 0
        self.causes["closed"] += 1
        loads, unloads = [load.done for load in self.loading.values()], list(self.unloading)
        self.world.close()
        while not self.news.empty():
            self._take(self.news.get())
        self._expect(not self.sent, f"never told of their end: {self.sent}")
        for future in (*loads, *unloads):
            self._expect(future.done(), "a command was never answered")
            error = future.exception()
            self._expect(error is None or isinstance(error, Unavailable), f"{error}")
        self.loading, self.unloading, self.cancelled, self.aliases = {}, [], {}, {}
        self.engine, self.faults = self.world.open()
        self.bound = self._at_start()
        self.recoveries = 0

    # Watching ------------------------------------------------------------------------------------

    @precondition(lambda self: self.unsettled >= UNSETTLED)
    @rule()
    def settle(self) -> None:
        self._did("settle")
        self.unsettled = 0
        self._check_quiet()

    @invariant()
    def take_news(self) -> None:
        """Take in all that has come back; waits for nothing."""
        self._expect(not self.world.surprises, "the engine met an error")
        while not self.news.empty():
            self._take(self.news.get())
        for name, load in list(self.loading.items()):
            if load.done.done():
                del self.loading[name]
                if load.done.exception() is None:
                    self.bound[name] = load.number
                else:
                    self._expect(self._happened(*READS, since=load.before), f"{name}: {load}")
        for future in [future for future in self.unloading if future.done()]:
            future.result()
            self.unloading.remove(future)

    def _take(self, event: TokenEvent) -> None:
        sent = self.sent.get(event.id) or self.cancelled.get(event.id)
        if sent is None:
            raise Wrong(f"news of request {event.id}, which is over: {event}")
        stop = () if event.stop_token is None else (event.stop_token,)
        for one in (*event.tokens, *stop):
            self.tally.tokens += 1
            family, number = divmod(one, IDS)
            if family != sent.family or number not in sent.who:
                self.tally.wrong_tokens += 1
                raise Wrong(f"token {family, number}; expected is {sent.family, sent.who}: {sent}")
            sent.who = {number}
        sent.tokens += len(event.tokens)
        self.tally.cached_tokens += event.cached_tokens
        if event.last:
            self.tally.ends[event.finish_reason or event.error.type] += 1
            self._check_end(sent, event)
            self._forget(event.id)

    def _forget(self, request: str) -> None:
        self.sent.pop(request, None)
        self.cancelled.pop(request, None)
        self.engine._sinks.pop(request, None)

    def _check_end(self, sent: Sent, event: TokenEvent) -> None:
        params = sent.job.request.params
        if event.finish_reason == "length":
            right = sent.tokens == params.max_tokens and not params.stop_token_ids
        elif event.finish_reason == "stop":
            right = event.stop_token in params.stop_token_ids
        else:
            unloads = [f"unload {name}" for name in sent.names]
            right = {
                "engine_error": self._happened(*STEPS, "upload", since=sent.before),
                "adapter_rejected": self._happened(*READS, since=sent.before)
                or (self._happened("cache") and self.rewritten.intersection(sent.names)),
                "unavailable_error": self._happened(*unloads, "closed", since=sent.before),
                "not_found_error": None in sent.who,
                "invalid_request_error": self._too_large(sent),
            }.get(event.error.type, False)
        self._expect(right, f"{event} is the end of {sent}")

    def _too_large(self, sent: Sent) -> bool:
        """Whether it may be that a request can never run."""
        tokens = len(sent.job.request.prompt) + sent.job.request.params.max_tokens
        known = [number for number in sent.held if number]
        adapters = len(sent.names) * max((self.world.pages[number] for number in known), default=0)
        return tokens > LENGTH or -(-tokens // PAGE_SIZE) + adapters > POOL_PAGES - 1

    def _did(self, kind: str, *details: Any) -> None:
        self.tally.operations[kind] += 1
        self.world.trail.append((kind, *details))

    def _causes(self) -> Counter[str]:
        """What happened so far that may explain an error."""
        return self.causes + self.faults.happened

    def _happened(self, *kinds: str, since: Counter[str] | None = None) -> bool:
        before, now = since or Counter(), self._causes()
        return any(now[kind] > before[kind] for kind in kinds)

    def _expect(self, right: bool, message: str) -> None:
        if not right:
            raise Wrong(message) from next(iter(self.world.surprises), None)

    def _on_engine(self, call: Callable[[], Any]) -> Any:
        return self.engine.core.run_on_engine(call)

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.world.patience
        self.take_news()
        while not until():
            self._expect(time.monotonic() < deadline, f"waited {self.world.patience} s for {what}")
            with contextlib.suppress(queue.Empty):
                self._take(self.news.get(timeout=0.002))
            self.take_news()

    # Accounts ------------------------------------------------------------------------------------

    def _check_quiet(self) -> None:
        """Once nothing is under way, everything is accounted for."""
        self._wait(lambda: not (self.loading or self.unloading or self.sent), "all to end")
        self._wait(lambda: self._on_engine(self._resting), "the engine to rest")
        self.take_news()  # of requests that had ended before they were cancelled
        for request in list(self.cancelled):
            self._forget(request)
        self._on_engine(self._check_pages)
        self._check_host()
        stats = self.engine.stats()
        expected = self.recoveries + self._steps_failed()
        self._expect(stats.recoveries == expected, f"{expected} steps were made to fail: {stats}")

    def _resting(self) -> bool:
        core = self.engine.core
        return core.scheduler.idle and not core.residency.loading

    def _steps_failed(self) -> int:
        return sum(self.faults.happened[kind] for kind in STEPS)

    def _check_pages(self) -> None:
        """On the engine thread, where nothing moves meanwhile."""
        core, stats = self.engine.core, self.engine.stats()
        self._expect(stats.ledger_errors == 0, f"{stats}")
        core.scheduler.check()
        digests = {self.world.digests[number] for number in self.bound.values()}
        known = sum(
            len(r.placement.pages) for d, r in core.residency.residents.items() if d in digests
        )
        cached = sum(digests.issuperset(e.digests) for e in core.prefix._entries.values())
        leaked = stats.pages_total - stats.pages_free - known - cached
        self.tally.leaked_pages += leaked
        self._expect(leaked == 0, f"{leaked} pages are nobody's: {stats}")
        self._expect((stats.running, stats.waiting, stats.pages_kv) == (0, 0, 0), f"{stats}")
        users = {d[:12]: r.users for d, r in core.residency.residents.items() if r.users}
        self._expect(not users, f"in use by nobody: {users}")

    def _check_host(self) -> None:
        stats = self.engine.stats()
        infos = [i for i in self.engine.adapters() if i.state != "failed" or i.rank]
        found = {info.name: info.digest for info in infos}
        wanted = {name: self.world.digests[number] for name, number in self.bound.items()}
        unread = {name for name, digest in found.items() if not digest}
        self._expect(found | {n: wanted[n] for n in unread} == wanted, f"{found}, not {wanted}")
        self._expect(not any(info.in_flight for info in infos), f"in flight: {infos}")
        self._expect(stats.adapters_registered == len(wanted), f"{stats}")
        host = {info.digest: info.bytes_host for info in infos}
        leaked = stats.host_bytes - sum(host.values())
        self.tally.leaked_host_bytes += leaked
        self._expect(leaked == 0, f"{leaked} bytes of host memory are nobody's: {stats}")

    def teardown(self) -> None:
        """Everything goes, and nothing is left."""
        failure = sys.exception()
        if not isinstance(failure, Exception):  # hypothesis has its own ways to end an example
            try:
                self._unload_all()
            except Exception as error:
                failure = error
        if isinstance(failure, Exception):
            self.world.failed(failure)
            raise failure

    def _unload_all(self) -> None:
        self.faults.countdown.clear()
        self._check_quiet()
        for alias in list(self.aliases):
            self.undo(alias, True)
        for name in list(self.bound):
            self.unload(name, self.world.patience, False)
        self._check_quiet()
