"""Training measured beside torch + PEFT on the same batches, and beside what products alone take.

Both processes are there all the time and step in turn, so that whatever else the machine does is
shared; medians are of steps after a first one that compiles. On a busy machine a second of CPU time
says more than one on the wall. The floor is the time of the products a step cannot do without,
4 FLOP a parameter and token (forwards, and backwards to the inputs, the head included), at the rate
of one large product measured in between. Host only: no jax.
"""

import contextlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jslora import markdown

COLUMNS = (
    "", "tokens/s", "of the floor", "tokens a CPU second", "peak memory", "last loss",
)  # fmt: skip


class Failed(Exception):
    """A process that was measured ended; the message is what it said."""


@dataclass
class Stepper:
    """A process that answers words with lines of JSON, while it is entered.

    Attributes:
        facts: its first line.
        steps: the answers that count.
    """

    name: str
    command: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)

    def __enter__(self) -> "Stepper":
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self._process.kill()  # all that it had to say is said
        self._process.communicate()

    def speed(self, of: str) -> float:
        """Median of the tokens a second of a kind, "seconds" or "cpu"."""
        return statistics.median(step["tokens"] / step[of] for step in self.steps)

    def ask(self, word: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Failed(f"{self.name} ended with exit code {self._process.wait()}")


def measure(ours: Stepper, theirs: Stepper | None, steps: int) -> str:
    """Run `steps` measured steps of each, and tell the table.

    Raises:
        Failed: one of the processes ended.
    """
    both = [ours] if theirs is None else [ours, theirs]
    rates = []
    with contextlib.ExitStack() as stack:
        for runner in both:  # theirs after ours, which writes the batches
            stack.enter_context(runner)
        for turn in range(steps + 1):
            for runner in both:
                answer = runner.ask("step")
                if turn:
                    runner.steps.append(answer)
            rates.append(ours.ask("rate")["rate"])
        memory = {runner.name: runner.ask("memory")["bytes"] for runner in both}
    return table(ours, theirs, rates, memory)


def table(
    ours: Stepper, theirs: Stepper | None, rates: Sequence[float], memory: dict[str, float]
) -> str:
    """Medians as a Markdown table, with what they were measured on above."""
    floor = statistics.median(rates) / (4 * ours.facts["parameters"])
    lines = [
        f"{ours.facts['model']}, {ours.facts['trained']} trained numbers, "
        f"{ours.facts['batch']}, {len(ours.steps)} steps; products at "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s",
        "",
    ]
    rows = [["products alone (floor)", f"{floor:.0f}", "1", "", "", ""]]
    both = [ours] if theirs is None else [ours, theirs]
    for runner in both:
        speed, size = runner.speed("seconds"), f"{memory[runner.name] / 2**30:.2f} GiB"
        cells = [f"{speed:.0f}", f"{speed / floor:.2f}", f"{runner.speed('cpu'):.0f}"]
        rows.append([runner.name, *cells, size, f"{runner.steps[-1]['loss']:.4f}"])
    lines += markdown.lines(COLUMNS, rows)
    if theirs is not None:
        times, work = (ours.speed(of) / theirs.speed(of) for of in ("seconds", "cpu"))
        lines += ["", f"{times:.2f} times {theirs.name}; {work:.2f} times, a CPU second"]
    return "\n".join(lines)
