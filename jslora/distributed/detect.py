"""What JAX's own detection says of the group that this process was started in, as JSON.

    python -m jslora.distributed.detect

Prints the keys of the section `distributed`, or null outside a group that Slurm or Open MPI
started. JAX has no public name for what `jax.distributed.initialize` does with its arguments, and
`serve.py` must know them before any process of the group has a reason to import JAX.
"""

import json
from typing import Any

import jax  # noqa: F401 - registers the kinds of clusters
from jax._src.clusters import ClusterEnv

_METHODS = ("slurm", "ompi")
_SECONDS = 60


def detected() -> dict[str, Any] | None:
    """The keys of the section, as far as they were found."""
    for kind in ClusterEnv._cluster_types:
        if kind.name in _METHODS and kind.is_env_present():
            coordinator, processes, process, devices = (
                ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, kind.name, _SECONDS
                )
            )
            return {
                "coordinator": coordinator,
                "num_processes": processes,
                "process_id": process,
                "local_devices": list(devices) if devices is not None else None,
            }
    return None


if __name__ == "__main__":
    print(json.dumps(detected()))
