"""A follower's adapters: the digest of what lies below its own root, and its own part packed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from goldens.cases import ROOT

from jslora.adapters.cache import PackedCache
from jslora.adapters.peft import Limits
from jslora.adapters.reader import Reader
from jslora.distributed.shelf import Shelf
from jslora.errors import AdapterRejected
from jslora.fetch import load_config
from jslora.split import Split

MODEL = load_config(ROOT / "llama" / "model")
SPLIT = Split(4)
F32 = np.dtype(np.float32)
SIZE = 2**24

Make = Callable[..., Shelf]


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    for number, name in enumerate(("r5", "patterns")):
        shutil.copytree(ROOT / "llama" / "adapters" / name, tmp_path / f"root-{number}" / name)
    return [tmp_path / "root-0", tmp_path / "root-1"]


@pytest.fixture
def make(roots: list[Path], tmp_path: Path) -> Make:
    def shelf(devices: range, host_bytes: int = SIZE, cache_bytes: int = SIZE) -> Shelf:
        numbers = SPLIT.page_numbers(MODEL, 16)
        cache = PackedCache(tmp_path / "cache", MODEL, numbers, F32, cache_bytes, SPLIT, devices)
        reader = Reader(MODEL, numbers, F32, Limits(), SIZE, cache, SPLIT, devices)
        return Shelf(roots, reader, cache, host_bytes)

    return shelf


def test_hosts_agree_on_the_digest_and_each_packs_its_own_part(make: Make) -> None:
    both, first, second = (make(devices) for devices in (range(4), range(2), range(2, 4)))
    digests = {shelf.read(0, "r5", "full") for shelf in (both, first, second)}
    (digest,) = digests
    parts = [shelf.blob(digest, 1, 0, "r5", "full") for shelf in (first, second)]
    everything = both.blob(digest, 1, 0, "r5", "full")
    np.testing.assert_array_equal(np.concatenate(parts), everything)
    assert len(everything) == 4 and not np.array_equal(*parts)


@pytest.mark.parametrize(
    ("root", "path"),
    [
        (0, "patterns"), (1, "r5"), (2, "r5"), (0, "../root-1/patterns"), (0, "/etc"), (0, ""),
        (0, "."), (0, "r5/adapter_config.json"), (0, "r5\0"), (0, "a" * 5000),
    ],
)  # fmt: skip
def test_nothing_opens_but_folders_below_the_one_root(make: Make, root: int, path: str) -> None:
    with pytest.raises(AdapterRejected):
        make(range(2)).read(root, path, "full")


def test_a_link_out_of_the_root_does_not_open(make: Make, roots: list[Path]) -> None:
    (roots[0] / "link").symlink_to(roots[1] / "patterns")
    with pytest.raises(AdapterRejected):
        make(range(2)).read(0, "link", "full")


def test_changed_contents_are_read_anew_and_old_ones_come_from_the_cache(
    make: Make, roots: list[Path]
) -> None:
    shelf = make(range(2))
    old = shelf.read(0, "r5", "full")
    blob = shelf.blob(old, 1, 0, "r5", "full")
    shutil.rmtree(roots[0] / "r5")
    shutil.copytree(roots[1] / "patterns", roots[0] / "r5")
    new = shelf.read(0, "r5", "full")
    assert new != old
    shelf.forget(old)
    np.testing.assert_array_equal(shelf.blob(old, blob.shape[2], 0, "r5", "full"), blob)


def test_contents_that_are_nowhere_any_more_are_refused(make: Make, roots: list[Path]) -> None:
    shelf = make(range(2), cache_bytes=0)
    old = shelf.read(0, "r5", "full")
    shutil.rmtree(roots[0] / "r5")
    shutil.copytree(roots[1] / "patterns", roots[0] / "r5")
    assert len(shelf.blob(old, 1, 0, "r5", "full")) == 2  # from memory
    shelf.forget(old)
    with pytest.raises(AdapterRejected, match="'r5' changed on disk"):
        shelf.blob(old, 1, 0, "r5", "full")
