"""JSON files of a model folder, read with errors that name them. Host only: no jax."""

import json
from pathlib import Path
from typing import Any

from jslora.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path.name}: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path.name} holds a {type(data).__name__}, not an object")
    return data


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object where there is no such file."""
    return read_json(path) if path.exists() else {}
