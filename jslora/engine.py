"""`jslora.Engine`: text in, text out, in one process, with the same core that the server runs.

    engine = jslora.Engine("configs/demo.yaml")
    print(engine.generate("The capital of France is", adapter="adapter-000")[0].text)

Every method has an async twin; both only hand requests to the core's thread and take events back.
"""

import asyncio
import itertools
import operator
import queue
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

from jslora.aliases import AliasTable
from jslora.build import build_core, model_folder
from jslora.composition import compose
from jslora.config import NAME, EngineConfig, load, parse
from jslora.errors import AdapterRejected, InvalidRequest, UnknownModel
from jslora.progress import Progress, silent
from jslora.request import (
    AdapterInfo,
    Request,
    SamplingParams,
    Scaled,
    Stats,
    TokenEvent,
    TokenLogprob,
)  # fmt: skip
from jslora.text import TextAssembler
from jslora.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Adapter = str | Mapping[str, float]


class Terms(TypedDict, total=False):
    """How requests are treated: keywords of every method that generates.

    Attributes:
        cache_salt: prompts share cached pages only with those of the same tenant and salt.
        tenant: who pays for them, see `scheduler.tenants`; "default" if nobody is named.
        priority: levels after the most urgent of its tenant, larger is later; needs the policy
            "priority".
        ttft_slo: seconds to the first token, after which they are given up (TooLate); needs the
            policy "slo".
    """

    cache_salt: str
    tenant: str
    priority: int
    ttft_slo: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one prompt was answered.

    Attributes:
        text: empty for a model without a tokenizer.
        tokens: generated ids, the end token left out.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or id that ended it, if one of the request's did.
        cached_tokens: leading prompt tokens that were in the prefix cache.
    """

    text: str
    tokens: tuple[int, ...]
    prompt: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a streamed answer; the last one has a finish reason."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None


class Engine:
    """A model and its adapters, ready when the constructor returns.

    Args:
        config: a YAML file, the same as nested dicts, or a validated `EngineConfig`.
        progress: told of start-up work as (stage, done, total, note).
        check_ledger: assert the page ledger after every step, for tests.

    Raises:
        ConfigError, ModelError: the configuration or the model's files are wrong.
    """

    def __init__(
        self,
        config: EngineConfig | dict[str, Any] | str | Path,
        progress: Progress = silent,
        *,
        check_ledger: bool = False,
    ) -> None:
        if isinstance(config, dict):
            config = parse(config)
        elif not isinstance(config, EngineConfig):
            config = load(Path(config))
        self.config = config
        folder = model_folder(config, progress)
        has_text = folder is not None and any(folder.glob("tokenizer*.*"))
        self.tokenizer = Tokenizer(folder) if folder is not None and has_text else None
        self._sinks: dict[str, Callable[[TokenEvent], None]] = {}
        self._ids = itertools.count()
        self._aliases = AliasTable()
        self.core, self.info = build_core(
            config, folder, self._dispatch, progress, check_ledger=check_ledger
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Generating ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        adapter: Adapter | None = None,
        **terms: Unpack[Terms],
    ) -> list[Completion]:
        """Answer prompts (texts or token ids), all in one batch.

        Args:
            adapter: name of an adapter or an alias, or scales by such names: the sum of their
                scaled deltas is applied; None is the base model.
            terms: see `Terms`.

        Raises:
            InvalidRequest, UnknownModel, RateLimited, TooLate, EngineFailed, CorruptOutput: as the
                first prompt's error; the other prompts are aborted.
        """
        jobs = self._jobs(prompts, params, adapter, **terms)
        try:
            for job in jobs:
                self._submit(job, job.events.put)
            return [job.collect() for job in jobs]
        finally:
            self._forget(jobs)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: Adapter | None = None,
        **terms: Unpack[Terms],
    ) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; closing the iterator aborts it."""
        job = self._job(prompt, params, self._resolve(adapter), **terms)
        self._submit(job, job.events.put)
        try:
            while not job.done:
                yield job.take(job.events.get())
        finally:
            self._forget([job])

    async def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        adapter: Adapter | None = None,
        **terms: Unpack[Terms],
    ) -> list[Completion]:
        """`generate` without blocking the event loop; cancelling it aborts the requests."""
        jobs = self._jobs(prompts, params, adapter, **terms)
        try:
            queues = [self._submit_async(job) for job in jobs]
            for job, events in zip(jobs, queues, strict=True):
                while not job.done:
                    job.take(await events.get())
            return [job.completion() for job in jobs]
        finally:
            self._forget(jobs)

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: Adapter | None = None,
        **terms: Unpack[Terms],
    ) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop."""
        job = self._job(prompt, params, self._resolve(adapter), **terms)
        events = self._submit_async(job)
        try:
            while not job.done:
                yield job.take(await events.get())
        finally:
            self._forget([job])

    def _jobs(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None,
        adapter: Adapter | None, **terms: Unpack[Terms],
    ) -> "list[_Job]":  # fmt: skip
        adapters = self._resolve(adapter)
        return [self._job(prompt, params, adapters, **terms) for prompt in _listed(prompts)]

    def _resolve(self, adapter: Adapter | None) -> tuple[Scaled, ...]:
        """The adapters behind names, which may be aliases'; none for the base model."""
        if adapter is None or adapter == self.config.model.served_name:
            return ()
        scales = {adapter: 1.0} if isinstance(adapter, str) else adapter
        if not isinstance(scales, Mapping):
            raise InvalidRequest(f"adapter is {adapter!r}, not a name or scales", param="adapter")
        found = []
        for name, scale in scales.items():
            if name == self.config.model.served_name:
                raise InvalidRequest(f"{name!r} is the base, no adapter", param="adapters")
            name = self._aliases.pick(name) if self._aliases.get(name) is not None else name
            if name != self.config.model.served_name:  # else an alias, and the base adds nothing
                found.append((name, scale))
        return compose(found, self.config.adapters.max_composed)

    def _job(
        self, prompt: Prompt, params: SamplingParams | None, adapters: tuple[Scaled, ...],
        **terms: Unpack[Terms],
    ) -> "_Job":  # fmt: skip
        params = params or SamplingParams()
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("the model has no tokenizer; give token ids", param="prompt")
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = tuple(operator.index(token) for token in prompt)
        except TypeError:
            raise InvalidRequest("a prompt is a text or token ids", param="prompt") from None
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer; use stop_token_ids", param="stop")
        if not all(params.stop):
            raise InvalidRequest("a stop string is empty", param="stop")
        request = Request(
            id=f"engine-{next(self._ids)}", prompt=ids, params=params, adapters=adapters, **terms
        )  # fmt: skip
        self.config.scheduler.check_wishes(request.priority, request.ttft_slo)
        if not isinstance(request.tenant, str) or not re.fullmatch(NAME, request.tenant):
            raise InvalidRequest(f"{request.tenant!r} is no usable name", param="tenant")
        return _Job(request, self.tokenizer)

    def _submit(self, job: "_Job", sink: Callable[[TokenEvent], None]) -> None:
        self._sinks[job.request.id] = sink
        self.core.submit(job.request)

    def _submit_async(self, job: "_Job") -> asyncio.Queue[TokenEvent]:
        """Submit a job whose events come to the running loop."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[TokenEvent]()

        def put(event: TokenEvent) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed, so nobody will read on
                self._forget([job])

        self._submit(job, put)
        return events

    def _forget(self, jobs: "list[_Job]") -> None:
        """Take the sinks away, and abort what was not read to the engine's own end."""
        open_ids = [job.request.id for job in jobs if not job.engine_done]
        for job in jobs:
            self._sinks.pop(job.request.id, None)
        if open_ids:
            self.core.abort(open_ids)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        for event in events:
            sink = self._sinks.get(event.id)
            if sink is not None:
                sink(event)

    # Adapters and the rest -----------------------------------------------------------------------

    def load_adapter(
        self, name: str, path: str | None = None, *, replace: bool = False
    ) -> AdapterInfo:
        """Read an adapter below `adapters.roots` and register it; see `AdapterStore.load`.

        Raises:
            AdapterRejected: it cannot be bound exactly; nothing was kept.
        """
        return self._load(name, path, replace).result()

    async def load_adapter_async(
        self, name: str, path: str | None = None, *, replace: bool = False
    ) -> AdapterInfo:
        """`load_adapter` without blocking the event loop."""
        return await asyncio.wrap_future(self._load(name, path, replace))

    def _load(self, name: str, path: str | None, replace: bool) -> "Future[AdapterInfo]":
        if self._aliases.get(name) is not None:
            raise AdapterRejected(f"{name!r} is an alias", param="name")
        return self.core.adapters.load(name, path, replace)

    def unload_adapter(self, name: str, *, drain_seconds: float | None = None) -> AdapterInfo:
        """Take an adapter's name away; returns when nothing of the adapter is left.

        Requests that hold it finish, but after `drain_seconds` (by default the configuration's
        `adapters.drain_seconds`) the rest end with Unavailable.

        Raises:
            UnknownModel: it is not registered.
            InvalidRequest: an alias leads to it.
        """
        return self._unload(name, drain_seconds).result()

    async def unload_adapter_async(
        self, name: str, *, drain_seconds: float | None = None
    ) -> AdapterInfo:
        """`unload_adapter` without blocking the event loop."""
        return await asyncio.wrap_future(self._unload(name, drain_seconds))

    def _unload(self, name: str, drain_seconds: float | None) -> "Future[AdapterInfo]":
        if aliases := self._aliases.targets_of(name):
            raise InvalidRequest(f"the alias {aliases[0]!r} leads to {name!r}", param="name")
        return self.core.adapters.unload(name, drain_seconds)

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter's bind report and state."""
        return self.core.adapters.reports()

    def alias(self, name: str, targets: Mapping[str, float]) -> None:
        """Let `name` stand for adapters (or the base) by weight; changes an alias in one step.

        Raises:
            InvalidRequest: the name is taken, or a weight is not above zero.
            UnknownModel: a target is not registered.
        """
        known = self.core.adapters.registered().keys() | {self.config.model.served_name}
        if name in known or not re.fullmatch(NAME, name):
            raise InvalidRequest(f"{name!r} is taken or no usable name", param="name")
        for target in targets:
            if target not in known:
                raise UnknownModel(f"no adapter {target!r} is registered", param="targets")
        self._aliases.put(name, targets)

    def rollback_alias(self, name: str) -> None:
        """Swap an alias's targets with those before its last change.

        Raises:
            UnknownModel: there is no such alias, or an adapter it would lead to is gone.
            InvalidRequest: it was never changed.
        """
        alias = self._aliases.get(name)
        if alias is not None and alias.previous is not None:
            self.alias(name, alias.previous)
        else:
            self._aliases.rollback(name)  # says what is wrong

    def remove_alias(self, name: str) -> None:
        """Raises UnknownModel if there is no such alias."""
        self._aliases.remove(name)

    def stats(self) -> Stats:
        """Counters and gauges."""
        return self.core.stats()

    def close(self) -> None:
        """Stop; requests that still run or wait end with Unavailable."""
        self.core.close()


