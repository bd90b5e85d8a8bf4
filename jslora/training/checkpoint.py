"""States of a run on the disk, from which it goes on as if it had not been stopped.

A checkpoint appears whole or not at all, so one that was being written when the process was killed
is not there. It is gone on from only by a run of the same configuration, as far as that decides
what comes next.
"""

import json
from pathlib import Path
from typing import Any

import jax
from orbax import checkpoint as orbax

from jslora.errors import ConfigError
from jslora.training.trainer import State

_FACTS = "run.json"


class Checkpoints:
    """The newest `keep` states of the run in `folder`.

    Args:
        fingerprint: of the configuration.

    Raises:
        ConfigError: the folder holds states of another run, or cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int) -> None:
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check(fingerprint)
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error}") from None
        options = orbax.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=False
        )
        self._manager = orbax.CheckpointManager(self.folder, options=options)

    def _check(self, fingerprint: str) -> None:
        facts = self.folder / _FACTS
        if facts.exists():
            if json.loads(facts.read_text()).get("fingerprint") != fingerprint:
                raise ConfigError(
                    f"{self.folder} holds checkpoints of a run with another configuration, "
                    "other data or another base; give these back, choose another `out`, or remove "
                    "that folder"
                )
            return
        partial = facts.with_suffix(".partial")
        partial.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        partial.rename(facts)

    @property
    def step(self) -> int:
        """Steps done at the newest checkpoint, 0 if there is none."""
        return self._manager.latest_step() or 0

    def newest(self, like: State) -> State | None:
        """The last state that was kept; None if there is none.

        Args:
            like: any state of the run, which says where its arrays lie.
        """
        if not self.step:
            return None
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _arrays(like)
        )
        found = self._manager.restore(self.step, args=orbax.args.StandardRestore(wanted))
        return State(self.step, found["trained"], found["optimiser"])

    def save(self, state: State) -> None:
        """Keep a state; what is over `keep` goes."""
        self._manager.save(state.step, args=orbax.args.StandardSave(_arrays(state)))
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _arrays(state: State) -> dict[str, Any]:
    return {"trained": state.trained, "optimiser": state.optimiser}
