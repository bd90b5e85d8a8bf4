"""Registering by metadata, and what a second start need not read."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import CONFIG, MODEL, name, tensors, write
from stores import BLOB, Stores, blob_of, make_folder, states, version_of

from jslora.adapters.files import OpenFile
from jslora.adapters.peft import WEIGHTS, Limits, read_adapter
from jslora.errors import AdapterRejected


def _spoilt() -> dict[str, np.ndarray]:
    weights = tensors()
    weights[name(1, "q_proj", "B")][0, 0] = math.nan
    return weights


def test_the_report_is_that_of_a_whole_read_but_for_the_digest(stores: Stores) -> None:
    make_folder(stores.root, "x", base_model_name_or_path="org/other", rank_pattern={"no": 1})
    store = stores()
    outlined = store.register("x")
    assert outlined.version is None and outlined.info.digest == ""
    assert states(store) == [("x", "registered")] and store.stats.host_bytes == 0
    store.unload("x")
    whole = store.load("x").result()
    assert whole.info == type(whole.info)(**{**_fields(outlined.info), "digest": whole.info.digest})
    assert len(whole.info.digest) == 64 and whole.n_pages == outlined.n_pages == 1


def _fields(info: Any) -> dict[str, Any]:
    return {field: getattr(info, field) for field in info.__dataclass_fields__}


def test_no_tensor_is_read(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(stores.root, "x")
    reads: list[bytes] = []
    plain = OpenFile.read_start

    def read_start(file: OpenFile, size: int) -> bytes:
        reads.append(plain(file, size))
        return reads[-1]

    monkeypatch.setattr(OpenFile, "read_start", read_start)
    stores().register("x")
    config, size, head = reads
    assert json.loads(config) == CONFIG and len(size) == 8
    assert len(head) == 8 + int.from_bytes(size, "little")


def test_what_is_wrong_with_the_metadata_is_refused_at_once(stores: Stores) -> None:
    make_folder(stores.root, "config", use_dora=True)
    make_folder(stores.root, "rank", r=3)
    weights = make_folder(stores.root, "cut") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    make_folder(stores.root, "large", seed=1)
    store = stores()
    for label, message in (
        ("config", "use_dora is set"),
        ("rank", "gives it rank 3"),
        ("cut", "the tensors take .* bytes; the file holds"),
        ("absent", "is no adapter folder below"),
    ):
        with pytest.raises(AdapterRejected, match=message):
            store.register(label)
        assert store.get(label) is None and store.info(label).state == "failed"
    small = stores(limits=Limits(max_file_bytes=100))
    with pytest.raises(AdapterRejected, match="at most 100 are read"):
        small.register("large")
    with pytest.raises(AdapterRejected, match="takes 1 pages; the pool has 0"):
        stores(limits=Limits(max_pages=0)).register("large")
    with pytest.raises(AdapterRejected, match=f"takes {BLOB} bytes of host memory"):
        stores(host_cache_bytes=BLOB - 1).register("large")
    assert store.register("large") is store.get("large")
    with pytest.raises(AdapterRejected, match="'large' is registered already"):
        store.register("large")


def test_numbers_are_checked_before_they_are_used(stores: Stores) -> None:
    folder = write(stores.root / "x", weights=_spoilt())
    store = stores()
    registration = store.register("x")
    for _ in range(2):  # told once each time it is read
        with pytest.raises(AdapterRejected, match="holds numbers that are not finite"):
            version_of(store, registration)
    assert states(store) == [("x", "failed")] and store.stats.failures == 2
    with pytest.raises(AdapterRejected, match="not finite"):
        store.load("x", replace=True).result()
    write(folder)
    assert blob_of(store, registration) is not None
    assert states(store) == [("x", "host")]
    store.load("x", replace=True).result()
    assert store.info("x").error is None


def test_a_prefetch_starts_over_what_failed(stores: Stores) -> None:
    folder = write(stores.root / "x", weights=_spoilt())
    store = stores()
    registration = store.register("x")
    with pytest.raises(AdapterRejected, match="not finite"):
        version_of(store, registration)
    store.prefetch(registration)
    while store.info("x").state != "failed":
        time.sleep(0.001)
    write(folder)
    store.prefetch(registration)  # nobody was told of the last failure, and nobody will be
    assert version_of(store, registration).digest == read_adapter(folder, MODEL, Limits()).digest


def test_only_what_was_registered_is_read_under_its_name(stores: Stores) -> None:
    folder = make_folder(stores.root, "x")
    store = stores()
    registration = store.register("x")
    write(folder, {**CONFIG, "lora_alpha": 5})
    with pytest.raises(AdapterRejected, match="adapter 'x' changed on disk; load it again"):
        version_of(store, registration)
    os.utime(write(folder) / WEIGHTS, (1, 1))  # the same again, of another time
    assert version_of(store, registration).digest == read_adapter(folder, MODEL, Limits()).digest


# The second start --------------------------------------------------------------------------------


def test_a_second_start_opens_no_source(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, label in enumerate("abc"):
        make_folder(stores.root, label, seed=seed, base_model_name_or_path="other")
    first = stores()
    loaded = {label: first.load(label).result() for label in "abc"}
    blobs = {label: blob_of(first, registration) for label, registration in loaded.items()}
    first.close()
    for attribute in ("read_adapter", "read_outline"):
        monkeypatch.setattr(f"jslora.adapters.reader.{attribute}", None)  # no longer callable
    second = stores()
    for label in "ab":
        registration = second.register(label)
        assert registration.info == loaded[label].info
        assert registration.version == loaded[label].version
        np.testing.assert_array_equal(blob_of(second, registration), blobs[label])
        for table in ("a_offset", "b_offset", "rank", "scale"):
            expected = getattr(loaded[label].version, table)
            np.testing.assert_array_equal(getattr(registration.version, table), expected)
    assert second.load("c").result().info == loaded["c"].info  # it was checked whole before
    assert second.stats.seconds.keys() == {"map"}


@pytest.mark.parametrize("change", ["contents", "config", "replaced", "touched"])
def test_a_folder_that_changed_is_read_again(stores: Stores, change: str) -> None:
    folder = make_folder(stores.root, "x", seed=1)
    first = stores()
    old = version_of(first, first.load("x").result())
    match change:
        case "contents":
            write(folder, weights=tensors(seed=2))
        case "config":
            write(folder, {**CONFIG, "lora_alpha": 5}, tensors(seed=1))
        case "replaced":
            folder.rename(stores.root / "gone")
            make_folder(stores.root, "x", seed=3)
        case "touched":
            os.utime(folder / WEIGHTS, (1, 1))
    second = stores()
    registration = second.register("x")
    assert registration.version is None
    new = version_of(second, registration)
    assert new.digest == read_adapter(folder, MODEL, Limits()).digest
    assert (new == old) == (change == "touched")


def test_a_moved_folder_shares_the_blob(stores: Stores) -> None:
    folder = make_folder(stores.root, "x")
    store = stores()
    old = version_of(store, store.load("x").result())
    folder.rename(stores.root / "y")
    assert version_of(store, store.load("y").result()) is old
    assert len([*stores.cache_folder.glob("*/blobs/*")]) == 1


def test_what_was_just_written_is_not_remembered(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might change again within the same tick of the file system's clock, unseen."""
    monkeypatch.setattr("jslora.adapters.known.SETTLED_SECONDS", 2.0)
    make_folder(stores.root, "x")
    stores().load("x").result()
    assert stores().register("x").version is None
    assert not [*stores.cache_folder.glob("*/known/*")]


