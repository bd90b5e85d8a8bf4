"""The adapter roots: which folders below them may be opened, by which names. Host only: no jax."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jslora.adapters.files import resolve_below
from jslora.adapters.peft import CONFIG
from jslora.config import NAME
from jslora.errors import AdapterRejected
from jslora.logs import printable

MAX_PATH = 4096

log = logging.getLogger(__name__)


class Roots:
    """Folders that adapters are read from; nothing outside them opens, and earlier ones win."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def discover(self, taken: str) -> dict[str, Path]:
        """Name → folder of every adapter directly below a root, by name; `taken` is none."""
        found: dict[str, Path] = {}
        for name, folder in self._candidates():
            if name == taken or not re.fullmatch(NAME, name):
                log.warning("adapter folder %s is skipped: not a usable name", printable(name))
            elif name in found:
                log.warning("adapter %s is skipped in a later root: the name is taken", name)
            else:
                found[name] = folder
        return dict(sorted(found.items()))

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        for root in self._roots:
            try:
                names = sorted(os.listdir(root))
            except OSError as error:
                log.warning("adapter root %s cannot be listed: %s", root, error.strerror)
                continue
            for name in names:
                folder = resolve_below(root, root / name)
                if folder and os.path.isfile(folder / CONFIG) and not name.startswith("."):
                    yield name, folder

    def locate(self, path: str) -> tuple[Path, Path]:
        """(folder, its root) of a path relative to the roots or absolute, links resolved.

        Raises:
            AdapterRejected: one error for what is absent and what is forbidden.
        """
        found = None
        if 0 < len(path) <= MAX_PATH and path.isprintable() and ".." not in Path(path).parts:
            found = self._below_roots(path)
        if found is None:
            raise AdapterRejected(
                f"{printable(path)!r} is no adapter folder below the adapter roots", param="path"
            )
        return found

    def _below_roots(self, path: str) -> tuple[Path, Path] | None:
        for root in self._roots:
            folder = resolve_below(root, root / path)
            if folder is not None and os.path.isfile(folder / CONFIG):
                return folder, root
        return None
