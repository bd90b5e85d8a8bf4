"""Converted weights on disk, so that a restart reads its own part of them and nothing else.

Each process of a group keeps what its own devices hold as an Orbax checkpoint, without the others:
hosts need share no disk, and none waits for another. A checkpoint is named after all that it
depends on, appears whole or not at all, and is made again when it cannot be read; a disk without
room for it is no error.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jslora.adapters.private import private_folder
from jslora.sharding import lies

LAYOUT = 2
"""Number of the rules by which leaves are made of files; to be raised with them."""

_CONCURRENT_GB = 2  # in host memory at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a model's leaves that this process's devices hold.

    Attributes:
        folder: holds all checkpoints; made if it is absent.
        facts: what the leaves depend on beside the mesh and their types: files, model.
        leaves: the whole, abstract; each with its split in `specs`.
    """

    folder: Path
    facts: list[Any]
    mesh: Mesh
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    specs: Mapping[str, PartitionSpec]
    process: int = field(default_factory=jax.process_index)

    @cached_property
    def path(self) -> Path:
        shapes = [[name, leaf.shape, str(leaf.dtype)] for name, leaf in self.leaves.items()]
        splits = [str(spec) for spec in self.specs.values()]
        text = json.dumps([LAYOUT, self.facts, self.mesh.size, self._own, shapes, splits])
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    def restore(self) -> dict[str, jax.Array] | None:
        """The leaves, or None if there is no sound checkpoint of them."""
        from orbax import checkpoint as orbax

        if not self.path.exists():
            return None
        wanted = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=lies(self.mesh, self.specs[name])
            )
            for name, leaf in self.leaves.items()
        }
        how = orbax.checkpoint_utils.construct_restore_args(wanted)
        try:
            with self._checkpointer() as checkpointer:
                return checkpointer.restore(
                    self.path, args=orbax.args.PyTreeRestore(item=wanted, restore_args=how)
                )
        except Exception as error:  # of any kind: the files may hold anything
            log.warning("a checkpoint of weights cannot be read and is made again: %s", error)
            shutil.rmtree(self.path, ignore_errors=True)
            return None

    def save(self, weights: Mapping[str, jax.Array]) -> None:
        """Keep the leaves, if there is room for them."""
        from orbax import checkpoint as orbax

        private_folder(self.folder)
        needed = sum(x.addressable_shards[0].data.nbytes for x in weights.values()) * len(self._own)
        if shutil.disk_usage(self.folder).free < 2 * needed:
            log.warning("no room to keep %d bytes of converted weights", needed)
            return
        try:
            with self._checkpointer() as checkpointer:
                checkpointer.save(self.path, args=orbax.args.PyTreeSave(dict(weights)))
        except OSError as error:
            log.warning("converted weights cannot be kept: %s", error)
            shutil.rmtree(self.path, ignore_errors=True)

    @cached_property
    def _own(self) -> list[int]:
        """Positions in the mesh of this process's devices."""
        devices = enumerate(self.mesh.devices.flat)
        return [i for i, device in devices if device.process_index == self.process]

    def _checkpointer(self) -> Any:
        """One that talks to no other process."""
        from orbax import checkpoint as orbax

        alone = orbax.options.MultiprocessingOptions(
            primary_host=self.process, active_processes={self.process},
            barrier_sync_key_prefix=f"weights-{self.process}",
        )  # fmt: skip
        # Of what several devices have, each process keeps one copy, not the first process alone.
        arrays = orbax.type_handlers.ArrayHandler(
            primary_host=self.process, replica_id=None, use_replica_parallel=False
        )
        handler = orbax.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, multiprocessing_options=alone,
            save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB,
            type_handler_registry=orbax.type_handlers.create_type_handler_registry(
                (jax.Array, arrays)
            ),
        )  # fmt: skip
        return orbax.Checkpointer(handler, multiprocessing_options=alone)


def file_facts(folder: Path) -> list[list[Any]]:
    """What changes when one of a model's files is written or replaced."""
    found = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        status = path.stat()
        found.append([
            path.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
            status.st_ctime_ns,
        ])  # fmt: skip
    return found
