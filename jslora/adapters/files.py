"""Reading files that may be hostile: below a root, regular, bounded, once, and as one snapshot.

A path is resolved first, links included, and must then lie below the resolved root. It is opened
one component at a time without following links, so what was checked is what is opened. Contents are
copied into memory, never mapped: a mapped file that another process truncates kills this one.
Errors name files inside the folder only, never where the folder is. Host only: no jax.
"""

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from jslora.errors import AdapterRejected

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe opens at once instead of waiting for a writer, and is then refused as no regular file.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def resolve_below(root: Path, path: Path) -> Path | None:
    """`path` with links resolved, or None where that is not strictly below `root`."""
    top, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    return real if top in real.parents else None


def read_files(root: Path, folder: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Read the files named by `limits` out of `folder`, each at most so many bytes.

    Raises:
        AdapterRejected: a file is missing, leads out of `root`, is no regular file, is too large,
            or changed before all of them were read.
    """
    with contextlib.ExitStack() as stack:
        opened = {}
        for name in limits:
            opened[name] = _open(root, folder / name)
            stack.callback(os.close, opened[name])
        before = {name: _identity(descriptor) for name, descriptor in opened.items()}
        contents = {name: _read(opened[name], name, limit) for name, limit in limits.items()}
        for name in limits:
            again = _open(root, folder / name)
            stack.callback(os.close, again)
            if _identity(again) != before[name]:
                raise AdapterRejected(f"{name} changed while it was read")
    return contents


def _open(root: Path, path: Path) -> int:
    """Open a file below `root` without following a link that appeared after it was resolved."""
    real = resolve_below(root, path)
    if real is None:
        raise AdapterRejected(f"{path.name} is a link that leads outside the adapter roots")
    top = Path(os.path.realpath(root))
    try:
        descriptor = os.open(top, _DIRECTORY)
        for part in real.relative_to(top).parent.parts:
            descriptor = _step(descriptor, part, _DIRECTORY)
        return _step(descriptor, real.name, _FILE)
    except FileNotFoundError:
        raise AdapterRejected(f"the folder holds no {path.name}") from None
    except OSError as error:
        raise AdapterRejected(f"{path.name} cannot be opened: {error.strerror}") from None


def _step(directory: int, name: str, flags: int) -> int:
    """Open `name` in `directory`, which is closed."""
    try:
        return os.open(name, flags, dir_fd=directory)
    finally:
        os.close(directory)


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


def _read(descriptor: int, name: str, limit: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise AdapterRejected(f"{name} is not a regular file")
    if status.st_size > limit:
        raise AdapterRejected(f"{name} has {status.st_size} bytes; at most {limit} are read")
    try:
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise AdapterRejected(f"{name} cannot be read: {error.strerror}") from None
