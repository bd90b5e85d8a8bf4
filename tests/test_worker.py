"""The engine process at the other end of its socket: what it says, and how it ends."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import zmq
from goldens.adapters import write_adapter

from jslora import wire
from jslora.config import parse
from jslora.errors import UnknownModel
from jslora.request import AdapterInfo, Request, SamplingParams, Scaled, Stats, TokenEvent
from jslora.server.process import start_line
from jslora.worker import Worker

ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
News = TypeVar("News")


def make_config(tmp: Path, **model: Any) -> dict[str, Any]:
    model = {"source": "dummy", "dtype": "float32", "architecture": ARCHITECTURE} | model
    return {
        "cache_dir": str(tmp / "cache"),
        "model": model,
        "pool": {"pages": 64},
        "adapters": {"roots": [str(tmp)], "preload": "none", "max_rank": 16},
        "scheduler": {"max_running": 8, "max_step_tokens": 16},
    }


def start(config: dict[str, Any], *options: str, folder: Path | None = None) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "jslora.worker", *options],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(start_line(parse(config), folder))
    process.stdin.flush()
    return process


class Client:
    """A worker process and our end of the socket."""

    def __init__(self, config: dict[str, Any], folder: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()  # pytest's paths are too long for a socket
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        address = f"ipc://{self._directory.name}/engine"
        self._socket.bind(address)
        self.process = start(config, "--socket", address, folder=folder)
        self.before: list[wire.News] = []

    def send(self, *commands: wire.Command) -> None:
        for command in commands:
            self._socket.send(wire.encode(command))

    def receive(self, seconds: float = 60.0) -> wire.News:
        """The next message of any kind."""
        if not self._socket.poll(1000 * seconds):
            raise TimeoutError(f"no message; exit code {self.process.poll()}")
        return wire.decode_news(self._socket.recv())

    def wait_for(self, kind: type[News], seconds: float = 60.0) -> News:
        """The next message of one kind; `before` holds the others that came before it."""
        self.before = []
        while not isinstance(news := self.receive(seconds), kind):
            self.before.append(news)
        return news

    def events(self, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
        """What is said of some requests until the last of them has ended."""
        found: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        while not all(events and events[-1].last for events in found.values()):
            news = self.receive()
            for event in news.events if isinstance(news, wire.Events) else ():
                assert not (found[event.id] and found[event.id][-1].last)
                found[event.id].append(event)
        return found

    def reply(self, command: wire.LoadAdapter | wire.UnloadAdapter) -> wire.Reply:
        self.send(command)
        reply = self.wait_for(wire.Reply)
        assert reply.seq == command.seq
        return reply

    def remaining(self) -> list[wire.News]:
        """All that still comes until the process has ended."""
        self.process.wait(60)
        found = []
        with contextlib.suppress(TimeoutError):
            while True:
                found.append(self.receive(0.2))
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self._socket.close()
        self._directory.cleanup()


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("worker")
    for seed in range(3):
        write_adapter(
            tmp / f"a{seed}", ARCHITECTURE, ["q_proj", "down_proj"], 8, seed, 1.0, "float32"
        )
    return tmp


@pytest.fixture(scope="module")
def first(tmp: Path) -> Iterator[Client]:
    client = Client(make_config(tmp))
    yield client
    client.close()


@pytest.fixture(scope="module")
def started(first: Client) -> tuple[wire.Ready, list[wire.News]]:
    """Ready, and what came before it."""
    return first.wait_for(wire.Ready), first.before


@pytest.fixture
def client(first: Client, started: tuple) -> Client:
    """A worker that is ready; the tests share it."""
    return first


@pytest.fixture
def another(tmp: Path, started: tuple) -> Iterator[Client]:
    """One more worker, for a test that ends it; the programs are compiled already."""
    client = Client(make_config(tmp))
    client.wait_for(wire.Ready)
    yield client
    client.close()


def request(name: str, max_tokens: int = 8, adapter: str | None = None, **settings: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | settings))
    adapters = (Scaled(adapter),) if adapter else ()
    return Request(id=name, prompt=(1, 2, 3), params=params, adapters=adapters)


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


# A life ------------------------------------------------------------------------------------------


def test_progress_comes_before_ready(started: tuple[wire.Ready, list[wire.News]]) -> None:
    ready, before = started
    assert all(isinstance(news, wire.Progress) for news in before)
    compiled = [news for news in before if news.stage == "compile"]
    assert [news.done for news in compiled] == list(range(compiled[0].total + 1))
    assert all(news.note for news in compiled[1:])
    info = ready.info
    assert (info.model_name, info.max_model_len, info.vocab_size) == ("base", 128, 128)
    assert (info.pages, info.page_size, info.adapters) == (64, 16, ())
    assert info.device and info.fingerprint


def test_a_request_is_answered_token_by_token(client: Client) -> None:
    one = request("one", 12, logprobs=2, prompt_logprobs=1)
    client.send(wire.Submit(one))
    events = client.events([one])["one"]
    assert len(tokens(events)) == 12
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    assert all(len(event.logprobs) == 1 and len(event.logprobs[0].top) == 2 for event in events)
    scores = [event.prompt_logprobs for event in events]
    assert scores[0][0] is None and [len(s.top) for s in scores[0][1:]] == [1, 1]
    assert scores[1:] == [None] * 11


def test_no_event_is_lost_or_out_of_order(client: Client) -> None:
    """Many more requests than rows, of different lengths, twice the same."""
    crowd = [
        request(f"{n}-{copy}", 1 + n, seed=n, temperature=1.0) for copy in "ab" for n in range(30)
    ]
    client.send(*(wire.Submit(one) for one in crowd))
    events = client.events(crowd)
    for n in range(30):
        assert len(tokens(events[f"{n}-a"])) == 1 + n
        assert tokens(events[f"{n}-a"]) == tokens(events[f"{n}-b"])


def test_errors_come_as_events(client: Client) -> None:
    bad = [
        request("long", 200),
        request("unknown", adapter="sql"),
        Request(id="token", prompt=(500,), params=SamplingParams()),
        request("setting", temperature=-1.0),
    ]
    client.send(*(wire.Submit(one) for one in bad))
    events = client.events(bad)
    errors = {name: found[0].error for name, found in events.items()}
    assert {name: error.type for name, error in errors.items()} == {
        "long": "invalid_request_error",
        "unknown": "not_found_error",
        "token": "invalid_request_error",
        "setting": "invalid_request_error",
    }
    assert errors["setting"].param == "temperature"


def next_change(client: Client) -> wire.Pulse:
    """The next pulse that tells of names."""
    while not ((pulse := client.wait_for(wire.Pulse)).changed or pulse.removed):
        pass
    return pulse


def test_adapters_come_and_go(client: Client) -> None:
    loaded = client.reply(wire.LoadAdapter(1, "mine", "a0")).adapter
    assert (loaded.name, loaded.state, loaded.path) == ("mine", "host", "a0")
    pulse = next_change(client)
    assert ([info.name for info in pulse.changed], pulse.removed) == (["mine"], [])
    both = [request("base"), request("mine", adapter="mine")]
    client.send(*(wire.Submit(one) for one in both))
    first = {name: tokens(events) for name, events in client.events(both).items()}
    assert first["base"] != first["mine"]

    again = client.reply(wire.LoadAdapter(2, "mine", "a1"))
    assert again.error.type == "adapter_rejected" and "registered already" in again.error.message
    assert client.reply(wire.LoadAdapter(3, "mine", "a1", replace=True)).adapter.path == "a1"
    client.send(*(wire.Submit(one) for one in both))
    second = {name: tokens(events) for name, events in client.events(both).items()}
    assert second["base"] == first["base"] and second["mine"] != first["mine"]

    # Pulses tell of a new version and of an end, each once, and of nothing else.
    assert [info.path for info in next_change(client).changed] == ["a1"]
    client.reply(wire.UnloadAdapter(4, "mine", 5.0))
    assert next_change(client).removed == ["mine"]
    assert client.reply(wire.UnloadAdapter(5, "mine", 5.0)).error.type == "not_found_error"
    assert client.wait_for(wire.Pulse) is not None and client.before == []


def test_adapters_are_described_as_they_are_now(client: Client) -> None:
    for seq, name in enumerate(("one", "two")):
        client.reply(wire.LoadAdapter(seq, name, f"a{seq}"))
    long = request("long", 100, adapter="one")
    client.send(wire.Submit(long))
    client.wait_for(wire.Events)
    client.send(wire.Describe(7), wire.Describe(8, "two"), wire.Describe(9, "nobody"))
    answers = {news.seq: news for news in (client.wait_for(wire.Described) for _ in range(3))}
    everything, two, nobody = (answers[seq] for seq in (7, 8, 9))
    reports = {info.name: info for info in everything.adapters}
    assert reports.keys() == {"one", "two"} and nobody.adapters == []
    assert (reports["one"].state, reports["one"].in_flight) == ("device", 1)
    assert two.adapters == [reports["two"]] and two.adapters[0].in_flight == 0
    assert len(client.events([long])["long"]) > 0
    for name in ("one", "two"):
        assert client.reply(wire.UnloadAdapter(1, name, 5.0)).error is None


def test_an_unload_is_answered_once_its_requests_have_ended(client: Client) -> None:
    client.reply(wire.LoadAdapter(1, "mine", "a0"))
    long = [request(f"long-{n}", 120, adapter="mine") for n in range(2)]
    client.send(*(wire.Submit(one) for one in long))
    client.wait_for(wire.Events)
    client.send(
        wire.UnloadAdapter(2, "mine", 60.0),
        wire.Submit(request("late", adapter="mine")),
        wire.Describe(3, "mine"),
    )
    said: list[wire.News] = []
    while not isinstance(news := client.receive(), wire.Reply):
        said.append(news)
    assert news.seq == 2 and news.error is None
    (described,) = [one for one in said if isinstance(one, wire.Described)]
    assert [info.state for info in described.adapters] == ["draining"]
    events = [event for one in said if isinstance(one, wire.Events) for event in one.events]
    assert {event.id: event.error.type for event in events if event.error} == {
        "late": "not_found_error"
    }
    reasons = {event.id: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {"long-0": "length", "long-1": "length"}


def test_a_drain_has_an_end(client: Client) -> None:
    client.reply(wire.LoadAdapter(1, "mine", "a0"))
    long = request("endless", 120, adapter="mine")
    client.send(wire.Submit(long), wire.UnloadAdapter(2, "mine", 0.0))
    *_, last = client.events([long])["endless"]
    assert last.error.type == "unavailable_error" and "unloaded" in last.error.message
    assert client.wait_for(wire.Reply).error is None


@pytest.mark.parametrize("path", [None, "missing", "../a0", "/etc", "a0/../../x", "", "a\0b"])
def test_a_path_that_is_no_adapter_is_a_reply(client: Client, path: str | None) -> None:
    reply = client.reply(wire.LoadAdapter(7, "gone", path))
    assert reply.adapter is None and reply.error.type == "adapter_rejected"
    client.send(wire.Submit(request("after", 1)))
    assert len(tokens(client.events([request("after")])["after"])) == 1


def test_every_command_of_a_flood_is_answered(client: Client) -> None:
    flood = [wire.UnloadAdapter(seq, "nobody", 1.0) for seq in range(5000)]
    client.send(*flood)
    for command in flood:
        assert client.wait_for(wire.Reply).seq == command.seq


def test_the_first_event_tells_what_was_cached(client: Client) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0)
    prompt = tuple(range(40))

    def cached(name: str, salt: str = "", tenant: str = "default") -> list[int]:
        one = Request(id=name, prompt=prompt, params=params, cache_salt=salt, tenant=tenant)
        client.send(wire.Submit(one))
        return [event.cached_tokens for event in client.events([one])[name]]

    assert cached("first") == [0, 0, 0]
    assert cached("second") == [32, 0, 0]  # whole pages of 16
    assert cached("salted", salt="mine") == cached("somebody", tenant="else") == [0, 0, 0]
    assert cached("salted again", salt="mine") == [32, 0, 0]


def test_aborted_requests_say_nothing_more(client: Client) -> None:
    long = [request(f"long-{n}", 120) for n in range(3)]
    client.send(*(wire.Submit(one) for one in long))
    client.wait_for(wire.Events)
    client.send(wire.Abort([one.id for one in long] + ["never seen"]))
    deadline = time.monotonic() + 10
    while (pulse := client.wait_for(wire.Pulse)).stats.running:
        assert time.monotonic() < deadline
    # What is left in the prefix cache is there for the taking.
    assert pulse.stats.pages_free + pulse.stats.pages_cached == pulse.stats.pages_total
    said = [
        event.id for news in client.before if isinstance(news, wire.Events) for event in news.events
    ]
    assert client.wait_for(wire.Pulse).stats.running == 0
    assert not [news for news in client.before if isinstance(news, wire.Events)], said


def test_it_pulses_without_being_asked(client: Client) -> None:
    for _ in range(2):
        assert client.wait_for(wire.Pulse, 10).stats.pages_total == 63
        assert client.before == []


def test_ready_tells_of_what_is_registered_and_the_rest_is_described(tmp: Path) -> None:
    config = make_config(tmp)
    config["adapters"] |= {"preload": ["a0", "missing", "a2"]}
    client = Client(config)
    try:
        info = client.wait_for(wire.Ready).info
        assert sorted(adapter.name for adapter in info.adapters) == ["a0", "a2"]
        client.send(wire.Describe(1))
        found = {info.name: info for info in client.wait_for(wire.Described).adapters}
        assert {"a0", "a2"} <= found.keys()
        assert "missing" not in found or found["missing"].error
        pulses = [client.wait_for(wire.Pulse) for _ in range(2)]
        assert not any(pulse.changed or pulse.removed for pulse in pulses)
        cold = request("cold", 4, adapter="a2")
        client.send(wire.Submit(cold))
        assert len(tokens(client.events([cold])["cold"])) == 4
    finally:
        client.close()


# Its end -----------------------------------------------------------------------------------------


def test_drained_it_ends_with_nothing_unsaid(another: Client) -> None:
    """Drain comes right behind the commands, before the engine can have looked at any."""
    crowd = [request(f"r{n}", 20, adapter=None) for n in range(20)]
    another.send(
        wire.LoadAdapter(1, "mine", "a0"),
        wire.LoadAdapter(2, "other", "a1"),
        *(wire.Submit(one) for one in crowd),
        wire.Submit(request("aborted", 100)),
        wire.Abort(["aborted"]),
        wire.UnloadAdapter(3, "nobody", 1.0),
        wire.Drain(),
    )
    news = another.remaining()
    assert another.process.returncode == 0
    assert sorted(one.seq for one in news if isinstance(one, wire.Reply)) == [1, 2, 3]
    events = [event for one in news if isinstance(one, wire.Events) for event in one.events]
    for one in crowd:
        mine = [event for event in events if event.id == one.id]
        assert len(tokens(mine)) == 20 and mine[-1].finish_reason == "length"


def test_it_does_not_outlive_its_parent(another: Client) -> None:
    another.send(*(wire.Submit(request(f"r{n}", 120)) for n in range(20)))
    another.wait_for(wire.Events)
    another.process.stdin.close()
    assert another.process.wait(10) == 0


@pytest.mark.parametrize(
    ("model", "folder", "kind", "code", "message"),
    [
        ({"max_model_len": 999}, None, "config_error", 2, "max_model_len is 999.* 128"),
        ({"source": "folder"}, "empty", "model_error", 3, "config.json"),
        ({"source": "folder"}, "weightless", "model_error", 3, "safetensors"),
        (
            {"architecture": ARCHITECTURE | {"architectures": ["GPT2LMHeadModel"]}},
            None, "model_error", 3, "GPT2LMHeadModel",
        ),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_said(
    tmp: Path, model: dict, folder: str | None, kind: str, code: int, message: str
) -> None:
    where = None
    if folder is not None:
        where = tmp / folder
        where.mkdir()
        if folder == "weightless":
            (where / "config.json").write_text(json.dumps(ARCHITECTURE))
    client = Client(make_config(tmp, **model), where)
    try:
        *progress, failed = client.remaining()
        assert client.process.returncode == code
        assert all(isinstance(news, wire.Progress) for news in progress)
        assert isinstance(failed, wire.Failed) and failed.error.type == kind
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(failed.error.message)
    finally:
        client.close()


def info_of(name: str) -> AdapterInfo:
    return AdapterInfo(name=name, digest="", state="registered", rank=8)


class StandInAdapters:
    """Adapters that are names; commands about some of them fail."""

    def __init__(self) -> None:
        self.names: dict[str, AdapterInfo] = {}

    def registered(self) -> dict[str, AdapterInfo]:
        return dict(self.names)

    def unload(self, name: str, drain_seconds: float) -> "Future[AdapterInfo]":
        if name == "unknown":
            raise UnknownModel("there is none")
        done: Future[AdapterInfo] = Future()
        if name == "broken":
            done.set_exception(RuntimeError("a secret"))
        else:
            self.names.pop(name)
            threading.Timer(drain_seconds, lambda: done.set_result(info_of(name))).start()
        return done


class StandInCore:
    """A core that answers each request after a while, or whose engine died."""

    def __init__(self, *, alive: bool = True) -> None:
        self.alive = alive
        self.scheduler = SimpleNamespace(idle=True)
        self.closed = False
        self.adapters = StandInAdapters()
        self.worker: Worker | None = None

    def stats(self) -> Stats:
        return Stats()

    def submit(self, request: Request) -> None:
        events = [TokenEvent(id=request.id, finish_reason="length")]
        threading.Timer(0.5, lambda: self.worker.tell_events(events)).start()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket, Worker]]:
    """Our end of a socket, and a worker without a core at the other."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/engine"
        ours: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        ours.bind(address)
        worker = Worker(address)
        yield ours, worker
        worker._context.destroy(linger=0)
        ours.close(linger=0)


