"""Reading files that may be hostile: below a root, regular, bounded, once, and as one snapshot.

A path is resolved first, links included, and must then lie below the resolved root. It is opened
one component at a time without following links, so what was checked is what is opened. Contents are
copied into memory, never mapped: a mapped file that another process truncates kills this one.
A file's identity is taken from the descriptor that its contents were read from, before the first
byte of any of them, and must still be that of its path after the last.
Errors name files inside the folder only, never where the folder is. Host only: no jax.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jslora.errors import AdapterRejected

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe opens at once instead of waiting for a writer, and is then refused as no regular file.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Identity(NamedTuple):
    """What changes when a file is written or replaced, as far as its system's clock tells."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def resolve_below(root: Path, path: Path) -> Path | None:
    """`path` with links resolved, or None where that is not strictly below `root`."""
    top, real = os.path.realpath(root), os.path.realpath(path)
    return Path(real) if real.startswith(os.path.join(top, "")) else None


class OpenFile:
    """A file of a snapshot: regular, and never read beyond the size it had when it was opened."""

    def __init__(self, name: str, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterRejected(f"{name} is not a regular file")
        self.name = name
        self.identity = _identity(status)
        self._descriptor = descriptor

    def check_size(self, limit: int) -> None:
        size = self.identity.size
        if size > limit:
            raise AdapterRejected(f"{self.name} has {size} bytes; at most {limit} are read")

    def read(self, limit: int) -> bytes:
        """The whole file, of at most `limit` bytes."""
        self.check_size(limit)
        return self.read_start(self.identity.size)

    def read_start(self, size: int) -> bytes:
        """The first `size` bytes, or all there are."""
        try:
            with open(self._descriptor, "rb", closefd=False) as file:
                file.seek(0)
                return file.read(min(size, self.identity.size))
        except OSError as error:
            raise AdapterRejected(f"{self.name} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def snapshot(root: Path, folder: Path, names: Sequence[str]) -> Iterator[list[OpenFile]]:
    """The files `names` of `folder`, open for reading.

    Raises:
        AdapterRejected: a file is missing, leads out of `root`, is no regular file, or, when the
            block was left, has changed since it was entered.
    """
    with contextlib.ExitStack() as stack:
        files = [_open_file(stack, root, folder / name) for name in names]
        yield files
        for file in files:
            if _open_file(stack, root, folder / file.name).identity != file.identity:
                raise AdapterRejected(f"{file.name} changed while it was read")


def identities(folder: Path, names: Sequence[str]) -> tuple[Identity, ...] | None:
    """What the files are now, or None if one is missing; nothing is opened or checked."""
    try:
        return tuple(_identity(os.stat(folder / name)) for name in names)
    except (OSError, ValueError):
        return None


def _open_file(stack: contextlib.ExitStack, root: Path, path: Path) -> OpenFile:
    descriptor = _open(root, path)
    stack.callback(os.close, descriptor)
    return OpenFile(path.name, descriptor)


def _open(root: Path, path: Path) -> int:
    """Open a file below `root` without following a link that appeared after it was resolved."""
    top = os.path.realpath(root)
    real = resolve_below(root, path)
    if real is None:
        raise AdapterRejected(f"{path.name} is a link that leads outside the adapter roots")
    *folders, name = os.path.relpath(real, top).split(os.sep)
    try:
        descriptor = os.open(top, _DIRECTORY)
        for folder in folders:
            descriptor = _step(descriptor, folder, _DIRECTORY)
        return _step(descriptor, name, _FILE)
    except FileNotFoundError:
        there = path.parent.is_dir()
        told = f"the folder holds no {path.name}" if there else "there is no such folder"
        raise AdapterRejected(told) from None
    except OSError as error:
        raise AdapterRejected(f"{path.name} cannot be opened: {error.strerror}") from None


def _step(directory: int, name: str, flags: int) -> int:
    """Open `name` in `directory`, which is closed."""
    try:
        return os.open(name, flags, dir_fd=directory)
    finally:
        os.close(directory)


def _identity(status: os.stat_result) -> Identity:
    return Identity(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )
