"""Fixtures of the adapter tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import Stores


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Stores that remember folders however lately they were written."""
    monkeypatch.setattr("jslora.adapters.known.SETTLED_SECONDS", -60.0)
    made = Stores(tmp_path)
    yield made
    made.close()
