"""The disk tier: what comes back is what was put, or nothing; and it stays private and bounded."""

import hashlib
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_folders import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import F32, PAGE, Stores

from jslora.adapters.cache import PackedCache
from jslora.errors import ConfigError
from jslora.split import Split

BF16 = np.dtype(ml_dtypes.bfloat16)
DIGESTS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(8)]


def draw(n_pages: int = 2, seed: int = 0, dtype: np.dtype = F32) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(1, MODEL.layers, n_pages, PAGE)).astype(dtype)


def file_of(stores: Stores, digest: str) -> Path:
    (found,) = stores.cache_folder.glob(f"*/blobs/{digest}.npy")
    return found


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_blob_comes_back_bit_for_bit_after_a_restart(tmp_path: Path, dtype: np.dtype) -> None:
    blob = draw(dtype=dtype)
    PackedCache(tmp_path / "cache", MODEL, PAGE, dtype, 2**30).store(DIGESTS[0], blob)
    cache = PackedCache(tmp_path / "cache", MODEL, PAGE, dtype, 2**30)
    found = cache.load(DIGESTS[0], 2)
    assert found is not None and found.dtype == dtype and not found.flags.writeable
    assert found.tobytes() == blob.tobytes()
    assert found.ctypes.data % 64 == 0  # XLA:CPU takes it as it is
    assert cache.size(DIGESTS[0]) > blob.nbytes and cache.size(DIGESTS[1]) == 0
    assert cache.load(DIGESTS[1], 2) is None


def test_devices_that_hold_other_parts_have_folders_of_their_own(stores: Stores) -> None:
    blob = draw()
    stores.cache().store(DIGESTS[0], blob)
    halves = [
        PackedCache(stores.cache_folder, MODEL, PAGE, F32, 2**30, Split(2, fully), devices)
        for fully in (False, True)
        for devices in (range(0, 1), range(1, 2), None)
    ]
    assert [cache.load(DIGESTS[0], 2) for cache in halves] == [None] * 6
    blobs = [blob + i for i in range(5)] + [np.concatenate([blob, -blob])]
    for cache, other in zip(halves[:2] + halves[3:], blobs[:2] + blobs[3:], strict=True):
        cache.store(DIGESTS[0], other)
    for cache, other in zip(halves[:2] + halves[3:], blobs[:2] + blobs[3:], strict=True):
        np.testing.assert_array_equal(cache.load(DIGESTS[0], 2), other)


def test_the_file_is_one_that_numpy_reads(stores: Stores) -> None:
    blob = draw()
    stores.cache().store(DIGESTS[0], blob)
    bits = np.load(file_of(stores, DIGESTS[0]), allow_pickle=False)
    np.testing.assert_array_equal(bits.view(F32), blob)


