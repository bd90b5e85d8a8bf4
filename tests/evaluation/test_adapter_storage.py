"""The table of what adapters stored as integers save and change, and its command's errors."""

from dataclasses import replace
from pathlib import Path

import pytest

from jslora.evaluation.adapter_storage import COLUMNS, Kept, cells
from jslora.request import AdapterInfo
from scripts.adapter_storage import main

FULL = AdapterInfo(
    name="left", digest="", state="device", rank=8, modules={}, layers=1, bytes=900,
    bytes_disk=1000, bytes_host=0, bytes_device=2000,
)  # fmt: skip


def test_a_row_has_shares_of_the_bytes_in_full() -> None:
    info = replace(FULL, bytes_disk=500, bytes_device=1040, output_error=0.0066)
    numbers = {"agreement": 0.975, "tokens": 160, "kl_mean": 0.00042}
    row = cells(Kept(name="a", storage="int8", used=0.5061, info=info, full=FULL, numbers=numbers))
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "adapter": "a", "storage": "int8", "disk": "0.500", "host": "-", "device": "0.520",
        "without padding": "0.506", "output error": "0.66%", "agreement": "97.50% of 160",
        "mean KL": "0.0004",
    }  # fmt: skip


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.yaml"
    assert main([str(tmp_path), "--config", str(missing)]) == 2
    assert f"cannot read the configuration {missing}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a" / "b"), str(tmp_path)])
    assert "the folders must lie below one folder" in capsys.readouterr().err