def test_a_worker_whose_engine_died_ends_after_its_last_words(pair: tuple) -> None:
    ours, worker = pair
    worker._core = core = StandInCore(alive=False)
    worker.tell_events([TokenEvent(id="last", finish_reason="length")])
    assert worker._serve() == 4
    assert core.closed
    assert ours.poll(5000)
    assert wire.decode_news(ours.recv()).events[0].id == "last"


def test_draining_waits_for_what_the_engine_has_not_taken_up_yet(pair: tuple) -> None:
    """A core looks idle until its thread has seen the request."""
    ours, worker = pair
    worker._core = core = StandInCore()
    core.worker = worker
    ours.send(wire.encode(wire.Submit(request("late"))))
    ours.send(wire.encode(wire.Drain()))
    assert worker._serve() == 0
    said = []
    while ours.poll(200):
        news = wire.decode_news(ours.recv())
        said += [event.id for event in news.events] if isinstance(news, wire.Events) else []
    assert said == ["late"]


def news_of(ours: zmq.Socket) -> list[wire.News]:
    """All that has come."""
    found = []
    while ours.poll(200):
        found.append(wire.decode_news(ours.recv()))
    return found


def test_a_pulse_tells_what_became_of_names_and_each_thing_once(pair: tuple) -> None:
    ours, worker = pair
    worker._core = core = StandInCore()
    names = core.adapters.names
    names |= {f"a{n}": info_of(f"a{n}") for n in range(3)}
    worker._told = dict(names)
    worker._pulse()
    names["a1"] = info_of("a1")  # a new version, or a new info of the old one
    names["a3"] = info_of("a3")
    del names["a0"]
    worker._pulse()
    worker._pulse()
    names.clear()
    worker._pulse()
    told = [([info.name for info in pulse.changed], pulse.removed) for pulse in news_of(ours)]
    assert told == [([], []), (["a1", "a3"], ["a0"]), ([], []), ([], ["a1", "a2", "a3"])]


