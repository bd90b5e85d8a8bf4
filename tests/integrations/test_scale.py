"""How many replicas the options of scripts/serve_ray.py ask for, and what is wrong with some."""

import sys

import pytest

from jslora.errors import ConfigError
from jslora.integrations.scale import Scale, check_gpus
from scripts import serve_ray


def scale(monkeypatch: pytest.MonkeyPatch, *options: str) -> Scale:
    monkeypatch.setattr(sys, "argv", ["serve_ray.py", "--config", "some.yaml", *options])
    return serve_ray._scale(serve_ray._parse())


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ([], (1, 1)),
        (["--replicas", "2"], (2, 2)),
        (["--min-replicas", "3"], (3, 3)),
        (["--max-replicas", "3"], (1, 3)),
        (["--min-replicas", "2", "--max-replicas", "3"], (2, 3)),
    ],
)
def test_a_fixed_number_or_bounds(
    options: list[str], bounds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scale(monkeypatch, *options)
    assert (found.min_replicas, found.max_replicas) == bounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "min_replicas is 0: Input should be greater than or equal to 1"),
        (["--max-replicas", "0"], "max_replicas is 0: Input should be greater than or equal to 1"),
        (["--cpus", "-1"], "cpus is -1.0: Input should be greater than or equal to 0"),
        (["--target-requests", "0"], "target_requests is 0.0: Input should be greater than 0"),
        (
            ["--min-replicas", "3", "--max-replicas", "2"],
            "Value error, min_replicas 3 is above max_replicas 2",
        ),
        (
            ["--replicas", "2", "--max-replicas", "3"],
            "--replicas 2 and --max-replicas 3: give a fixed number or bounds",
        ),
        (
            ["--replicas", "2", "--min-replicas", "0"],
            "--replicas 2 and --min-replicas 0: give a fixed number or bounds",
        ),
    ],
)
def test_wrong_options_are_named(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as failed:
        scale(monkeypatch, *options)
    assert failed.value.message == message


def test_a_replica_has_as_many_gpus_as_its_mesh_or_none() -> None:
    check_gpus(Scale(), 4)
    check_gpus(Scale(gpus=4), 4)
    with pytest.raises(ConfigError, match=r"gpus is 1: must be mesh\.model, which is 4, or 0"):
        check_gpus(Scale(gpus=1), 4)
