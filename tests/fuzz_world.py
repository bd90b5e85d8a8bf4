"""What the fuzzer works on: an engine over the fingerprint model, its folders, and its faults."""

import contextlib
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fingerprint
import jax
from engine_helpers import small_engine

from jslora.calls import Chunk
from jslora.device import Device
from jslora.engine import Engine

CONTENTS = tuple(range(1, 13))
"""Numbers of the adapters."""
RANKS = (1, 5, 11, 16)
"""The adapters take 1 to 11 pages each; some have files of one size."""
AT_START = {"white": 3, "grey": 4}
"""Name → number of what is registered when an engine starts; the first is pinned."""
COUNTED = (
    "steps", "recoveries", "preemptions", "adapter_loads", "adapter_evictions", "prefix_evictions",
)  # fmt: skip
LIVE = ("live-0", "live-1", "live-2")
"""Folders whose contents change."""
BAD = ("truncated", "nan", "garbage", "foreign", "absent")
POOL_PAGES, PAGE_SIZE = 40, 8
STEPS = ("step refused", "step lost", "step failed late")
READS = ("read", "fetch")


_compile = Device._compile


class Wrong(AssertionError):
    """The engine did what it must never do."""


@dataclass
class Tally:
    """What a run did and found."""

    operations: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    engine: Counter[str] = field(default_factory=Counter)  # of `COUNTED`, over all engines
    requests: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    wrong_tokens: int = 0
    leaked_pages: int = 0
    leaked_host_bytes: int = 0
    ledger_errors: int = 0


class Faults:
    """Breaks an engine when told to: the n-th step, upload or read from then on.

    Attributes:
        countdown: kind of fault → how many are to go before it happens; 0 is never.
        happened: how often each kind did.
    """

    def __init__(self, engine: Engine) -> None:
        self.countdown: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        runner = engine.core.runner
        self._device = runner.devices
        self._execute, runner.execute = runner.execute, self._step
        residency, store = engine.core.residency, engine.core.store
        self._upload, residency.upload = residency.upload, self._transfer
        store._cache.load = self._broken("fetch", store._cache.load)
        store._reader.whole = self._broken("read", store._reader.whole)

    def _broken(self, kind: str, real: Callable) -> Callable:
        """The function, which raises when a fault is due."""

        def call(*arguments: Any) -> Any:
            if self._due(kind):
                raise RuntimeError(f"fault: {kind}")
            return real(*arguments)

        return call

    def _transfer(self, chunk: Chunk) -> Future:
        """`Runner.upload`: its future may fail."""
        if self._due("upload"):
            failed: Future = Future()
            failed.set_exception(RuntimeError("fault: upload"))
            return failed
        return self._upload(chunk)

    def _due(self, *kinds: str) -> str | None:
        """Which of the kinds happens now."""
        for kind in kinds:
            if self.countdown[kind] > 0:
                self.countdown[kind] -= 1
                if self.countdown[kind] == 0:
                    self.happened[kind] += 1
                    return kind
        return None

    def _step(self, plan: Any) -> Any:
        """`Runner.execute`: raises, having lost the pool or not, or returns a step that does."""
        kind = self._due(*STEPS)
        if kind == "step failed late":
            self.happened[kind] -= 1  # it does when its results are asked for
            return _LateFailure(self, self._execute(plan))
        if kind == "step lost":
            self.lose_pool()
        if kind is not None:
            raise RuntimeError(f"fault: {kind}")
        return self._execute(plan)

    def lose_pool(self) -> None:
        for array in jax.tree.leaves((self._device.pages, self._device.slots)):
            array.delete()


@dataclass
class _LateFailure:
    """A step that ran, and whose results are lost."""

    faults: Faults
    step: Any

    def wait(self) -> Any:
        self.faults.happened["step failed late"] += 1
        self.faults.lose_pool()
        raise RuntimeError("fault: step failed late")


