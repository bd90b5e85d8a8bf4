"""Run as `quantised_engine.py DEVICES LORA FOLDER`: fails unless, over virtual devices, adapters
stored as integers answer what the numbers answer that the integers stand for."""

import sys
from pathlib import Path

import numpy as np
from engine_helpers import EVERYTHING, PROMPT, Ask, answers, greedy, small_engine
from goldens.adapters import write_adapter
from split_engine import ARCHITECTURE

from jslora.adapters.layout import pack, unpack
from jslora.adapters.peft import Limits, read_adapter
from jslora.adapters.writer import write_adapter as write_factors
from jslora.model.config import ModelConfig, from_hf
from jslora.split import ONE_DEVICE, Split

STORED = {"eight": "int8", "four": "int4"}


def write_numbers(
    folder: Path, out: Path, model: ModelConfig, storage: str, split: Split = ONE_DEVICE
) -> None:
    """An adapter of the numbers that integers stand for as which `folder` is stored."""
    adapter, page = read_adapter(folder, model, Limits()), split.page_numbers(model, 16)
    packed = pack(adapter, model, page, np.dtype(np.float32), split, storage=storage)
    write_factors(out, unpack(packed, model, split), None)


def main(devices: int, lora: str, folder: Path) -> None:
    model, split = from_hf(ARCHITECTURE), Split(devices, lora == "fully_sharded")
    for seed, (name, storage) in enumerate(STORED.items()):
        write_adapter(folder / name, ARCHITECTURE, EVERYTHING, 5, seed, 1.0, "float32")
        write_numbers(folder / name, folder / f"{name}-numbers", model, storage, split)
    names = [*STORED, *(f"{name}-numbers" for name in STORED), None]
    sections = {
        "model": {"source": "dummy", "architecture": ARCHITECTURE},
        "adapters": {"preload": "all", "storage_of": STORED},
        "mesh": {"model": devices, "lora": lora},
    }
    with small_engine(folder, None, **sections) as engine:
        asks = [Ask(PROMPT, greedy(8, ignore_eos=True), name) for name in names]
        tokens = [answer.tokens for answer in answers(engine, asks)]
    assert tokens[:2] == tokens[2:4], tokens
    assert len({*tokens}) == 3, "each of them changes what is answered"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
