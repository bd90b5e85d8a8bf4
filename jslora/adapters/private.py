"""Folders that are the server's own, and files in them that appear whole or not at all.

Host only: no jax.
"""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from jslora.errors import ConfigError

_SUFFIX = ".partial"
_ABANDONED = 3600.0  # seconds after which the writer of a partial file is taken for dead


def private_folder(folder: Path) -> Path:
    """Create `folder` and its parents, for their owner only, and clear what dead writers left.

    Raises:
        ConfigError: it cannot be made, is no folder, is another user's, or others may write to it.
    """
    try:
        for path in reversed([folder, *folder.parents]):
            path.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError as error:
        raise ConfigError(f"cannot create the cache folder {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"the cache folder {folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise ConfigError(f"the cache folder {folder} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"other users may write to the cache folder {folder}")
    _clear_abandoned(folder)
    return folder


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under another name and move it to `path`.

    Raises:
        OSError: it could not be written; nothing is left of it then.
    """
    descriptor, partial = tempfile.mkstemp(_SUFFIX, ".", path.parent)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _clear_abandoned(folder: Path) -> None:
    before = time.time() - _ABANDONED
    for partial in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if partial.lstat().st_mtime < before:
                partial.unlink()
