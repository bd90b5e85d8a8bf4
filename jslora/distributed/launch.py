"""Joining and leaving JAX's own group of processes, as the configuration says and nothing else."""

import jax

from jslora.distributed.interface import address_of
from jslora.distributed.section import DistributedSection, split_address

GRACE = 4
"""JAX ends a process so many times later than we do; it is the second to notice a loss."""

LEAVE_SECONDS = 10


def join(section: DistributedSection) -> None:
    """Become one of the processes; returns when all are there.

    Collectives on CPUs go by Gloo over TCP. The coordination service has no authentication of its
    own, so it is bound to the one address that the control channel is bound to.
    """
    assert section.coordinator is not None, "a group without a coordinator was accepted"
    bind = None
    if section.process_id == 0:
        address, (_, port) = address_of(section), split_address(section.coordinator)
        bind = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=section.coordinator,
        num_processes=section.num_processes,
        process_id=section.process_id,
        local_device_ids=section.local_devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind,
        heartbeat_timeout_seconds=max(10, round(GRACE * section.heartbeat_seconds)),
        shutdown_timeout_seconds=LEAVE_SECONDS,
    )


def leave() -> None:
    """Part from the others, who leave too."""
    jax.distributed.shutdown()
