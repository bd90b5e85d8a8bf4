"""jslora: serve thousands of LoRA adapters on one base model, on JAX/XLA.

The letters used in annotations, einsums and comments everywhere:
T tokens in the step · B rows · M pages per row · P pages · S page size · L layers · H hidden ·
N query heads · K kv heads · D head dim · F feed-forward · V vocabulary · R rank · G segments.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jslora.config import EngineConfig as EngineConfig
    from jslora.engine import Engine as Engine
    from jslora.request import SamplingParams as SamplingParams

__all__ = ["Engine", "EngineConfig", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "Engine": "jslora.engine",
    "EngineConfig": "jslora.config",
    "SamplingParams": "jslora.request",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that host-only processes never import jax (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jslora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