def test_a_reply_is_never_undone_by_an_older_look_at_the_names(pair: tuple) -> None:
    """A name went and came back; the reply of its return comes between look and pulse."""
    ours, worker = pair
    worker._core = core = StandInCore()
    worker._told = {"mine": info_of("mine")}

    def registered() -> dict[str, AdapterInfo]:
        worker.tell(wire.Reply(1, info_of("mine")))
        return {}

    core.adapters.registered = registered
    worker._pulse()
    worker._flush()
    pulse, reply = news_of(ours)
    assert pulse.removed == ["mine"] and reply.adapter.name == "mine"


def test_events_from_before_the_statistics_leave_before_them(pair: tuple) -> None:
    ours, worker = pair
    worker._core = core = StandInCore()

    def stats() -> Stats:
        worker.tell_events([TokenEvent(id="last", finish_reason="length")])
        return Stats(running=0)

    core.stats = stats
    worker._pulse()
    assert [type(news) for news in news_of(ours)] == [wire.Events, wire.Pulse]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("unknown", "not_found_error", "there is none"), ("broken", "internal_error", "see the log")],
)
def test_a_command_that_fails_is_answered(pair: tuple, name: str, kind: str, message: str) -> None:
    """Whether the core refuses at once or later; what is not for users is not told."""
    ours, worker = pair
    worker._core = StandInCore()
    worker._obey(wire.UnloadAdapter(5, name, 1.0))
    worker._flush()
    (reply,) = news_of(ours)
    assert (reply.seq, reply.adapter, reply.error.type) == (5, None, kind)
    assert message in reply.error.message and "secret" not in reply.error.message


