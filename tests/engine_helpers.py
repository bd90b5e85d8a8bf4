"""Small engines for tests: any golden or random model in float32, ledger checked at every step."""

from pathlib import Path
from typing import Any

from jslora.engine import Engine


def small_engine(tmp: Path, model: Path | None, **sections: Any) -> Engine:
    """An engine over a golden model's folder, with adapters below `tmp`."""
    config: dict[str, Any] = {
        "cache_dir": str(tmp / "cache"),
        "model": {"source": str(model), "dtype": "float32"} | sections.pop("model", {}),
        "pool": {"pages": 256} | sections.pop("pool", {}),
        "adapters": {"roots": [str(tmp)], "preload": "none", "max_rank": 64}
        | sections.pop("adapters", {}),
        "scheduler": {"max_running": 8, "max_step_tokens": 32} | sections.pop("scheduler", {}),
    }
    return Engine(config | sections, check_ledger=True)
