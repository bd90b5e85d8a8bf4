"""How start-up shows its progress: a bar per stage on a terminal, else a line per tenth.

A `jslora.progress.Progress`: called often, prints seldom, on standard error.
"""

import sys
from typing import TextIO

from tqdm import tqdm


class Bars:
    """Shows one stage at a time; a new stage, or `close`, ends the last one."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._terminal = self._out.isatty()
        self._stage = ""
        self._bar: tqdm | None = None
        self._tenths = -1

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` is reached; 0 means that the total is unknown."""
        if stage != self._stage:
            self.close()
            self._stage = stage
        if self._terminal:
            self._draw(done, total, note)
        else:
            self._print(done, total, note)

    def close(self) -> None:
        """End the current stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._stage, self._tenths = "", -1

    def _draw(self, done: int, total: int, note: str) -> None:
        if self._bar is None:
            large = total >= 2**20  # bytes, most likely
            self._bar = tqdm(
                total=total or None,
                desc=self._stage,
                file=self._out,
                unit="B" if large else "it",
                unit_scale=large,
                leave=True,
            )
        self._bar.total = total or None
        self._bar.set_postfix_str(note[:60], refresh=False)
        self._bar.update(done - self._bar.n)

    def _print(self, done: int, total: int, note: str) -> None:
        tenths = 10 * done // total if total else 0
        if tenths > self._tenths:
            self._tenths = tenths
            share = f"{10 * tenths:3d} %" if total else "  …  "
            print(f"{self._stage}: {share} {note}".rstrip(), file=self._out, flush=True)
