"""The client against a server whose answers are scripted byte by byte, chosen by `model`."""

import asyncio
import dataclasses
import json
import runpy
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from jslora.bench.client import Client, Load, Record, Run, Target, measure
from jslora.bench.stream import MAX_LINE, Failure, Stream
from jslora.bench.trace_file import encode
from jslora.bench.workload import Job, Spec, Trace
from jslora.errors import ConfigError, Unavailable

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", **fields}).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return event(object="text_completion", choices=[choice], usage=None)


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def usage(prompt: int, output: int, **more: Any) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event(choices=[], usage=counts | more)


GOOD = [token("a"), token("b"), token("c", "length"), usage(64, 3), DONE]
ERROR = event(error={"message": "the engine\x1b[31m failed", "type": "engine_error", "code": 503})

# What the stream of each model holds, one write for each item; a float waits so many seconds.
SCRIPTS: dict[str, list[bytes | float]] = {
    "good": [*GOOD],
    "slow": [0.05, token("a"), 0.05, token("b"), usage(64, 2), DONE],
    "groups": [token("a") + token("b"), 0.05, token("cd") + usage(64, 4), DONE],
    "cached": [token("a", "stop"), usage(64, 1, prompt_tokens_details={"cached_tokens": 48}), DONE],
    "no-usage": [token("a"), token(""), token("", "stop"), DONE],
    "no-text": [token("", "length"), usage(64, 3), DONE],
    "chat": [delta(role="assistant", content=""), 0.02, delta(content="a"), delta("stop"), DONE],
    "error-first": [ERROR, DONE],
    "error-later": [*GOOD[:2], ERROR, DONE],
    "error-object": [event(object="error", message="old style"), DONE],
    "truncated": [*GOOD[:4]],
    "empty": [DONE],
    "too-deep": [b'data: {"error": ' + b"[" * 100_000 + b"\n\n", DONE],
    "not-json": [GOOD[0], b"data: {oops\n\n", DONE],
    "not-utf8": [b'data: {"object": "\xff"}\n\n', DONE],
    "wrong-type": [event(choices=[{"text": 3}]), DONE],
    "hangs": [GOOD[0], 30.0],
}


class Server:
    """Answers by script; notes every body, and the most requests it held at once."""

    def __init__(self, hold: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.peak = 0
        # "together" answers only when `hold` requests have come.
        self._hold, self._enough = hold, asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body | {"path": request.path})
        self.headers.append(dict(request.headers))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._script(request, body["model"])
        finally:
            self.running -= 1

    async def _script(self, request: web.Request, model: str) -> web.StreamResponse:
        match model:
            case "together":
                if len(self.bodies) >= self._hold:
                    self._enough.set()
                await self._enough.wait()
            case "busy":
                error = {"error": {"message": "the queue is full", "type": "overloaded_error"}}
                return web.json_response(error, status=503)
            case "limited":
                error = {"error": {"message": "one a minute", "type": "rate_limit_error"}}
                return web.json_response(error, status=429)
            case "rude":
                error = {"error": {"message": "no type", "type": "\x1b[31m"}}
                return web.json_response(error, status=503)
            case "deep":
                return web.Response(text='{"error": ' + "[" * 4000, status=500)
            case "unstreamed":
                return web.json_response({"choices": [{"text": "all at once"}]})
            case "elsewhere":
                raise web.HTTPTemporaryRedirect("/v1/models")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if model == "reset":
            await response.write(GOOD[0])
            assert request.transport is not None
            request.transport.abort()
            return response
        for part in SCRIPTS.get(model, GOOD):
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                await response.write(part)
        return response

    async def models(self, request: web.Request) -> web.Response:
        adapters = [{"id": name, "parent": "good"} for name in ("one", "two", "busy")]
        return web.json_response({"object": "list", "data": [{"id": "good"}, *adapters]})


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_get("/v1/models", server.models)
    async with TestServer(app) as running:
        yield str(running.make_url("/"))