def test_reading_keeps_no_descriptor_and_no_map(stores: Stores) -> None:
    cache = stores.cache()
    cache.store(DIGESTS[0], draw())
    before = os.listdir("/proc/self/fd")
    kept = [cache.load(DIGESTS[0], 2) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == len(before)
    file_of(stores, DIGESTS[0]).write_bytes(b"")  # a map would now end the process
    for blob in kept:
        np.testing.assert_array_equal(blob, draw())


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_dropped_and_made_again(stores: Stores, data: st.DataObject) -> None:
    cache, blob = stores.cache(), draw()
    cache.store(DIGESTS[0], blob)
    path = file_of(stores, DIGESTS[0])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    at = data.draw(st.integers(0, 300) | st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del damaged[at:]
        case "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    path.write_bytes(damaged)
    assert cache.load(DIGESTS[0], 2) is None
    assert not path.exists() and cache.size(DIGESTS[0]) == 0
    cache.store(DIGESTS[0], blob)
    assert path.read_bytes() == whole


def test_a_file_under_another_s_name_is_dropped(stores: Stores) -> None:
    cache = stores.cache()
    cache.store(DIGESTS[0], draw())
    path = file_of(stores, DIGESTS[0])
    other = path.with_name(f"{DIGESTS[1]}.npy")
    shutil.copy(path, other)
    assert cache.load(DIGESTS[1], 2) is None and not other.exists()
    assert cache.load(DIGESTS[0], 1) is None  # of another shape than asked for


def test_the_least_recently_used_leave_also_after_a_restart(stores: Stores) -> None:
    size = 3 * 2 * PAGE * 4 + 128 + 32
    cache = stores.cache(3 * size)
    for i in range(3):
        cache.store(DIGESTS[i], draw(seed=i))
        os.utime(file_of(stores, DIGESTS[i]), (i, i))
    assert cache.load(DIGESTS[0], 2) is not None  # used, so 1 is the oldest
    cache.store(DIGESTS[3], draw(seed=3))
    assert [cache.size(digest) > 0 for digest in DIGESTS[:4]] == [True, False, True, True]
    again = stores.cache(2 * size)  # 2 is the oldest by its time
    assert [again.size(digest) > 0 for digest in DIGESTS[:4]] == [True, False, False, True]
    assert len([*stores.cache_folder.glob("*/blobs/*")]) == 2


def test_layouts_lie_apart_and_share_one_limit(tmp_path: Path) -> None:
    folder, size = tmp_path / "cache", 3 * 2 * PAGE * 4 + 160
    first = PackedCache(folder, MODEL, PAGE, F32, 2 * size)
    first.store(DIGESTS[0], draw())
    os.utime(next(folder.glob("*/blobs/*")), (1, 1))
    other = PackedCache(folder, MODEL, PAGE, BF16, size)
    assert other.load(DIGESTS[0], 2) is None
    other.store(DIGESTS[0], draw(dtype=BF16))
    assert first.load(DIGESTS[0], 2) is None  # the older layout's went for it


def test_what_is_larger_than_the_limit_is_not_kept(stores: Stores) -> None:
    cache = stores.cache(1000)
    cache.store(DIGESTS[0], draw())
    assert cache.size(DIGESTS[0]) == 0 and not [*stores.cache_folder.glob("*/blobs/*")]


def test_two_servers_share_a_cache(stores: Stores) -> None:
    first, second = stores.cache(), stores.cache()
    first.store(DIGESTS[0], draw())
    assert second.load(DIGESTS[0], 2) is not None and second.size(DIGESTS[0]) > 0
    file_of(stores, DIGESTS[0]).unlink()  # as the other's limit would
    assert first.load(DIGESTS[0], 2) is None and first.size(DIGESTS[0]) == 0


@pytest.mark.parametrize("step", ["replace", "write"])
def test_a_full_disk_is_told_and_leaves_nothing(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = stores.cache()
    if step == "replace":
        monkeypatch.setattr("os.replace", full)
    else:
        monkeypatch.setattr("tempfile.mkstemp", full)
    cache.store(DIGESTS[0], draw())
    assert "cannot be written: No space left on device" in caplog.text
    assert cache.size(DIGESTS[0]) == 0 and not [*stores.cache_folder.glob("*/blobs/.*")]
    assert cache.load(DIGESTS[0], 2) is None


def test_what_a_dead_writer_left_is_cleared(stores: Stores) -> None:
    stores.cache()
    (blobs,) = stores.cache_folder.glob("*/blobs")
    for name, age in ((".old.partial", 7200), (".new.partial", 60)):
        (blobs / name).write_bytes(b"x")
        os.utime(blobs / name, (time.time() - age,) * 2)
    stores.cache()
    assert [path.name for path in blobs.iterdir()] == [".new.partial"]


def test_folders_are_private(stores: Stores) -> None:
    cache = stores.cache()
    cache.store(DIGESTS[0], draw())
    for path in [stores.cache_folder, *stores.cache_folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("inner", ["", "*", "*/blobs", "*/known"])
def test_a_folder_that_others_may_write_to_is_refused(stores: Stores, inner: str) -> None:
    stores.cache()
    (folder,) = stores.cache_folder.glob(inner) if inner else (stores.cache_folder,)
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        with pytest.raises(ConfigError, match=f"other users may write to .*{folder.name}"):
            stores.cache()
    folder.chmod(0o755)
    stores.cache()


def test_another_s_folder_or_no_folder_is_refused(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stores.cache()
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        stores.cache()
    monkeypatch.undo()
    (tmp_path / "elsewhere").mkdir()
    stores.cache_folder = tmp_path / "link"
    stores.cache_folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="link is not a folder"):
        stores.cache()
    stores.cache_folder = tmp_path / "file"
    stores.cache_folder.write_text("")
    with pytest.raises(ConfigError, match=r"cannot create the cache folder .*file"):
        stores.cache()
