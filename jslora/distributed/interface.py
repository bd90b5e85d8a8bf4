"""The address that the leader listens on. Host only: no jax."""

import fcntl
import ipaddress
import socket
import struct

from jslora.distributed.section import DistributedSection
from jslora.errors import ConfigError

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def address_of(section: DistributedSection) -> str:
    """The numeric address of `section.interface`, or of the coordinator's host.

    Raises:
        ConfigError: there is no such interface or host.
    """
    wanted = section.interface or section.leader_host
    try:
        return str(ipaddress.ip_address(wanted))
    except ValueError:
        pass  # it is a name
    if section.interface is not None:
        return _interface_address(wanted)
    try:
        return str(socket.getaddrinfo(wanted, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"distributed.coordinator: {wanted!r} has no address ({error.strerror})"
        ) from None


def _interface_address(name: str) -> str:
    names = [known for _, known in socket.if_nameindex()]
    if name not in names:
        raise ConfigError(
            f"distributed.interface: {name!r} is neither an address nor one of {sorted(names)}"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            found = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            raise ConfigError(f"distributed.interface: {name} has no IPv4 address") from None
    return socket.inet_ntoa(found[20:24])