def test_narrower_limits_hold_for_what_is_known(stores: Stores) -> None:
    make_folder(stores.root, "x")
    stores().load("x").result()
    assert stores().register("x").version is not None
    for limits, message in (
        (Limits(max_rank=1), "at most 1 is served"),
        (Limits(max_file_bytes=10), "at most 10 are read"),
        (Limits(max_pages=0), "the pool has 0"),
    ):
        with pytest.raises(AdapterRejected, match=message):
            stores(limits=limits).register("x")


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_entry_counts_as_none(
    stores: Stores, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, label in enumerate("xy"):
        make_folder(stores.root, label, seed=seed)
        stores().load(label).result()
    registered = {label: stores().register(label).version for label in "xy"}
    a, b = stores.cache_folder.glob("*/known/*.json")
    texts = a.read_bytes(), b.read_bytes()
    flipped = bytearray(texts[0])
    at = flipped.index(b'"scale":[') + 9
    flipped[at] = ord("3")
    a.write_bytes(
        {"flipped": flipped, "cut": texts[0][:-9], "empty": b"", "other": texts[1]}[damage]
    )
    assert "damaged" not in caplog.text
    store = stores()
    again = {label: store.register(label) for label in "xy"}
    assert sorted(r.version is None for r in again.values()) == [False, True]
    assert {label: version_of(store, r) for label, r in again.items()} == registered
    assert "a damaged entry of the adapter cache is dropped" in caplog.text
    assert {path.read_bytes() for path in (a, b)} == {*texts}  # made again


def test_entries_of_folders_that_are_gone_do_not_pile_up(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jslora.adapters.known.MAX_ENTRIES", 4)
    store = stores()
    for seed in range(6):
        make_folder(stores.root, f"x{seed}", seed=seed)
        store.load(f"x{seed}").result()
        entries = sorted(stores.cache_folder.glob("*/known/*"), key=os.path.getmtime)
        os.utime(entries[-1], (seed, seed))
    again = stores()
    known = [again.register(f"x{seed}").version is not None for seed in range(6)]
    assert known == [False] * 4 + [True] * 2


def test_a_link_to_a_known_folder_from_outside_is_refused(stores: Stores, tmp_path: Path) -> None:
    folder = make_folder(stores.root, "x")
    store = stores()
    store.load("x").result()
    store.unload("x")
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterRejected, match="is no adapter folder below the adapter roots"):
        store.register("x")
