"""A roomy and a tight engine over one golden model; a plugin, because two modules use them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_helpers import (
    CONFIG,
    EVERYTHING,
    LLAMA3,
    assert_nothing_leaked,
    small_engine,
    tight_engine,
    wait_until,
)
from goldens.adapters import write_adapter

from jslora.engine import Engine


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter root of all engines here: the goldens', and four drawn contents of 9 pages."""
    tmp = tmp_path_factory.mktemp("engine")
    shutil.copytree(LLAMA3 / "adapters", tmp, dirs_exist_ok=True)
    for i in range(4):
        write_adapter(tmp / f"wide-{i}", CONFIG, EVERYTHING, 16, i, 0.3, "float32")
    return tmp


@pytest.fixture(scope="module")
def engine(tmp: Path) -> Iterator[Engine]:
    """Pages for everything."""
    with small_engine(tmp, LLAMA3 / "model", adapters={"preload": "all"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_tight(tmp: Path) -> Iterator[Engine]:
    with tight_engine(tmp) as engine:
        yield engine


@pytest.fixture
def tight(shared_tight: Engine) -> Iterator[Engine]:
    """A tight engine without adapters; a test leaves every page free."""
    yield shared_tight
    for name in shared_tight.core.store.names():
        shared_tight.unload_adapter(name)
    wait_until(lambda: shared_tight.stats().pages_free == shared_tight.stats().pages_total)
    assert_nothing_leaked(shared_tight)