def against(server: Server, use: Callable[[str], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with serving(server) as url:
            return await use(url)

    return asyncio.run(main())


def ask(models: str, load: Load | None = None, **target: Any) -> tuple[list[Run], Server]:
    """Send `load`, or one request to each of the space-separated models."""
    server = Server(hold=load.requests or 0 if load else 0)
    spec = Spec(models=tuple(models.split()), rate=None if load is None else 500.0)
    load = load or Load(concurrency=1, requests=len(spec.models))

    async def use(url: str) -> list[Run]:
        return await measure(Target(url=url, **target), spec, load)

    return against(server, use), server


def ask_one(model: str, **target: Any) -> Record:
    [run], _ = ask(model, **target)
    [record] = run.records
    return record


def test_a_good_stream_is_counted_as_the_server_counts() -> None:
    record = ask_one("good")
    assert record.error is None and record.finish_reason == "length"
    assert (record.input_tokens, record.output_tokens, record.counted) == (64, 3, True)
    assert 0 <= record.sent <= record.arrivals[0] <= record.arrivals[-1] <= record.end
    assert record.due is None and record.asked_tokens == 64


def test_times_hold_what_the_server_waited() -> None:
    record = ask_one("slow")
    assert record.error is None and record.ttft is not None
    assert record.ttft >= 0.049
    assert record.e2e >= record.arrivals[-1] - record.sent >= 0.099


@pytest.mark.parametrize(
    ("model", "most_chunks", "tokens", "counted"),
    [("groups", 2, 4, True), ("no-text", 0, 3, True), ("no-usage", 2, 2, False)],
)
def test_tokens_are_counted_whatever_the_chunks(
    model: str, most_chunks: int, tokens: int, counted: bool
) -> None:
    record = ask_one(model)
    assert record.error is None and len(record.arrivals) <= most_chunks
    assert (record.output_tokens, record.counted) == (tokens, counted)


def test_a_chunk_is_what_one_read_brought_and_arrives_when_it_is_complete() -> None:
    stream = Stream()
    whole = token("c")
    pieces = [token("a") + token("b"), whole[:20], whole[20:], b": keep-alive\n\n", usage(8, 3)]
    for now, piece in enumerate(pieces, 1):
        stream.feed(piece, now)
    assert stream.arrivals == [1, 3] and stream.token_events == 3
    assert stream.usage is not None and stream.usage.completion_tokens == 3


def test_the_role_of_a_chat_is_not_its_first_token() -> None:
    record = ask_one("chat", endpoint="chat")
    assert record.error is None and record.output_tokens == 1 and len(record.arrivals) == 1
    assert record.ttft is not None and record.ttft >= 0.019


def test_cached_prompt_tokens_are_noted() -> None:
    assert ask_one("cached").cached_tokens == 48


@pytest.mark.parametrize(
    ("model", "kind", "detail"),
    [
        ("busy", "HTTP 503 overloaded_error", "the queue is full"),
        ("limited", "HTTP 429 rate_limit_error", "one a minute"),
        ("rude", "HTTP 503", "no type"),
        ("deep", "HTTP 500", "[["),
        ("elsewhere", "HTTP 307", ""),
        ("unstreamed", "wrong content type", "application/json"),
        ("error-first", "error event engine_error", "engine_error"),
        ("error-later", "error event engine_error", "engine_error"),
        ("error-object", "error event", "old style"),
        ("truncated", "truncated stream", "[DONE]"),
        ("empty", "empty stream", "neither"),
        ("too-deep", "malformed stream", "[["),
        ("not-json", "malformed stream", "{oops"),
        ("not-utf8", "malformed stream", ""),
        ("wrong-type", "malformed stream", "text"),
        ("reset", "connection lost", ""),
    ],
)
def test_a_failure_is_a_record_of_its_kind(model: str, kind: str, detail: str) -> None:
    [run], _ = ask(f"{model} good")
    failed, good = run.records
    assert failed.error == kind
    assert failed.detail is not None and detail in failed.detail and failed.detail.isprintable()
    assert good.error is None


def test_a_request_that_takes_too_long_is_a_timeout() -> None:
    record = ask_one("hangs", timeout=0.2)
    assert record.error == "timeout" and "0.2 s" in (record.detail or "")
    assert len(record.arrivals) == 1


def test_no_server_is_a_failure_of_every_request() -> None:
    target = Target(url="http://127.0.0.1:1")
    load = Load(concurrency=2, requests=3)
    [run] = asyncio.run(measure(target, Spec(models=("m",)), load))
    assert [record.error for record in run.records] == ["no connection"] * 3
    with pytest.raises(Unavailable, match="warm-up"):
        asyncio.run(measure(target, Spec(models=("m",)), dataclasses.replace(load, warmup=1)))


def test_the_body_asks_for_exactly_this() -> None:
    _, server = ask("good", ignore_eos=True, api_key="secret")
    [body] = server.bodies
    prompt = body.pop("prompt")
    assert len(prompt) == 64 and all(0 <= t < 32000 for t in prompt)
    assert body == {
        "path": "/v1/completions", "model": "good", "max_tokens": 64, "temperature": 0.0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_closed_loop_keeps_its_concurrency_and_no_more() -> None:
    [run], server = ask("together", Load(concurrency=7, requests=7))
    assert server.peak == 7 and all(record.error is None for record in run.records)
    [run], server = ask("slow", Load(concurrency=3, requests=9))
    assert server.peak == 3 and len(run.records) == 9


def test_an_open_loop_waits_for_nobody() -> None:
    [run], server = ask("together", Load(requests=20))
    assert server.peak == 20 and len(run.records) == 20
    assert all(r.due is not None and r.due <= r.sent for r in run.records)
    dues = [r.due or 0.0 for r in sorted(run.records, key=lambda r: r.index)]
    assert dues == sorted(dues) and dues[-1] > 0


def test_a_duration_ends_the_sending_not_the_requests() -> None:
    [closed], _ = ask("slow", Load(concurrency=2, duration=0.3))
    [opened], _ = ask("good", Load(duration=0.3))
    assert 2 <= len(closed.records) <= 6
    assert all(record.error is None for run in (closed, opened) for record in run.records)
    assert all(record.due is not None and record.due < 0.3 for record in opened.records)


def test_warm_up_and_repeats_send_new_prompts() -> None:
    seen: list[Record] = []
    server = Server()

    async def use(url: str) -> list[Run]:
        load = Load(concurrency=2, requests=3, warmup=2, repeat=2)
        return await measure(Target(url=url), Spec(models=("good",)), load, seen.append)

    runs = against(server, use)
    assert [len(run.records) for run in runs] == [3, 3] and len(seen) == 6
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies) == 8


def test_models_are_told_from_adapters() -> None:
    async def use(url: str) -> Any:
        async with Client(Target(url=url + "v1/")) as client:
            return await client.models()

    assert against(Server(), use) == (["good"], ["one", "two", "busy"])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://h", "endpoint": "embeddings"}, "embeddings"),
        ({"url": "http://h", "timeout": 0}, "timeout"),
    ],
)
def test_a_bad_target_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Target(**wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "number of requests or a duration"),
        ({"requests": 1, "duration": 1.0}, "number of requests or a duration"),
        ({"requests": 0}, "requests"),
        ({"requests": 1, "concurrency": -1}, "concurrency"),
        ({"requests": 1, "repeat": 0}, "repeat"),
        ({"requests": 1, "warmup": -1}, "warmup"),
        ({"duration": float("inf")}, "duration"),
    ],
)
def test_a_bad_load_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Load(**wrong)


