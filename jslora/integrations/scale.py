"""How many replicas an application has, and what is set aside for each. Host only: no jax."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jslora.errors import ConfigError


class Scale(BaseModel):
    """A fixed number of replicas, or bounds for a number that follows the load.

    Attributes:
        target_requests: how many a replica is to have; by default, as many as run at once.
        cpus, gpus: what Ray sets aside for a replica; `gpus` is `mesh.model`, or 0 on CPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_requests: float | None = Field(default=None, gt=0)
    cpus: float = Field(default=1, ge=0)
    gpus: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Scale":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


def check_gpus(scale: Scale, devices: int) -> None:
    """A replica's processes see the GPUs that Ray gives them, and no others.

    Args:
        devices: that a replica's mesh has.

    Raises:
        ConfigError: it would be given more or fewer.
    """
    if scale.gpus not in (0, devices):
        raise ConfigError(
            f"gpus is {scale.gpus}: must be mesh.model, which is {devices}, or 0 on CPUs"
        )
