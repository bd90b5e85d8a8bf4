"""Run sections, each in a process of its own, within a budget, and keep what they record.

The order is that of importance, and the shares of the chosen implementation's sections fit into the
usual budget together. A section is skipped when less is left than it needs to record anything, and
killed when it outstays its share, and the document says so. The document is written anew whenever
something was recorded, so a kill loses little. Nothing here touches the device or imports jax.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

IMPLEMENTATIONS = ("triton", "pallas", "reference")
ROOT = Path(__file__).parents[2]
SCHEMA = 1
LEAST_SECONDS = 15.0
"""Below this no section would get past starting jax and compiling."""
GRACE_SECONDS = 10.0
"""Between the end of a section's share and its kill: the point in hand may end."""


@dataclass(frozen=True, slots=True)
class Task:
    """A section and its share of the budget at most, in seconds.

    Attributes:
        least: seconds below which it is not started.
        flags: for XLA, beside those that are set already.
        environment: further variables.
        options: arguments of the section's process.
    """

    section: str
    seconds: float
    flags: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    least: float = LEAST_SECONDS


Group = tuple[Task, ...]
"""Sections that run at once: those that time nothing."""


@dataclass
class Document:
    """Everything recorded so far, on disk as JSON."""

    path: Path
    head: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, record: dict[str, Any]) -> None:
        with self._lock:
            self.records.append(record)
            self._save()

    def end(self, section: str, **how: Any) -> None:
        """Say how a section ended."""
        with self._lock:
            self.sections[section] = how
            self._save()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, **self.head, "sections": self.sections, "records": self.records
        }  # fmt: skip

    def _save(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.data(), indent=1, allow_nan=False) + "\n")
        partial.replace(self.path)


SECTION = (sys.executable, "-m", "jslora.gpu.sections")


class Supervisor:
    """Runs groups of tasks one after the other until the time is over.

    A task's process is `command`, the section's name, and its options.
    """

    def __init__(
        self,
        document: Document,
        log: IO[bytes],
        seconds: float,
        say: Callable[[str], None],
        command: Sequence[str] = SECTION,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.document, self._log, self._say, self._clock = document, log, say, clock
        self._command = command
        self._end = clock() + seconds
        self._running: set[subprocess.Popen[bytes]] = set()

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def run(self, groups: Sequence[Group]) -> None:
        """Run what there is time for; the rest is skipped, by name."""
        for group in groups:
            left = self.left - GRACE_SECONDS
            for task in group:
                if left < task.least:
                    self._say(f"{task.section}: skipped, too little time left")
                    self.document.end(task.section, skipped=True)
            started = [task for task in group if left >= task.least]
            with ThreadPoolExecutor(len(group)) as pool:
                try:
                    for done in [pool.submit(self._run, task) for task in started]:
                        done.result()
                except BaseException:
                    for process in [*self._running]:
                        process.kill()
                    raise

    def _run(self, task: Task) -> None:
        seconds = min(task.seconds, self.left - GRACE_SECONDS)
        started = self._clock()
        command = [*self._command, task.section, "--seconds", f"{seconds}", *task.options]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(task), stdout=subprocess.PIPE, stderr=self._log,
            stdin=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            self._running.add(process)
            over = threading.Event()

            def stop() -> None:
                over.set()
                process.kill()

            timer = threading.Timer(seconds + GRACE_SECONDS, stop)
            timer.start()
            found = sum(self._record(line) for line in process.stdout or ())
            code = process.wait()
            timer.cancel()
            self._running.remove(process)
        took = self._clock() - started
        killed = over.is_set() and code == -signal.SIGKILL  # others kill too, for memory
        self.document.end(
            task.section, seconds=round(took, 1), records=found, code=code, killed=killed
        )  # fmt: skip
        how = " (killed)" if killed else f" (exit code {code})" if code else ""
        self._say(f"{task.section}: {found} records in {took:.0f} s{how}")

    def _record(self, line: bytes) -> bool:
        """Keep a record; the last line of a process that was killed may be cut off."""
        whole = line.endswith(b"\n")
        if whole:
            self.document.add(json.loads(line))
        return whole


def environment(task: Task) -> dict[str, str]:
    """The variables of a task's process."""
    given = dict(os.environ)
    flags = f"{given.get('XLA_FLAGS', '')} {task.flags}".strip()
    return given | dict(task.environment) | ({"XLA_FLAGS": flags} if flags else {})


# What runs ---------------------------------------------------------------------------------------


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for the compiler's caches and dumps; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        yield Path(folder)


def first_group(folder: Path, *, tiny: bool) -> list[Group]:
    """What there is; it decides whether anything else runs, and which implementation first."""
    dump = folder / "dump"
    task = Task("device", 40, f"--xla_dump_to={dump}", _memory(folder), ("--dump", str(dump)))
    return _sized([(task,)], tiny)


def groups(folder: Path, chosen: str, executable: Path, *, tiny: bool) -> list[Group]:
    """All other sections, those of the chosen implementation first."""
    memory = _memory(folder)
    shared = memory | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    other = "pallas" if chosen != "pallas" else "triton"
    found: list[Group] = [
        (Task("ceilings", 20, "", memory, least=10),),
        tuple(Task(f"correctness:{name}", 80, "", shared, least=40) for name in IMPLEMENTATIONS),
        (Task(f"step:{chosen}", 110, "", memory, least=60),),
        (Task(f"lora:{chosen}", 45, "", memory, least=20),),
        (Task(f"attention:{chosen}", 35, "", memory, least=20),),
        (Task(f"baselines:{chosen}", 55, "", memory, least=25),),
        (Task("executable", 30, "", memory, ("--executable", str(executable)), least=20),),
        (Task(f"uncaptured:{chosen}", 55, "--xla_gpu_enable_command_buffer=", memory, least=40),),
        (Task(f"step:{other}", 110, "", memory, least=60),),
        (Task(f"lora:{other}", 45, "", memory, least=20),),
        (Task(f"attention:{other}", 35, "", memory, least=20),),
    ]
    return _sized(found, tiny)


def only(found: Sequence[Group], names: str | None) -> list[Group]:
    """The tasks whose sections begin with one of the names, all without names."""
    wanted = _names(names) if names else ("",)
    kept = [tuple(task for task in group if task.section.startswith(wanted)) for group in found]
    return [group for group in kept if group]


def unmatched(found: Sequence[Group], names: str) -> list[str]:
    """The names that no task's section begins with."""
    sections = [task.section for group in found for task in group]
    wanted = _names(names) or (names,)
    return [name for name in wanted if not any(each.startswith(name) for each in sections)]


def _names(names: str) -> tuple[str, ...]:
    return tuple(name for name in names.split(",") if name)


def _sized(found: Sequence[Group], tiny: bool) -> list[Group]:
    if not tiny:
        return list(found)
    return [tuple(replace(task, options=(*task.options, "--tiny")) for task in group)
            for group in found]  # fmt: skip


def _memory(folder: Path) -> dict[str, str]:
    """Most of the device's memory, with room for captured graphs; one cache of what is compiled."""
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