class _Job:
    """A request and what has come back of it."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.done = self.engine_done = False
        self._text = TextAssembler(tokenizer, request.params, request.prompt) if tokenizer else None
        self._answer = Completion(text="", tokens=(), prompt=request.prompt, finish_reason="")

    def collect(self) -> Completion:
        while not self.done:
            self.take(self.events.get())
        return self._answer

    def completion(self) -> Completion:
        assert self.done, f"request {self.request.id} is not done"
        return self._answer

    def take(self, event: TokenEvent) -> Chunk:
        """Add an event. Raises the error it carries."""
        self.engine_done = event.last
        if event.error is not None:
            self.done = True
            raise event.error.error()
        text, tokens, logprobs = "", event.tokens, event.logprobs
        reason = event.finish_reason
        ids = self.request.params.stop_token_ids
        stop: str | int | None = event.stop_token if event.stop_token in ids else None
        if self._text is not None:
            delta = self._text.push(event)
            text, tokens, logprobs = delta.text, delta.tokens, delta.logprobs
            reason, stop = delta.finish_reason, delta.stop_reason
        self.done = reason is not None
        before = self._answer
        self._answer = replace(
            before,
            text=before.text + text,
            tokens=before.tokens + tuple(tokens),
            logprobs=before.logprobs + tuple(logprobs),
            finish_reason=reason or "",
            stop_reason=stop,
            cached_tokens=before.cached_tokens or event.cached_tokens,
            prompt_logprobs=before.prompt_logprobs or event.prompt_logprobs,
        )
        return Chunk(text=text, tokens=tuple(tokens), finish_reason=reason)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, a list of ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(part, Integral) for part in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
