"""Send a workload to an OpenAI-compatible server and record when each of its tokens arrived.

Invariants: a request succeeds only if it was answered with 200 and an event stream that holds no
error and ends with [DONE]; everything else is a record with the kind of its error, never dropped.
A request's clock starts when its body is ready, before its connection is taken; an arrival's time
is read before anything of it is decoded. Host only: no jax.

The client shares its cores with the server it measures, so it must be light. CPU time a token, 16
streams, one token a write, 520 tokens/s; all streams in step | each at its own pace:
httpx 108 | 182 us · asyncio streams 29 | 61 · aiohttp 33 | 72 · aiohttp on uvloop 14 | 36.
Hence aiohttp, to be run on uvloop where the measurement counts.
"""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from types import TracebackType
from typing import Any, Literal, Self, get_args

import aiohttp
import msgspec

from jslora.bench.stream import Failure, Stream, printable
from jslora.bench.workload import Job, Spec, Trace, generate
from jslora.errors import ConfigError, Unavailable

Endpoint = Literal["completions", "chat"]

MAX_LIST_BYTES = 16 * 2**20
MAX_ERROR_BYTES = 4096
# Below the keep-alive of common servers (5 s), so that no request meets a closing connection.
KEEP_ALIVE_SECONDS = 2.0
WARMUP_CONCURRENCY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server and how it is asked.

    Attributes:
        api_key: sent for tenants that have none in `tenant_keys`.
        timeout: seconds for one whole request.

    Raises:
        ConfigError: a value is out of its range.
    """

    url: str
    endpoint: Endpoint = "completions"
    api_key: str | None = field(default=None, repr=False)
    tenant_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}; it must start with http:// or https://")
        if self.endpoint not in get_args(Endpoint):
            allowed = ", ".join(get_args(Endpoint))
            raise ConfigError(f"endpoint is {self.endpoint!r}; allowed are {allowed}")
        if not self.timeout > 0 or self.temperature < 0:
            raise ConfigError(
                f"timeout ({self.timeout}) must be positive, temperature ({self.temperature}) "
                "not negative"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How a workload is driven: in a closed loop of `concurrency`, or else by its arrival times.

    Attributes:
        requests: how many to send; None sends for `duration` seconds.
        warmup: requests sent before the first run, and not measured.
        repeat: runs.

    Raises:
        ConfigError: a value is out of its range, or nothing ends the run.
    """

    concurrency: int | None = None
    requests: int | None = None
    duration: float | None = None
    warmup: int = 0
    repeat: int = 1

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests", "duration", "repeat"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a positive, finite number")
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}; it cannot be negative")
        if (self.requests is None) == (self.duration is None):
            raise ConfigError("give either a number of requests or a duration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as its sender saw it; times are seconds since the run began.

    Attributes:
        due: when an open loop meant to send it; None in a closed loop.
        arrivals: one per chunk: what one read delivered of text, one token or several.
        output_tokens: as the server counted them, or its token events where it did not.
        counted: whether `output_tokens` is the server's count.
        error: None for a success, else the kind of what went wrong: a status, and its type if any.
    """

    index: int
    model: str
    due: float | None
    sent: float
    arrivals: tuple[float, ...]
    end: float
    asked_tokens: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    counted: bool
    finish_reason: str | None
    error: str | None
    detail: str | None
    tenant: str = "default"

    @property
    def ttft(self) -> float | None:
        """From sending to the first chunk."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """From the first to the last chunk, per token after the first; None for a single chunk."""
        if len(self.arrivals) < 2 or self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """From sending to the end of the stream."""
        return self.end - self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a workload.

    Attributes:
        started: seconds since the epoch.
        duration: seconds from the start to the end of the last request.
        cpu_seconds: of this process meanwhile.
        records: in the order in which the requests ended.
    """

    started: float
    duration: float
    cpu_seconds: float
    records: tuple[Record, ...]


async def measure(
    target: Target,
    workload: Spec | Trace,
    load: Load,
    ended: Callable[[Record], None] = lambda record: None,
) -> list[Run]:
    """Warm the server up, then run the workload `load.repeat` times; `ended` sees each record.

    Raises:
        ConfigError: an open loop without arrival times.
        Unavailable: a request of the warm-up failed.
    """
    if load.concurrency is None and isinstance(workload, Spec) and workload.rate is None:
        raise ConfigError("give either a concurrency or a rate")
    async with Client(target) as client:
        await warm_up(client, workload, load.warmup, load.concurrency or WARMUP_CONCURRENCY)
        return [
            await drive(client, generate(workload, run), load, ended)
            for run in range(1, load.repeat + 1)
        ]


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Error(msgspec.Struct):
    type: str


class _Refusal(msgspec.Struct):
    error: _Error


class Client:
    """Connections to one server; an async context manager."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._base = target.url.rstrip("/").removesuffix("/v1") + "/v1"
        chat = target.endpoint == "chat"
        self._url = f"{self._base}/{'chat/completions' if chat else 'completions'}"

    async def __aenter__(self) -> Self:
        # Compression would make the server wait for more tokens before it sends any.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._target.api_key is not None:
            headers["Authorization"] = f"Bearer {self._target.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout),
            headers=headers,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def models(self) -> tuple[list[str], list[str]]:
        """Return what `/v1/models` lists: base models, and those with a parent, the adapters.

        Raises:
            Unavailable: the server cannot be reached, or answers something else.
        """
        url = f"{self._base}/models"
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                await _check(response, "application/json")
                listed = msgspec.json.decode(await _read(response, MAX_LIST_BYTES), type=_Models)
        except Failure as failure:
            raise Unavailable(f"{url}: {failure.kind}: {failure.detail}") from None
        except (aiohttp.ClientError, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"{url}: {_explain(error)}") from None
        bases = [model.id for model in listed.data if not model.parent]
        return bases, [model.id for model in listed.data if model.parent]

    async def send(self, job: Job, begin: float, due: float | None) -> Record:
        """Send one request and follow its stream to the end; no failure of it raises.

        `begin` is the performance counter's reading at the start of the run.
        """
        body, stream = self._body(job), Stream()
        kind: str | None = None
        detail: str | None = None
        sent = time.perf_counter()
        try:
            await self._follow(job, body, stream)
        except Failure as failure:
            kind, detail = failure.kind, failure.detail
        except TimeoutError:
            kind, detail = "timeout", f"not finished after {self._target.timeout} s"
        except (aiohttp.ClientError, OSError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)
            kind, detail = "no connection" if refused else "connection lost", _explain(error)
        end = time.perf_counter()
        usage = stream.usage
        return Record(
            index=job.index,
            model=job.model,
            due=due,
            sent=sent - begin,
            arrivals=tuple(arrival - begin for arrival in stream.arrivals),
            end=end - begin,
            asked_tokens=job.output_tokens,
            input_tokens=usage.prompt_tokens if usage else job.input_tokens,
            cached_tokens=usage.cached_tokens if usage else 0,
            output_tokens=usage.completion_tokens if usage else stream.token_events,
            counted=usage is not None,
            finish_reason=stream.finish_reason,
            error=kind,
            detail=detail,
            tenant=job.tenant,
        )

    async def _follow(self, job: Job, body: bytes, stream: Stream) -> None:
        key = self._target.tenant_keys.get(job.tenant)
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False
        ) as response:
            await _check(response, "text/event-stream")
            async for data in response.content.iter_any():
                stream.feed(data, time.perf_counter())
        stream.finish()

    def _body(self, job: Job) -> bytes:
        body: dict[str, Any] = {
            "model": job.model,
            "messages" if self._target.endpoint == "chat" else "prompt": job.prompt,
            "max_tokens": job.output_tokens,
            "temperature": self._target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._target.ignore_eos:
            body["ignore_eos"] = True
        if job.priority:
            body["priority"] = job.priority
        if job.ttft_slo is not None:
            body["ttft_slo"] = job.ttft_slo
        return msgspec.json.encode(body)


Send = Callable[[Job, float | None], Coroutine[Any, Any, None]]


async def warm_up(client: Client, workload: Spec | Trace, requests: int, concurrency: int) -> None:
    """Send requests that nobody measures.

    Raises:
        Unavailable: one of them failed.
    """
    if not requests:
        return
    closed = Load(concurrency=concurrency, requests=requests)
    run = await drive(client, generate(workload, 0), closed)
    failed = [record for record in run.records if record.error]
    if failed:
        raise Unavailable(
            f"{len(failed)} of the {requests} requests of the warm-up failed; "
            f"the first: {failed[0].error}: {failed[0].detail}"
        )


async def drive(
    client: Client,
    jobs: Iterator[Job],
    load: Load,
    ended: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Send `jobs` once, without a warm-up, for as long as `load` says; `ended` sees each record."""
    records: list[Record] = []

    async def send(job: Job, due: float | None) -> None:
        records.append(await client.send(job, begin, due))
        ended(records[-1])

    jobs = islice(jobs, load.requests)
    started, cpu, begin = time.time(), time.process_time(), time.perf_counter()
    if load.concurrency is None:
        await _open_loop(jobs, load.duration, begin, send)
    else:
        await _closed_loop(jobs, load.duration, begin, send, load.concurrency)
    return Run(
        started=started,
        duration=max((record.end for record in records), default=0.0),
        cpu_seconds=time.process_time() - cpu,
        records=tuple(records),
    )


async def _closed_loop(
    jobs: Iterator[Job], duration: float | None, begin: float, send: Send, concurrency: int
) -> None:
    """Keep `concurrency` requests in flight; after `duration` none starts, but all finish."""
    limit = float("inf") if duration is None else begin + duration
    waiting = takewhile(lambda _: time.perf_counter() < limit, jobs)

    async def worker() -> None:
        for job in waiting:
            await send(job, None)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def _open_loop(jobs: Iterator[Job], duration: float | None, begin: float, send: Send) -> None:
    """Send each request at its arrival time, whatever is in flight; then wait for the last."""
    limit = float("inf") if duration is None else duration
    async with asyncio.TaskGroup() as group:
        for job in takewhile(lambda job: job.arrival < limit, jobs):
            await asyncio.sleep(begin + job.arrival - time.perf_counter())
            group.create_task(send(job, job.arrival))


async def _check(response: aiohttp.ClientResponse, content_type: str) -> None:
    if response.status != 200:
        body = await _read(response, MAX_ERROR_BYTES)
        raise Failure(f"HTTP {response.status}{_error_type(body)}", printable(body))
    if response.content_type != content_type:
        raise Failure("wrong content type", f"{response.content_type}, not {content_type}")


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a body; what is beyond `limit` bytes is left unread."""
    body = b""
    async for data in response.content.iter_any():
        body += data
        if len(body) >= limit:
            break
    return body[:limit]


def _error_type(body: bytes) -> str:
    """The type that an error object of the API's form names, after a space; or nothing."""
    try:
        kind = msgspec.json.decode(body, type=_Refusal).error.type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return f" {kind}" if re.fullmatch(r"\w{1,64}", kind, re.ASCII) else ""


def _explain(error: Exception) -> str:
    return printable(str(error) or repr(error))
