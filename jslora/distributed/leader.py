"""The leader's end of a group, from the first connection to a `Group` of devices."""

import threading
from collections.abc import Callable
from pathlib import Path

from jslora.config import EngineConfig
from jslora.device import Device
from jslora.distributed import launch, messages
from jslora.distributed.agreement import agreement
from jslora.distributed.group import Group
from jslora.distributed.hosts import AllHosts
from jslora.distributed.links import Links


class Leader:
    """Gathers the followers and joins JAX's group with them.

    Args:
        lost: called from any thread with the reason for which the group has ended; afterwards
            the process is of no use but to tell so.

    Attributes:
        hosts: for the adapter store.

    Raises:
        ConfigError, ModelError: the configuration or the model's files are wrong.
    """

    def __init__(
        self, config: EngineConfig, folder: Path | None, lost: Callable[[str], None]
    ) -> None:
        self._section = config.distributed
        self._links = Links(self._section, agreement(config, folder), lost)
        self.hosts = AllHosts(self._links, config.adapters.roots)
        self._changed = threading.Condition()
        self._available: dict[int, int] = {}
        self._links.on(messages.Memory, self._hear_memory)
        self._links.gather()
        launch.join(self._section)

    def agree(self, available: int) -> int:
        """Bytes of device memory that every process has, so that all plan alike.

        Raises:
            EngineFailed: the group has ended.
        """
        with self._changed:
            while len(self._available) < len(self._links.followers):
                self._changed.wait(0.2)
                self._links.check()
            available = min(available, *self._available.values())
        self._links.send(messages.Agreed(available))
        return available

    def group(self, device: Device) -> Group:
        """The devices of all processes."""
        return Group(device, self._links, self.hosts, self._section, launch.leave)

    def _hear_memory(self, process: int, answer: messages.Memory) -> None:
        with self._changed:
            self._available[process] = answer.available
            self._changed.notify_all()
