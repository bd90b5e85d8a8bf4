"""The front-end process: prepare, start the engine, serve, drain, exit. It never imports jax.

Exit codes: 0 stopped as asked; 2 the configuration, 3 the model or an adapter, 4 the device or an
engine that does not stay alive, 5 the group of processes that it leads.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from jslora import fetch, logs
from jslora.config import EngineConfig, SyntheticAdapters
from jslora.distributed.section import EXIT_CODE
from jslora.errors import AdapterRejected, ConfigError, JsloraError, ModelError, Unavailable
from jslora.model.config import from_hf
from jslora.progress import Progress
from jslora.request import Stats
from jslora.server import stand_in
from jslora.server.app import create_app
from jslora.server.auth import KeyRing
from jslora.server.bars import Bars
from jslora.server.client import EngineClient, EngineStopped
from jslora.server.http import HttpServer, bind
from jslora.server.metrics import Metrics
from jslora.server.names import Names
from jslora.server.process import start_line
from jslora.server.service import Service
from jslora.tokenizer import Tokenizer

log = logging.getLogger("jslora.server")

WORKER = (sys.executable, "-m", "jslora.worker")
REPORT_SECONDS = 10.0
LONG_WAIT_SECONDS = 1.0  # a wait for a first token that the report tells
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(config: EngineConfig, worker: Sequence[str] = WORKER) -> int:
    """Serve until told to stop; returns the exit code.

    Args:
        worker: the command that starts an engine process.
    """
    logs.configure(config.logging)
    began = time.monotonic()
    bars = Bars()
    try:
        with contextlib.closing(bind(config.server.host, config.server.port)) as listener:
            folder = prepare(config, bars)
            tokenizer = read_tokenizer(config, folder)
            return asyncio.run(_serve(config, folder, tokenizer, listener, worker, bars, began))
    except JsloraError as error:
        log.error("%s", error.message)
        return exit_code(error)
    except KeyboardInterrupt:  # while a model was fetched
        return 128 + signal.SIGINT
    finally:
        bars.close()


def check(config: EngineConfig, worker: Sequence[str] = WORKER) -> int:
    """Let an engine process print its memory plan; returns its exit code."""
    logs.configure(config.logging)
    bars = Bars()
    try:
        folder = _resolve(config, bars)
    except JsloraError as error:
        log.error("%s", error.message)
        return exit_code(error)
    finally:
        bars.close()
    with subprocess.Popen([*worker, "--check"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit code says why
            process.stdin.write(start_line(config, folder))
            process.stdin.flush()
        return process.wait()  # the pipe stays open meanwhile: its end would end the engine


def exit_code(error: JsloraError) -> int:
    """The exit code that tells what kind of thing is wrong."""
    if isinstance(error, ConfigError):
        return 2
    return 3 if isinstance(error, ModelError | AdapterRejected) else 4


# Before the engine starts -------------------------------------------------------------------------


def _resolve(config: EngineConfig, progress: Progress) -> Path | None:
    """The model's folder; None for random weights."""
    if config.model.source == "dummy":
        return None
    return fetch.resolve(config.model.source, config.cache_dir, progress)


def prepare(config: EngineConfig, progress: Progress) -> Path | None:
    """Fetch the model, and make the adapters the configuration asks for."""
    folder = _resolve(config, progress)
    if config.adapters.synthetic is not None:
        _make_adapters(config, config.adapters.synthetic, folder, progress)
    return folder


def _make_adapters(
    config: EngineConfig, wanted: SyntheticAdapters, folder: Path | None, progress: Progress
) -> None:
    from jslora.adapters import synthetic

    if not config.adapters.roots:
        raise ConfigError("adapters.synthetic needs a folder in adapters.roots to write to")
    synthetic.make_adapters(
        config.adapters.roots[0],
        fetch.load_config(folder) if folder else from_hf(config.model.architecture or {}),
        count=wanted.count,
        ranks=wanted.ranks,
        targets=wanted.targets,
        dtype=wanted.dtype,
        seed=wanted.seed,
        base_name=config.model.served_name,
        progress=progress,
    )


def read_tokenizer(config: EngineConfig, folder: Path | None) -> Tokenizer:
    """The model's tokenizer; a stand-in for random weights."""
    if folder is not None:
        return Tokenizer(folder)
    size = from_hf(config.model.architecture or {}).vocab_size
    with tempfile.TemporaryDirectory(prefix="jslora-") as scratch:
        stand_in.write_tokenizer(Path(scratch), size)
        return Tokenizer(Path(scratch))


