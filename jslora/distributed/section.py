"""The section `distributed`: one replica as a group of processes, of which number 0 leads.

Host only: no jax.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field, SecretStr, model_validator

from jslora.errors import ConfigError
from jslora.section import STRICT, Positive

COORDINATOR_PORT = 8476
"""Where no coordinator is given but its host is known from the environment."""

LEAST_TOKEN = 16
"""Characters of the shortest token that is accepted."""

EXIT_CODE = 5
"""Of a process whose group has ended before it was told to stop."""

PULSE_SECONDS = 1.0
"""Between two signs of life that a follower gives the `serve.py` that started it."""

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


def _home(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is not such an address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{address!r} is no address; write host:port")
    return match["host"].strip("[]"), int(match["port"])


class DistributedSection(BaseModel):
    """Which processes make up the group, how they meet, and when one counts as lost.

    Attributes:
        coordinator: host:port on the leader's host, where JAX's coordination service listens.
        auto: take the coordinator, the number of processes and this one's from Kubernetes
            LeaderWorkerSet, Slurm or Open MPI, where `serve.py` finds them.
        local_devices: this process's devices, where several processes share a host.
        control_port: of the leader's control channel.
        interface: address, or name of the network interface, that the leader listens on; by
            default the address of the coordinator's host.
        token: what all processes know and nobody else; or in a file, `token_file`.
        heartbeat_seconds: a process that is silent for so long is lost.
        step_seconds: so is the group if a step takes longer.
        digest_every: steps between two comparisons of the tokens that the processes sampled.
    """

    model_config = STRICT

    coordinator: str | None = None
    num_processes: Annotated[int, Field(ge=1, le=1024)] = 1
    process_id: Annotated[int, Field(ge=0)] = 0
    auto: bool = False
    local_devices: list[Annotated[int, Field(ge=0)]] | None = None
    control_port: Annotated[int, Field(gt=0, le=65535)] = 8477
    interface: str | None = None
    token: SecretStr | None = None
    token_file: Annotated[Path, BeforeValidator(_home)] | None = None
    heartbeat_seconds: Annotated[float, Field(ge=0.5, le=600)] = 10
    step_seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    digest_every: Positive = 16

    @model_validator(mode="after")
    def _check(self) -> "DistributedSection":
        if self.process_id >= self.num_processes and not self.auto:
            raise ValueError(
                f"process_id is {self.process_id}; with {self.num_processes} processes it is "
                f"at most {self.num_processes - 1}"
            )
        if self.coordinator is not None:
            _, port = split_address(self.coordinator)
            if port == self.control_port:
                raise ValueError(f"coordinator and control_port are both on port {port}")
        elif self.num_processes > 1:
            raise ValueError("coordinator is required: host:port on the leader's host")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are two ways to say one thing; give one")
        if self.num_processes > 1 and self.token is None and self.token_file is None:
            raise ValueError("token (or token_file) is required: a secret that all processes share")
        if self.token is not None and len(self.token.get_secret_value().strip()) < LEAST_TOKEN:
            raise ValueError(f"token is too short; {LEAST_TOKEN} characters are the least")
        return self

    @property
    def leader_host(self) -> str:
        assert self.coordinator is not None, "a group without a coordinator was accepted"
        return split_address(self.coordinator)[0]

    def secret(self) -> bytes:
        """The token, read from its file if it is in one.

        Raises:
            ConfigError: the file cannot be read, or holds too little.
        """
        if self.token is not None:
            return self.token.get_secret_value().strip().encode()
        assert self.token_file is not None, "a group without a token was accepted"
        try:
            token = self.token_file.read_bytes()[:4096].strip()
        except OSError as error:
            raise ConfigError(
                f"distributed.token_file {self.token_file} cannot be read: {error.strerror}"
            ) from None
        if len(token) < LEAST_TOKEN:
            raise ConfigError(
                f"distributed.token_file {self.token_file} holds {len(token)} bytes; "
                f"{LEAST_TOKEN} are the least"
            )
        return token
