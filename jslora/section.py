"""What all sections of the configuration share: how strict they are, and what names look like.

Host only: no jax.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
"""No unknown keys, no change after validation."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Names of models, adapters, aliases and tenants."""

Positive = Annotated[int, Field(gt=0)]
