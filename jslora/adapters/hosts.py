"""What an adapter store asks of the other hosts of a group, and of nobody where it is alone.

Host only: no jax.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Hosts(Protocol):
    """Every method may be called from any thread."""

    def ask(self, folder: Path, root: Path, storage: str) -> Callable[[str], None]:
        """Let all hosts read their copy of a folder below a root, and store it so.

        The answer, called with the digest of the version here, waits until all have, and raises
        AdapterRejected if one could not or has other contents.
        """
        ...

    def agreed(self, digest: str) -> bool:
        """Whether all hosts were found to have these contents."""
        ...

    def forget(self, digest: str) -> None:
        """Nobody asks for these contents any more."""
        ...


class Alone:
    """There are no others."""

    def ask(self, folder: Path, root: Path, storage: str) -> Callable[[str], None]:
        return lambda digest: None

    def agreed(self, digest: str) -> bool:
        return True

    def forget(self, digest: str) -> None:
        pass


ALONE = Alone()