class _Surprises(logging.Handler):
    """Keeps the errors that the engine logs and no fault explains."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not str(error).startswith("fault:"):
            self.found.append(error or RuntimeError(record.getMessage()))


class World:
    """The folders, the tally and the engine of a run.

    Attributes:
        programs: what was compiled for the first engine, for the others.
        patience: seconds after which something that did not happen never will.
        surprises: errors that the engine met and no fault explains.
        failure: the first that was found.
        trail: the last operations.
        digests, pages: of the contents, by their numbers.
    """

    def __init__(
        self, folder: Path, patience: float = 30.0, programs: dict[Any, Any] | None = None
    ) -> None:
        self.patience = patience
        self.programs = {} if programs is None else programs
        self.trail: deque[tuple[Any, ...]] = deque(maxlen=100)
        self.folder, self.roots, self.tally = folder, folder / "adapters", Tally()
        self.failure: Exception | None = None
        self.engine: Engine | None = None
        self.faults: Faults | None = None
        self.digests: dict[int, str] = {}
        self.pages: dict[int, int] = {}
        self._handler = _Surprises()
        self.surprises = self._handler.found
        if not folder.exists():
            fingerprint.write_model(folder / "model")
            for number in CONTENTS:
                rank = RANKS[number % len(RANKS)]
                fingerprint.write_adapter(self.roots / f"content-{number}", number, rank)
            for name, number in AT_START.items():
                shutil.copytree(self.roots / f"content-{number}", self.roots / name)
            for kind in BAD:
                self._write_bad(self.roots / f"bad-{kind}", kind)

    def _write_bad(self, folder: Path, kind: str) -> None:
        if kind == "absent":
            return
        shutil.copytree(self.roots / "content-1", folder)
        tensors, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        data = bytearray(tensors.read_bytes())
        if kind == "truncated":
            del data[-100:]
        elif kind == "nan":
            data[-4:] = b"\xff\xff\xff\x7f"
        elif kind == "garbage":
            data[:] = bytes(range(256)) * 10
        else:
            assert kind == "foreign", kind
            changed = json.loads(settings.read_text())
            settings.write_text(json.dumps(changed | {"r": changed["r"] + 1}))
        tensors.write_bytes(data)

    def rewrite(self, folder: str, number: int) -> None:
        """Put an adapter where another is, as someone does who copies files over."""
        target = self.roots / folder
        target.mkdir(exist_ok=True)
        for file in (self.roots / f"content-{number}").iterdir():
            shutil.copyfile(file, target / file.name)

    def lose_cache(self, damage: bool) -> None:
        """Remove the packed blobs on disk, or change a byte of each."""
        for path in (self.folder / "engine-cache").glob("adapters/*/blobs/*.npy"):
            with contextlib.suppress(FileNotFoundError):  # the engine drops what is damaged
                data = bytearray(path.read_bytes())
                path.unlink()
                if damage:
                    data[len(data) // 2] ^= 1
                    path.write_bytes(data)

    def open(self) -> tuple[Engine, Faults]:
        """The engine; a new one if the last was closed."""
        if self.engine is None or self.faults is None:
            log = logging.getLogger("jslora")
            log.addHandler(self._handler)
            log.propagate = False  # every fault is logged with its traceback
            with mock.patch.object(Device, "_compile", lambda *of: self._compile(*of)):
                self.engine = small_engine(
                    self.roots, self.folder / "model",
                    pool={"pages": POOL_PAGES, "page_size": PAGE_SIZE},
                    adapters={
                        "max_rank": 64, "host_cache_bytes": 150_000,
                        "preload": [*AT_START], "pinned": [*AT_START][:1],
                    },
                    scheduler={"max_running": 8, "max_step_tokens": 16},
                )  # fmt: skip
            self.faults = Faults(self.engine)
            if not self.digests:
                self._learn_digests(self.engine)
        return self.engine, self.faults

    def _compile(self, device: Device, progress: Any) -> None:
        if not self.programs:
            _compile(device, progress)
            self.programs.update(device._executables)
        device._executables = dict(self.programs)

    def _learn_digests(self, engine: Engine) -> None:
        for number in CONTENTS:
            info = engine.load_adapter("probe", f"content-{number}", replace=True)
            self.digests[number], self.pages[number] = info.digest, info.pages
        engine.unload_adapter("probe")

    def failed(self, error: Exception) -> None:
        """Remember the first failure, and work on a new engine."""
        self.failure = self.failure or error
        self.close()

    def close(self) -> None:
        """End the engine; the next `open` makes another."""
        engine, self.engine = self.engine, None
        if engine is not None:
            stats = engine.stats()
            self.tally.engine.update({name: getattr(stats, name) for name in COUNTED})
            self.tally.ledger_errors += stats.ledger_errors
            engine.close()
            log = logging.getLogger("jslora")
            log.removeHandler(self._handler)
            log.propagate = True
