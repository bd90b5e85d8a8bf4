"""Adapters that the writer is tried with, for a tiny model of twelve layers.

PEFT cannot be asked in the test environment, so it was asked once about folders the writer made:

    PYTHONPATH=.:tests/adapters python -m written_cases        # writes goldens/written/
    python tests/adapters/goldens/make_written.py              # asks PEFT; see there
"""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from jslora.adapters.peft import Factors
from jslora.adapters.writer import write_adapter
from jslora.model.config import MODULES, from_hf

WRITTEN = Path(__file__).parent / "goldens" / "written"
MODEL = from_hf(json.loads((WRITTEN / "model.json").read_text()))

Target = tuple[int, str]


def factors_of(
    ranks: dict[Target, int], scales: dict[Target, float], dtype: type = np.float32, seed: int = 0
) -> dict[Target, Factors]:
    """Normal factors of these ranks and scales."""
    random = np.random.default_rng(seed)
    made = {}
    for target, rank in ranks.items():
        wide_in, wide_out = MODEL.widths(target[1])
        a, b = random.normal(size=(rank, wide_in)), random.normal(size=(wide_out, rank))
        made[target] = Factors(a.astype(dtype), b.astype(dtype), np.float32(scales[target]))
    return made


def _cases() -> dict[str, tuple[dict[Target, Factors], bool, np.dtype | None]]:
    """Factors, whether their scales are said as rsLoRA, and the dtype they are cast to."""
    every = [(layer, module) for layer in range(MODEL.layers) for module in MODULES]
    layers = [(layer, m) for layer in (1, 3, 11) for m in ("o_proj", "gate_proj")]
    scattered = [t for i, t in enumerate(every) if i % 3 != 1]
    return {
        "plain": (
            factors_of(
                dict.fromkeys([t for t in every if t[1] in ("q_proj", "v_proj")], 2),
                dict.fromkeys(every, 2.0),
            ),
            False,
            None,
        ),
        "layers": (
            factors_of(dict.fromkeys(layers, 3), dict.fromkeys(layers, 1 / 3), seed=1),
            False,
            np.dtype(np.float16),
        ),
        "scattered": (
            factors_of(
                {(n, m): 3 if n == 1 else 1 + (n == 11) for n, m in scattered},
                {(n, m): 0.7 if m == "k_proj" else 1 + n % 2 for n, m in scattered},
                ml_dtypes.bfloat16,
                seed=2,
            ),
            False,
            None,
        ),
        "rslora": (
            factors_of(
                {(n, m): 1 + MODULES.index(m) for n, m in every},
                {(n, m): 0.1 + n / 7 for n, m in every},
                ml_dtypes.bfloat16,
                seed=3,
            ),
            True,
            None,
        ),
    }


CASES = _cases()

if __name__ == "__main__":
    for name, (factors, rslora, dtype) in CASES.items():
        shutil.rmtree(WRITTEN / name, ignore_errors=True)
        write_adapter(WRITTEN / name, factors, "tiny", rslora=rslora, dtype=dtype)
