"""Which ways of storing adapters a configuration has, and whether a model's rows allow them.

Host only: no jax.
"""

from collections.abc import Callable

from jslora.config import AdaptersSection
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig
from jslora.split import Split
from pallas_kernels.lora.pieces import STORAGES, column_block, row_words


def storages(section: AdaptersSection) -> tuple[str, ...]:
    """Those that adapters may have, in the order of `pieces.STORAGES`.

    The programs are compiled for them, and an adapter's name decides between them.
    """
    used = {section.storage, *section.storage_of.values()}
    return tuple(storage for storage in STORAGES if storage in used)


def check_rows(section: AdaptersSection, model: ModelConfig, split: Split, word_bits: int) -> None:
    """See that rows are whole words.

    Raises:
        ConfigError: those of a module are not; names it, their width and the storage.
    """
    _each_row(section, model, split, lambda row, storage: row_words(row, storage, word_bits))


def check_blocks(
    section: AdaptersSection, model: ModelConfig, split: Split, word_bits: int, page: int
) -> None:
    """See that kernels that read columns in blocks can read rows of integers.

    Args:
        page: words in a page of one layer on one device.

    Raises:
        ConfigError: as `check_rows`.
    """
    _each_row(
        section, model, split,
        lambda row, storage: column_block((row_words(row, storage, word_bits),), page, limit=16),
    )  # fmt: skip


def _each_row(
    section: AdaptersSection, model: ModelConfig, split: Split, check: Callable[[int, str], int]
) -> None:
    for storage in storages(section):
        if storage == "full":
            continue
        for module in MODULES:
            for row in split.rows(model, module):
                try:
                    check(row, storage)
                except NotImplementedError as error:
                    raise ConfigError(
                        f"adapters.storage: {storage} cannot be had for {module}, of whose rows "
                        f"one device has {row} numbers: {error}"
                    ) from None