# The memory plan ---------------------------------------------------------------------------------


def check(config: dict[str, Any], folder: Path | None = None) -> tuple[int, str, str]:
    process = start(config, "--check", folder=folder)
    out, error = process.communicate(timeout=60)
    return process.returncode, out.decode(), error.decode()


def test_check_prints_the_memory_plan(tmp: Path) -> None:
    code, out, _ = check(make_config(tmp) | {"pool": {"pages": 256}})
    assert code == 0
    lines = dict(line.rsplit("  ", 1) for line in out.splitlines())
    found = {name.strip(): value.strip() for name, value in lines.items()}
    assert "256 pages of 16 tokens" in found
    assert found["pool (KV cache and adapters)"] == "1.0 MiB"
    assert found["longest sequence"] == "128 tokens"
    assert found["tokens, were no adapter loaded"] == "4,080"


def test_check_fails_as_a_start_would(tmp: Path) -> None:
    code, _, error = check(make_config(tmp, max_model_len=999))
    assert code == 2 and "999" in error and "Traceback" not in error
    code, _, error = check(make_config(tmp, source="nowhere"), tmp / "nowhere")
    assert code == 3 and "Traceback" not in error
    code, _, error = check(make_config(tmp, quantize="fp8"))
    assert code == 2 and "fp8 needs a GPU" in error and "Traceback" not in error
