"""A folder that appears whole or not at all, and never in the place of another. Host only: no jax.

Work happens in a hidden partial folder beside it, which a rename makes visible. It is locked by who
works there, so two writers of one folder cannot meet; what a killed one left, the next removes.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jslora.errors import ConfigError


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError if something is there already, before any work goes into it."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} exists already; it is left alone")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` if the block ends well.

    Raises:
        ConfigError: something is there already, another process is at it, or it cannot be written.
    """
    refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            try:
                refuse_existing(folder)  # unless whoever held the lock before finished it
                _empty(partial)
                yield partial
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process in a folder that is there and no link.

    Raises:
        ConfigError: another one is.
    """
    descriptor = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {folder.name}") from None
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
