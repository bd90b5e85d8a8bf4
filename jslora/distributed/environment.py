"""Which process of a group this is, from what launchers leave in the environment.

Read once, where a program starts, and turned into overrides of the configuration like those of the
command line. LeaderWorkerSet's three variables are mapped here; Slurm and Open MPI are left to JAX,
in a child process, because a front end does not import it. Host only: no jax.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping

from jslora.distributed.section import COORDINATOR_PORT
from jslora.errors import ConfigError

_LWS = {
    "coordinator": "LWS_LEADER_ADDRESS",
    "num_processes": "LWS_GROUP_SIZE",
    "process_id": "LWS_WORKER_INDEX",
}
_SECONDS = 120


def overrides(environment: Mapping[str, str], given: Collection[str]) -> list[str]:
    """`distributed.key=value` for all that the environment tells and the configuration does not.

    Args:
        given: keys of the section that the configuration has; they win.

    Raises:
        ConfigError: it tells of no group, or not all of it.
    """
    if any(name in environment for name in _LWS.values()):
        found = _from_lws(environment)
    else:
        found = _from_jax(environment)
    return [f"distributed.{key}={json.dumps(found[key])}" for key in found if key not in given]


def _from_lws(environment: Mapping[str, str]) -> dict[str, object]:
    missing = [name for name in _LWS.values() if not environment.get(name)]
    if missing:
        raise ConfigError(f"distributed.auto: the environment variable {missing[0]} is not set")
    address, *numbers = (environment[name] for name in _LWS.values())
    for name, number in zip(list(_LWS.values())[1:], numbers, strict=True):
        if not number.isdecimal():
            raise ConfigError(f"distributed.auto: {name} is {number!r}, not a number")
    if ":" in address:  # an IPv6 address
        address = f"[{address}]"
    size, index = map(int, numbers)
    coordinator = f"{address}:{COORDINATOR_PORT}"
    return {"coordinator": coordinator, "num_processes": size, "process_id": index}


def _from_jax(environment: Mapping[str, str]) -> dict[str, object]:
    command = [sys.executable, "-m", "jslora.distributed.detect"]
    try:
        child = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"distributed.auto: detection took over {_SECONDS} s") from None
    if child.returncode != 0:
        last = child.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"distributed.auto: the launcher's environment is not usable: {last}")
    found = json.loads(child.stdout)
    if found is None:
        raise ConfigError(
            "distributed.auto: neither LeaderWorkerSet (LWS_LEADER_ADDRESS), Slurm nor Open MPI "
            "started this process; set distributed.coordinator, num_processes and process_id"
        )
    return dict(found)
