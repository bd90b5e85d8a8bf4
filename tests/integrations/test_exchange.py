"""A request run through an application in this process: its parts, its beat, and its end."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from jslora.errors import Unavailable
from jslora.integrations import exchange
from jslora.integrations.changes import HttpRequest
from jslora.integrations.exchange import Exchange, Head, Part, refusal
from jslora.integrations.merged_metrics import merge

App = Callable[[Scope, Receive, Send], Awaitable[None]]
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


def body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def parts(app: App, call: HttpRequest | None = None) -> list[Part]:
    async def read() -> list[Part]:
        asked = call or HttpRequest(method="GET", path="/")
        return [part async for part in Exchange(app, asked).parts()]

    return asyncio.run(read())


def test_what_is_sent_at_once_is_one_part() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send(START)
        await send(body(message["body"] + scope["path"].encode(), False))

    call = HttpRequest(method="POST", path="/x y", body=b"hello ")
    assert parts(app, call) == [Part(Head(200, ((b"a", b"b"),)), b"hello /x y", True)]


def test_a_stream_comes_in_parts_and_silence_is_beaten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.01)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"1", True))
        await asyncio.sleep(0.05)
        await send(body(b"2", False))

    first, *beats, last = parts(app)
    assert (first.body, last.body, last.last) == (b"1", b"2", True)
    assert beats and set(beats) == {Part()}


def test_a_reader_who_goes_is_a_client_who_goes() -> None:
    async def scenario() -> Message:
        told: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send(START)
            await send(body(b"1", True))
            told.set_result(await receive())

        reading = Exchange(app, HttpRequest(method="GET", path="/")).parts()
        await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]
        return await asyncio.wait_for(told, 5)

    assert asyncio.run(scenario()) == {"type": "http.disconnect"}


def test_an_application_that_fails_breaks_its_answer_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"1", True))
        await asyncio.sleep(0)
        raise ValueError("a bug")

    assert not any(part.last for part in parts(app))


def test_a_refusal_reads_like_the_servers() -> None:
    part = refusal(Unavailable("later", retry_after=3))
    assert part.head is not None and part.head.status == 503 and part.last
    assert (b"retry-after", b"3") in part.head.headers
    assert json.loads(part.body)["error"]["type"] == "unavailable_error"


def test_metrics_of_replicas_keep_apart() -> None:
    text = '# HELP x_total What.\n# TYPE x_total counter\nx_total{{a="1"}} {}\n'
    merged = merge({"r1": text.format(1), "r2": text.format(2)}).decode()
    assert merged.count("# TYPE x_total counter") == 1
    assert 'x_total{a="1",replica="r1"} 1.0' in merged
    assert 'x_total{a="1",replica="r2"} 2.0' in merged