def test_an_open_loop_needs_a_rate() -> None:
    spec, load = Spec(models=("m",)), Load(requests=1)
    with pytest.raises(ConfigError, match="rate"):
        asyncio.run(measure(Target(url="http://h"), spec, load))


@given(st.data())
def test_a_stream_reads_the_same_however_it_is_cut(data: st.DataObject) -> None:
    chosen = [script for script in SCRIPTS.values() if script[-1] == DONE]
    parts = [part for part in data.draw(st.sampled_from(chosen)) if isinstance(part, bytes)]
    whole = b"".join(parts).replace(b"\n", data.draw(st.sampled_from([b"\n", b"\r\n"])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert _outcome(pieces) == _outcome([whole])


def _outcome(pieces: list[bytes]) -> Any:
    stream = Stream()
    try:
        for now, piece in enumerate(pieces):
            stream.feed(piece, now)
        stream.finish()
    except Failure as failure:
        return failure.kind, failure.detail
    assert len(stream.arrivals) <= min(len(pieces), stream.token_events)
    return stream.token_events, stream.usage, stream.finish_reason, stream.done


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_failure_or_a_stream(noise: bytes) -> None:
    stream = Stream()
    try:
        stream.feed(b"data: " + noise + b"\n", 0.0)
        stream.finish()
    except Failure as failure:
        assert failure.detail.isprintable()


def test_an_endless_line_is_refused() -> None:
    stream = Stream()
    with pytest.raises(Failure, match="malformed"):
        for now in range(3):
            stream.feed(b"x" * (MAX_LINE // 2 + 1), now)


def run_script(*arguments: str) -> tuple[int, str, str]:
    """Run scripts/bench.py beside the scripted server; `URL` stands for its address."""

    async def use(url: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SCRIPT),
            *(argument.replace("URL", url) for argument in arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PYTHONPATH": str(SCRIPT.parents[1])},
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    return against(Server(), use)


def test_the_script_measures_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, text, errors = run_script(
        "--url", "URL", "--all-adapters", "--concurrency", "2", "--requests", "6", "--repeat", "2",
        "--per-model", "--json", str(out), "--plot", str(tmp_path / "out.png"), "--api-key", "hush",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    assert {"Successful requests: 4", "Failed requests: 2", "Total generated tokens: 12"} <= {
        " ".join(line.split()) for line in text.splitlines()
    }
    document = json.loads(out.read_text())
    assert len(document["runs"]) == 2 and "hush" not in out.read_text()
    assert document["conditions"]["models"] == ["one", "two", "busy"]
    assert document["runs"][0]["models"]["busy"]["failed"] == 2
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


TRACE = tuple(
    Job(
        index=i, arrival=i / 20, model="good", prompt=tuple(range(i, i + 40)), output_tokens=3,
        tenant=tenant, priority=i, ttft_slo=i / 2 or None,
    )
    for i, tenant in enumerate(["acme", "umbrella", "acme", "acme"])
)  # fmt: skip
KEYS = {"acme": "acmes-secret", "umbrella": "umbrellas-secret"}


def replay(trace: Trace, load: Load, **target: Any) -> tuple[list[Run], Server]:
    server = Server()

    async def use(url: str) -> list[Run]:
        return await measure(Target(url=url, **target), trace, load)

    return against(server, use), server


def test_a_trace_is_sent_as_it_is_written() -> None:
    [run], server = replay(TRACE, Load(requests=4), tenant_keys=KEYS, api_key="other")
    assert [record.error for record in run.records] == [None] * 4
    by_index = sorted(run.records, key=lambda record: record.index)
    assert [record.due for record in by_index] == [job.arrival for job in TRACE]
    assert [record.tenant for record in by_index] == [job.tenant for job in TRACE]
    sent = sorted(zip(server.bodies, server.headers, strict=True), key=lambda s: s[0]["prompt"])
    for job, (body, headers) in zip(TRACE, sent, strict=True):
        assert tuple(body["prompt"]) == job.prompt and body["max_tokens"] == 3
        assert body.get("priority", 0) == job.priority
        assert ("priority" in body, "ttft_slo" in body) == (job.index > 0, job.index > 0)
        assert body.get("ttft_slo") == job.ttft_slo
        assert headers["Authorization"] == f"Bearer {KEYS[job.tenant]}"


def test_a_trace_warms_up_with_other_prompts_of_the_same_lengths() -> None:
    _, server = replay(TRACE, Load(requests=4, warmup=4), api_key="only")
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert set(prompts[4:]) == {job.prompt for job in TRACE}
    assert not set(prompts[:4]) & set(prompts[4:])
    assert [len(prompt) for prompt in prompts] == [40] * 8
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer only"}


def test_keys_are_not_shown() -> None:
    target = Target(url="http://h", api_key="hush", tenant_keys=KEYS)
    assert "hush" not in repr(target) and "secret" not in repr(target)


def test_the_script_replays_a_trace(tmp_path: Path) -> None:
    trace, keys, out = tmp_path / "trace.jsonl", tmp_path / "keys.yaml", tmp_path / "out.json"
    trace.write_bytes(encode(TRACE))
    keys.write_text("acme: acmes-secret\numbrella: umbrellas-secret\n")
    code, text, errors = run_script(
        "--url", "URL", "--trace", str(trace), "--tenant-keys", str(keys), "--speed", "2",
        "--warmup", "2", "--per-tenant", "--json", str(out),
    )  # fmt: skip
    assert (code, errors) == (0, "")
    rows = [line.split() for line in text.splitlines()]
    assert ["Successful", "requests:", "4"] in rows
    assert [row[:3] for row in rows if row[:1] in (["acme"], ["umbrella"])] == [
        ["acme", "3", "0"],
        ["umbrella", "1", "0"],
    ]
    document = json.loads(out.read_text())
    assert "secret" not in out.read_text() + text
    assert document["conditions"]["models"] == ["good"]
    assert set(document["runs"][0]["tenants"]) == {"acme", "umbrella"}
    dues = {request["index"]: request["due"] for request in document["runs"][0]["requests"]}
    assert dues == {job.index: job.arrival / 2 for job in TRACE}


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ("acme: x", [], "--tenant-keys lacks umbrella"),
        ("acme: [secret]", [], "keys.yaml is not a map from tenants to keys"),
        ("acme: 'secret", [], "keys.yaml is not a map from tenants to keys"),
        ("acme: {? [secret] : a}", [], "keys.yaml is not a map from tenants to keys"),
        ("acme: 'sécret'", [], "'acme' has no key of printable ASCII"),
        ("acme: ''", [], "'acme' has no key of printable ASCII"),
        ("acme: x\numbrella: y", ["--endpoint", "chat"], "takes no token ids"),
        ("acme: x\numbrella: y", ["--speed", "0"], "speed is 0.0"),
        ("acme: x", ["--repeat", "2"], "--repeat is not allowed with --trace"),
        ("acme: x", ["--all-adapters"], "--all-adapters is not allowed with --trace"),
        ("acme: x", ["--rate", "1"], "not allowed with"),
    ],
)
def test_the_script_says_what_is_wrong_with_a_replay(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: str,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "trace.jsonl").write_bytes(encode(TRACE))
    (tmp_path / "keys.yaml").write_text(keys)
    files = ["--trace", str(tmp_path / "trace.jsonl"), "--tenant-keys", str(tmp_path / "keys.yaml")]
    script = runpy.run_path(str(SCRIPT))
    try:
        code = script["main"](["--url", "http://127.0.0.1:1", *files, *arguments])
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    assert code == 2 and message in errors and "cret" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--url", "URL", "--models", "busy", "--requests", "2"], 1, "Error: 2 x HTTP 503"),
        (["--url", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1/v1/models"),
        (["--url", "URL", "--all-adapters", "4"], 2, "the server lists 3 adapters"),
        (["--url", "URL", "--endpoint", "chat"], 2, "--prompt-file"),
        (["--url", "URL", "--rate", "0", "--requests", "1"], 2, "rate is 0.0"),
        (["--url", "URL", "--models-file", "/none"], 2, "/none"),
        (["--url", "URL", "--json", "/none/out.json"], 2, "/none/out.json"),
        (["--concurrency", "1", "--rate", "1"], 2, "not allowed with"),
    ],
)
def test_the_script_says_what_is_wrong(arguments: list[str], code: int, message: str) -> None:
    got, text, errors = run_script(*arguments)
    assert got == code and message in text + errors
    assert "Traceback" not in errors
