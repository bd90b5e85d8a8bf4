"""An engine process without a model, for the front end's tests: the real protocol, made-up tokens.

Token i of a sequence is a letter drawn from a digest of (adapter, prompt, i), so a test can say
what must come back. A prompt that contains one of these words makes something happen:

    eos      ends at its model's end token after 3 tokens
    corrupt  fails as not finite after 2 tokens
    refuse   is answered with an overloaded error before any token
    quota    is refused as over its rate for 6.2 s, the first time that prompt comes
    belated  is given up as too late, the first time that prompt comes; with `sleep` after 1.5 s
    slow     makes a token every 100 ms; `sleep` waits 1.5 s before the first
    umlaut   emits ä over and over, one byte of UTF-8 a token
    die      the process exits after 2 tokens

Prompts are cached whole: one that was seen before, under the same adapter, tenant and salt, is in
the cache but for its last token. An adapter from a path with "bad" in it is refused, and one with
"fleeting" is forgotten at once, behind the client's back.

Options: --fail TYPE reports that start-up failure and exits; --step SECONDS sets the pace;
--wait SECONDS delays the start; --die-at-start FILE exits while that file exists; --check prints a
plan.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import zmq

from jslora import config, wire
from jslora.errors import RateLimited, TooLate
from jslora.request import (
    AdapterInfo,
    EngineInfo,
    ErrorInfo,
    Request,
    Scaled,
    Stats,
    TenantStats,
    TokenEvent,
    TokenLogprob,
)

EOS = 257
VOCABULARY = 300


def spelled(adapters: tuple[Scaled, ...]) -> str | None:
    """What is served, as one name: "chat*0.5+sql" for instance; None for the base."""
    parts = (name if scale == 1 else f"{name}*{scale:g}" for name, scale in adapters)
    return "+".join(parts) or None


def letter(adapter: str | None, prompt: tuple[int, ...], position: int) -> int:
    """The token at `position`: a lower-case ASCII letter. See `spelled`."""
    digest = hashlib.sha256(f"{adapter}|{prompt}|{position}".encode()).digest()
    return ord("a") + digest[0] % 26


def text(adapter: str | None, prompt: str, count: int) -> str:
    """What a sequence of `count` tokens reads like."""
    ids = tuple(prompt.encode())
    return "".join(chr(letter(adapter, ids, position)) for position in range(count))


@dataclass
class Row:
    request: Request
    words: bytes
    born: float
    cached: int = 0
    made: int = 0
    due: float = 0.0

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.request.adapters]


@dataclass
class Drain:
    """An unload that waits for the requests of its adapter."""

    seq: int
    info: AdapterInfo
    deadline: float
    ids: set[str]


class Engine:
    def __init__(self, socket: zmq.Socket, settings: config.EngineConfig, step: float) -> None:
        self.socket, self.settings, self.step = socket, settings, step
        preload = settings.adapters.preload
        names = preload if isinstance(preload, list) else ["sql", "chat"]
        self.adapters = {name: _adapter(name, f"/adapters/{name}") for name in names}
        self.told: dict[str, AdapterInfo] = {}
        self.draining: list[Drain] = []
        self.rows: dict[str, Row] = {}
        self.seen: set[tuple] = set()
        self.steps = self.aborted = self.generated = self.prompted = 0
        self.asked = self.hits = self.loads = self.described = 0
        self.too_late = self.rate_limited = 0
        self.refused: set[tuple[int, ...]] = set()
        self.service: Counter[str] = Counter()
        self.used: dict[str, None] = {}  # the last used last

    def run(self) -> None:
        pulse = 0.0
        while True:
            self.socket.poll(self.step * 1000 if self.rows else 50)
            while self.socket.poll(0):
                if not self._obey(wire.decode_command(self.socket.recv())):
                    return
            if self.rows:
                self._step()
                time.sleep(self.step)
            self._finish_drains()
            if time.monotonic() - pulse > 0.2:
                pulse = time.monotonic()
                self._pulse()

    def start(self, wait: float) -> None:
        for done in range(4):
            self.send(wire.Progress("compile", done, 3, f"bucket {done}"))
        time.sleep(wait)
        self.told = dict(self.adapters)
        self.send(
            wire.Ready(
                EngineInfo(
                    model_name=self.settings.model.served_name,
                    max_model_len=self.settings.model.max_model_len or 256,
                    vocab_size=VOCABULARY,
                    eos_token_ids=(EOS,),
                    page_size=16,
                    pages=1024,
                    fingerprint="fake",
                    device="fake",
                    adapters=tuple(self.adapters.values()),
                )
            )
        )

    def send(self, news: wire.News) -> None:
        self.socket.send(wire.encode(news))

    def _pulse(self) -> None:
        stats = Stats(
            running=len(self.rows),
            pages_total=1023,
            pages_free=1016 - len(self.rows),
            pages_kv=len(self.rows),
            steps=self.steps,
            prompt_tokens=self.prompted,
            generated_tokens=self.generated,
            # Tests read from here how many sequences were aborted, and how often all adapters
            # were described.
            preemptions=self.aborted,
            recoveries=self.described,
            pages_cached=7,
            prefix_asked_tokens=self.asked,
            prefix_hit_tokens=self.hits,
            prefix_evictions=3,
            adapters_registered=len(self.adapters),
            adapters_host=len(self.adapters),
            adapters_device=1,
            host_bytes=1000 * len(self.adapters),
            adapter_seconds={"read": 0.5 * self.loads, "pack": 0.25 * self.loads},
            too_late=self.too_late,
            rate_limited=self.rate_limited,
            **self._waits(),
            running_adapters=self._asked_for(lambda row: row.made > 0),
            waiting_adapters=self._asked_for(lambda row: row.made == 0),
            idle_adapters=self._idle(),
        )
        changed = [i for i in self.adapters.values() if self.told.get(i.name) is not i]
        removed = [name for name in self.told if name not in self.adapters]
        self.told = dict(self.adapters)
        self.send(wire.Pulse(stats, changed, removed))

    def _asked_for(self, condition: Callable[[Row], bool]) -> tuple[str, ...]:
        """Adapters of the rows that meet a condition."""
        rows = (row for row in self.rows.values() if condition(row))
        return tuple(sorted({name for row in rows for name in row.names}))

    def _idle(self) -> tuple[str, ...]:
        """Adapters that were used and are no more, the last first."""
        busy = {name for row in self.rows.values() for name in row.names}
        return tuple(n for n in reversed(self.used) if n in self.adapters and n not in busy)

    def _waits(self) -> dict[str, Any]:
        """Who waits for a first token since when, by tenant and by adapter."""
        now = time.monotonic()
        tenants, adapters = {}, {}
        for tenant in sorted({*self.service} | {r.request.tenant for r in self.rows.values()}):
            rows = [row for row in self.rows.values() if row.request.tenant == tenant]
            waits = [now - row.born for row in rows if not row.made]
            tenants[tenant] = TenantStats(
                running=len(rows) - len(waits), waiting=len(waits),
                oldest_wait=max(waits, default=0.0), service=float(self.service[tenant]),
            )  # fmt: skip
        for row in self.rows.values():
            if not row.made:
                name = row.request.label
                adapters[name] = max(adapters.get(name, 0.0), now - row.born)
        oldest = sorted(adapters.items(), key=lambda item: -item[1])
        return {
            "waiting": sum(tenant.waiting for tenant in tenants.values()),
            "tenants": tenants,
            "oldest_adapters": tuple(oldest[:16]),
            "oldest_wait": max(adapters.values(), default=0.0),
        }

    def _obey(self, command: wire.Command) -> bool:
        match command:
            case wire.Submit(request):
                self._submit(request)
            case wire.Abort(ids):
                self.aborted += sum(self.rows.pop(id, None) is not None for id in ids)
            case wire.LoadAdapter(seq, name, path, substitute):
                self.send(self._load(seq, name, path or name, substitute))
            case wire.UnloadAdapter(seq, name, drain_seconds):
                self._unload(seq, name, drain_seconds)
            case wire.Describe(seq, name):
                self.described += name is None
                self.send(wire.Described(seq, self._reports(name)))
            case wire.Drain():
                return False
        return True

    def _load(self, seq: int, name: str, path: str, substitute: bool) -> wire.Reply:
        if "bad" in path or (name in self.adapters and not substitute):
            message = f"adapter {name!r}: lora_A is missing"
            return wire.Reply(seq, None, ErrorInfo(type="adapter_rejected", message=message))
        info = _adapter(name, path)
        self.loads += 1
        if "fleeting" not in path:
            self.adapters[name] = info
        return wire.Reply(seq, info)

    def _unload(self, seq: int, name: str, drain_seconds: float) -> None:
        info = self.adapters.pop(name, None)
        if info is None:
            error = ErrorInfo(type="not_found_error", message="no such one")
            self.send(wire.Reply(seq, None, error))
            return
        ids = {id for id, row in self.rows.items() if name in row.names}
        self.draining.append(Drain(seq, info, time.monotonic() + drain_seconds, ids))

    def _finish_drains(self) -> None:
        for drain in list(self.draining):
            drain.ids &= self.rows.keys()
            if drain.ids and time.monotonic() >= drain.deadline:
                message = f"adapter {drain.info.name!r} was unloaded"
                error = ErrorInfo(type="unavailable_error", message=message)
                self.send(wire.Events([TokenEvent(id=id, error=error) for id in drain.ids]))
                for id in drain.ids:
                    del self.rows[id]
                drain.ids.clear()
            if not drain.ids:
                self.draining.remove(drain)
                self.send(wire.Reply(drain.seq, drain.info))

    def _reports(self, name: str | None) -> list[AdapterInfo]:
        draining = [replace(drain.info, state="draining") for drain in self.draining]
        found = [*self.adapters.values(), *draining]
        users = Counter(name for row in self.rows.values() for name in row.names)
        return [
            replace(info, in_flight=users[info.name])
            for info in found
            if name is None or info.name == name
        ]

    def _submit(self, request: Request) -> None:
        words = bytes(token for token in request.prompt if token < 256)
        error = None
        missing = [name for name, _ in request.adapters if name not in self.adapters]
        if missing:
            error = ErrorInfo(type="not_found_error", message=f"no adapter {missing[0]!r}")
        elif b"refuse" in words:
            error = ErrorInfo(type="overloaded_error", message="the engine is full")
        elif request.prompt not in self.refused and b"quota" in words:
            error = ErrorInfo.of(RateLimited("the tenant's rate is used up", retry_after=6.2))
            self.rate_limited += 1
        elif request.prompt not in self.refused and b"belated" in words and b"sleep" not in words:
            error = ErrorInfo.of(TooLate("no token within 6 s", retry_after=2.5))
            self.too_late += 1
        if error is not None:
            self.refused.add(request.prompt)
            self.send(wire.Events([TokenEvent(id=request.id, error=error)]))
            return
        self.prompted += len(request.prompt)
        now = time.monotonic()
        wait = 1.5 if b"sleep" in words else 0.0
        key = (request.adapters, request.tenant, request.cache_salt, request.prompt)
        cached = len(request.prompt) - 1 if key in self.seen else 0
        self.seen.add(key)
        self.asked += len(request.prompt)
        self.hits += cached
        self.rows[request.id] = Row(request, words, now, cached, due=now + wait)

    def _step(self) -> None:
        now, events = time.monotonic(), []
        self.steps += 1
        running = list(self.rows.values())[: self.settings.scheduler.max_running]
        for row in running:
            if row.due <= now:
                events.append(self._advance(row))
                if b"slow" in row.words:
                    row.due = now + 0.1
        if events:
            self.send(wire.Events(events))
        for event in events:
            for name in self.rows.pop(event.id).names if event.last else ():
                self.used.pop(name, None)
                self.used[name] = None

    def _advance(self, row: Row) -> TokenEvent:
        request, params = row.request, row.request.params
        said: dict[str, Any] = {"id": request.id, "cached_tokens": 0 if row.made else row.cached}
        if row.made == 0 and params.prompt_logprobs is not None:
            scored = (_score(token, params.prompt_logprobs) for token in request.prompt[1:])
            said["prompt_logprobs"] = (None, *scored)
        if row.made == 0 and b"belated" in row.words and b"sleep" in row.words:
            late = TooLate("no token in time", retry_after=2.5)
            return TokenEvent(**said, error=ErrorInfo.of(late))
        if params.max_tokens == 0:
            return TokenEvent(**said, finish_reason="length")
        if row.made == 2 and b"corrupt" in row.words:
            error = ErrorInfo(type="corrupt_output_error", message="the logits are not finite")
            return TokenEvent(**said, error=error)
        if row.made == 2 and b"die" in row.words:
            os._exit(9)
        if row.made == 3 and b"eos" in row.words and not params.ignore_eos:
            return TokenEvent(**said, finish_reason="stop", stop_token=EOS)
        token = letter(spelled(request.adapters), request.prompt, row.made)
        if b"umlaut" in row.words:
            token = "ä".encode()[row.made % 2]
        if token in params.stop_token_ids and row.made >= params.min_tokens:
            return TokenEvent(**said, finish_reason="stop", stop_token=token)
        row.made += 1
        self.generated += 1
        self.service[request.tenant] += 2
        scores = () if params.logprobs is None else (_score(token, params.logprobs),)
        reason = "length" if row.made == params.max_tokens else None
        return TokenEvent(**said, tokens=(token,), logprobs=scores, finish_reason=reason)


def _score(token: int, count: int) -> TokenLogprob:
    top = tuple((token + other, -0.5 - other) for other in range(count))
    return TokenLogprob(token=token, logprob=-0.5, rank=1, top=top)


def _adapter(name: str, path: str) -> AdapterInfo:
    digest = hashlib.sha256(f"{name}{path}".encode()).hexdigest()
    return AdapterInfo(name=name, digest=digest, state="host", rank=8, path=path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--fail")
    parser.add_argument("--step", type=float, default=0.002)
    parser.add_argument("--die-at-start", metavar="FILE")
    parser.add_argument("--wait", type=float, default=0.0)
    options = parser.parse_args()
    start = json.loads(sys.stdin.readline())
    settings = config.parse(start["config"])
    if options.check:
        print(f"plan: {settings.pool.pages or 1024} pages")
        return
    if options.die_at_start and os.path.exists(options.die_at_start):
        sys.exit(7)
    # The front end is gone when the pipe closes.
    threading.Thread(
        target=lambda: os._exit(0 if sys.stdin.read() == "" else 1), daemon=True
    ).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.linger = 1000
    socket.connect(options.socket)
    if options.fail:
        error = ErrorInfo(type=options.fail, message="the model has 3 legs; 4 are needed")
        socket.send(wire.encode(wire.Failed(error)))
        socket.close()
        sys.exit(3)
    engine = Engine(socket, settings, options.step)
    engine.start(options.wait)
    engine.run()


if __name__ == "__main__":
    main()
