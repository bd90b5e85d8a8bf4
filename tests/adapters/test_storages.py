"""Adapters stored as integers: who is stored how, what is told of it, and what cannot be stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import MODEL
from stores import Stores, blob_of, make_folder, poll, version_of

from jslora.adapters.storages import check_blocks, check_rows, storages
from jslora.adapters.version import stored_digest
from jslora.build import _register
from jslora.config import AdaptersSection, parse
from jslora.errors import ConfigError
from jslora.progress import silent
from jslora.split import Split

WIDE = dataclasses.replace(MODEL, hidden=64, heads=4, kv_heads=2, head_dim=32, feed_forward=96)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    monkeypatch.setattr("jslora.adapters.known.SETTLED_SECONDS", -60.0)
    return Stores(tmp_path)


def test_names_of_one_folder_are_stored_each_in_its_way(stores: Stores) -> None:
    make_folder(stores.root, "a")
    store = stores(storage="int8", storage_of={"exact": "full", "coarse": "int4"})
    errors = {}
    for name, storage in (("a", "int8"), ("exact", "full"), ("coarse", "int4")):
        registration = store.register(name, "a")
        assert store.describe(registration).output_error is None, "not read yet"
        version = version_of(store, registration)
        info = store.info(name)
        assert (version.storage, info.storage) == (storage, storage)
        assert info.digest == version.digest
        errors[storage] = info.output_error
        blob_of(store, registration)
    exact = store.info("exact").digest
    assert store.info("a").digest == stored_digest(exact, "int8") != exact
    assert store.info("coarse").digest == stored_digest(exact, "int4")
    assert 0 == errors["full"] < errors["int8"] < 0.02 < errors["int4"] < 0.3
    stores.close()


def test_loads_are_stored_as_registered_ones(stores: Stores) -> None:
    make_folder(stores.root, "a")
    store = stores(storage_of={"a": "int8"})
    loaded = store.load("a").result(20)
    assert loaded.version and loaded.version.storage == loaded.source.storage == "int8"
    other = store.load("b", "a").result(20)
    assert other.version and other.version.storage == "full"
    again = store.load("a", replace=True).result(20)
    assert again.version == loaded.version
    stores.close()


def test_a_restart_knows_the_error_and_finds_the_blob(stores: Stores) -> None:
    folder = make_folder(stores.root, "a")
    first = stores(storage="int4")
    registration = first.register("a")
    blob, error = blob_of(first, registration), first.info("a").output_error
    first.close()
    again = stores(storage="int4")
    registration = again.register("a")
    assert again.info("a").output_error == error > 0
    (folder / "adapter_model.safetensors").write_bytes(b"not read any more")
    version = registration.version
    assert version is not None
    bits = "u4"  # which may be those of a NaN
    np.testing.assert_array_equal(poll(lambda: again.blob(version)).view(bits), blob.view(bits))
    other = stores(storage="full")
    with pytest.raises(Exception, match="safetensors"):
        version_of(other, other.register("a"))
    stores.close()


def test_only_what_a_configuration_names_can_occur() -> None:
    assert storages(AdaptersSection()) == ("full",)
    mixed = AdaptersSection(storage="int4", storage_of={"a": "full", "b": "int4"})
    assert storages(mixed) == ("full", "int4")


def test_rows_that_are_no_whole_words_are_refused_by_name() -> None:
    odd = dataclasses.replace(WIDE, feed_forward=90)
    section = AdaptersSection(storage_of={"a": "int8"})
    check_rows(section, odd, Split(), 16)
    with pytest.raises(ConfigError, match=r"int8 cannot be had for gate_proj.* 90 numbers"):
        check_rows(section, odd, Split(), 32)
    check_rows(AdaptersSection(), odd, Split(), 32)


def test_kernels_refuse_rows_of_narrow_blocks_by_name() -> None:
    section = AdaptersSection(storage="int4")
    with pytest.raises(ConfigError, match=r"int4 cannot be had for \w+_proj.*blocks of 8"):
        check_blocks(section, WIDE, Split(), 16, page=1024)
    wide = dataclasses.replace(WIDE, hidden=128, head_dim=64, feed_forward=384)
    check_blocks(section, wide, Split(), 16, page=2048)


def test_a_name_that_the_roots_do_not_have_is_told_at_the_start(
    stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(stores.root, "a")
    adapters = {"storage_of": {"a": "int8", "typo": "int4"}}
    config = parse({"model": {"source": "m"}, "adapters": adapters})
    _register(stores(storage_of=config.adapters.storage_of), config, silent)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["adapters.storage_of names typo, of which the roots have no folder yet"]
