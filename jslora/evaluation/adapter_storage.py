"""What adapters save that are stored as integers, and what that changes.

For each adapter and storage: its bytes in each tier beside those stored in full; the error of its
outputs, as its bind report has it; and how often it holds the same token for the likeliest as the
adapter in full does, at every place of what that one answers greedily (`compare`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jslora.adapters.layout import lay_out
from jslora.adapters.peft import Limits, read_outline
from jslora.config import EngineConfig
from jslora.engine import Engine
from jslora.evaluation.compare import (
    Side,
    compare,
    comparison_config,
    room,
    summary,
    tokenized,
)
from jslora.fetch import load_config, resolve
from jslora.progress import silent
from jslora.request import AdapterInfo
from jslora.split import ONE_DEVICE
from jslora.tokenizer import Tokenizer
from pallas_kernels.lora.pieces import STORAGES

QUESTIONS = (
    "Tell me about the sea.", "What is bread?", "Why does it rain?", "Describe your best friend.",
    "What do cats eat?", "How far away is the sun?", "Who was Albert Einstein?",
    "Give me three tips for a job interview.", "What is 7 times 8?", "Write a poem about a train.",
)  # fmt: skip
"""Asked of each adapter as chats."""

TIERS = ("bytes_disk", "bytes_host", "bytes_device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An adapter in a storage, and in full.

    Attributes:
        used: words that hold something, as a share of those in full.
        numbers: see `compare.summary`.
    """

    name: str
    storage: str
    used: float
    info: AdapterInfo
    full: AdapterInfo
    numbers: dict[str, Any]


class _Measured:
    """The model, and what is asked of adapters.

    Raises:
        JsloraError: the model cannot be had.
    """

    def __init__(self, config: EngineConfig, tokens: int) -> None:
        self._config, self._tokens = config, tokens
        self._folder = resolve(config.model.source, config.cache_dir, silent)
        self._model = load_config(self._folder)
        chats: list[tuple[dict[str, Any], ...]] = [
            ({"role": "user", "content": asked},) for asked in QUESTIONS
        ]
        self._prompts = tokenized(Tokenizer(self._folder), chats)

    def storage(self, storage: str, folders: Sequence[Path]) -> Iterator[Kept]:
        """Adapters below one folder, stored so.

        Raises:
            JsloraError: one cannot be served.
        """
        config, length = self._config, room(self._model, self._prompts, self._tokens)
        right = Side(folders[0], storage)
        compared = comparison_config(
            self._folder, config.model.dtype, Side(folders[0]), right, length, config.cache_dir
        )
        with Engine(compared) as engine:
            for folder in folders:
                left, right = Side(folder), Side(folder, storage)
                answers = compare(engine, left, right, self._prompts, self._tokens)
                infos = {info.name: info for info in engine.adapters()}
                yield Kept(
                    name=folder.name,
                    storage=storage,
                    used=self._words(folder, storage) / self._words(folder, "full"),
                    info=infos["right"],
                    full=infos["left"],
                    numbers=summary(answers),
                )

    def _words(self, folder: Path, storage: str) -> float:
        """Pages that an adapter would take, were the last one of each layer not padded."""
        outline = read_outline(folder, self._model, Limits())
        page = ONE_DEVICE.page_numbers(self._model, self._config.pool.page_size)
        bits = 8 * self._config.model.item_bytes
        layout = lay_out(outline.rank, outline.scale, self._model, page, ONE_DEVICE, storage, bits)
        return layout.n_pages * (1 - layout.padding)


def measure(config: EngineConfig, folders: Sequence[Path], tokens: int) -> Iterator[Kept]:
    """All storages but "full" of some adapters below one folder.

    Raises:
        JsloraError: the model or an adapter cannot be served.
    """
    measured = _Measured(config, tokens)
    for storage in STORAGES[1:]:
        yield from measured.storage(storage, folders)


COLUMNS = (
    "adapter", "storage", "disk", "host", "device", "without padding", "output error",
    "agreement", "mean KL",
)  # fmt: skip
"""Of the table; bytes are shares of the adapter's in full."""


def cells(one: Kept) -> tuple[str, ...]:
    """A row of the table."""
    tiers = [(getattr(one.info, tier), getattr(one.full, tier)) for tier in TIERS]
    shares = [f"{part / full:.3f}" if full else "-" for part, full in tiers]
    agreement = f"{one.numbers['agreement']:.2%} of {one.numbers['tokens']}"
    error, kl = f"{one.info.output_error or 0:.2%}", f"{one.numbers['kl_mean']:.4f}"
    return one.name, one.storage, *shares, f"{one.used:.3f}", error, agreement, kl