def make_service(config: EngineConfig, client: EngineClient, tokenizer: Tokenizer) -> Service:
    """What the application needs to serve an engine."""
    return Service(
        config=config,
        client=client,
        names=Names(config.model.served_name, client.adapters),
        tokenizer=tokenizer,
        keys=KeyRing(config.auth),
        metrics=Metrics(client, config),
        started=int(time.time()),
    )


# While it runs ------------------------------------------------------------------------------------


class Signals:
    """SIGTERM and SIGINT: the first asks for a drain, the second for an end."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.abort = asyncio.Event()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Catch the signals inside the block."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._receive)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _receive(self) -> None:
        (self.abort if self.drain.is_set() else self.drain).set()


async def _serve(
    config: EngineConfig,
    folder: Path | None,
    tokenizer: Tokenizer,
    listener: socket.socket,
    worker: Sequence[str],
    bars: Bars,
    began: float,
) -> int:
    client = EngineClient(config, folder, worker, bars)
    service = make_service(config, client, tokenizer)
    server = HttpServer(create_app(service), config)
    signals = Signals()
    async with signals.listening(), asyncio.TaskGroup() as tasks:
        http = tasks.create_task(server.serve([listener]))
        report = tasks.create_task(_report(client))
        engine = asyncio.create_task(client.run())
        ready = tasks.create_task(client.was_ready.wait())
        drain = tasks.create_task(signals.drain.wait())
        await asyncio.wait({engine, ready, drain}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            bars.close()
            print(_ready_line(service, listener, time.monotonic() - began), flush=True)
        await asyncio.wait({engine, drain}, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            await _drain(service, signals)
        code = await _end_engine(engine)
        server.should_exit = True
        await http
        for task in (report, ready, drain):
            task.cancel()
    return code


async def _drain(service: Service, signals: Signals) -> None:
    """Refuse new requests and let running ones finish, for `drain_seconds` at most."""
    service.draining = True
    client, patience = service.client, service.config.server.drain_seconds
    deadline = time.monotonic() + patience
    log.info("draining: %d sequences run or wait", client.outstanding)
    while client.outstanding and time.monotonic() < deadline and not signals.abort.is_set():
        await asyncio.sleep(0.02)
    if client.outstanding:
        log.warning("%d sequences did not finish in time and are ended", client.outstanding)
    client.fail_all(Unavailable("the server is shutting down"))


async def _end_engine(engine: asyncio.Task[None]) -> int:
    """Stop the engine; the exit code that its end calls for."""
    engine.cancel()
    try:
        await engine
    except asyncio.CancelledError:
        return 0
    except EngineStopped as error:
        log.error("%s", error)
        if error.error is not None:
            return exit_code(error.error)
        return error.code if error.code in (2, 3, EXIT_CODE) else 4
    return 0


async def _report(client: EngineClient) -> None:
    """Log throughput every so often, and nothing while there is neither that nor a long wait."""
    before = client.stats
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        if line := _report_line(before, client.stats):
            log.info("%s", line)
        before = client.stats


def _report_line(before: Stats, now: Stats) -> str | None:
    """What happened in `REPORT_SECONDS`; None if it is not worth a line."""
    prompt = (now.prompt_tokens - before.prompt_tokens) / REPORT_SECONDS
    generated = (now.generated_tokens - before.generated_tokens) / REPORT_SECONDS
    asked = now.prefix_asked_tokens - before.prefix_asked_tokens
    hits = (now.prefix_hit_tokens - before.prefix_hit_tokens) / asked if asked > 0 else 0.0
    oldest = f" (oldest {now.oldest_wait:.1f} s)" if now.oldest_wait > LONG_WAIT_SECONDS else ""
    if prompt <= 0 and generated <= 0 and not oldest:
        return None
    return (
        f"Avg prompt throughput: {prompt:.1f} tokens/s, "
        f"Avg generation throughput: {generated:.1f} tokens/s, "
        f"Running: {now.running} reqs, Waiting: {now.waiting} reqs{oldest}, "
        f"Pages: {now.pages_kv} KV, {now.pages_cached} cached, {now.pages_adapters} adapters, "
        f"{now.pages_free} free of {now.pages_total}, "
        f"Prefix cache hit rate: {100 * hits:.1f}%"
    )


def _ready_line(service: Service, listener: socket.socket, seconds: float) -> str:
    info = service.client.info
    assert info is not None
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    adapters = len(service.client.adapters.known)
    return (
        f"Ready in {seconds:.1f} s: http://{host}:{port} "
        f"({service.names.base} + {adapters} adapters, {info.pages} pages)"
    )
