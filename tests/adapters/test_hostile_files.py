"""Hostile folders through the store: refused precisely, nothing kept, and others unaffected."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import CONFIG, MODEL, tensors, write
from stores import BLOB, Stores, blob_of, make_folder, version_of

from jslora.adapters.peft import WEIGHTS, Limits, read_adapter
from jslora.adapters.store import AdapterStore
from jslora.errors import AdapterRejected

GIB = 2**30


def load(store: AdapterStore, name: str) -> None:
    version_of(store, store.load(name).result())


def register(store: AdapterStore, name: str) -> None:
    version_of(store, store.register(name))


def kept(stores: Stores) -> tuple[list[str], list[str]]:
    """Files of the cache, and what this process has open."""
    files = [str(path) for path in stores.cache_folder.rglob("*") if path.is_file()]
    descriptors = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    opened = [os.readlink(path) for path in descriptors if os.path.lexists(path)]
    return sorted(files), sorted(opened)


def _sparse(folder: Path) -> None:
    """4 GiB that take no room on the disk; the limit is half of that."""
    os.truncate(folder / WEIGHTS, 4 * GIB)


def _sparse_within_limit(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, GIB)


def _header_bomb(folder: Path) -> None:
    """A header that says it has 2^63 bytes."""
    (folder / WEIGHTS).write_bytes((2**63).to_bytes(8, "little") + b"{" * 1000)


def _large_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**28).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 2**28 + 8)


def _nested_header(folder: Path) -> None:
    text = b'{"a":' * 100_000
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def _many_tensors(folder: Path) -> None:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(9000)) + "}").encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def _link_out(folder: Path) -> None:
    outside = write(folder.parents[1] / "outside")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def _cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _not_finite(folder: Path) -> None:
    weights = {key: np.full_like(tensor, np.inf) for key, tensor in tensors().items()}
    write(folder, weights=weights)


def _config_bomb(folder: Path) -> None:
    os.truncate(folder / "adapter_config.json", 4 * GIB)


HOSTILE: dict[Callable[[Path], None], str] = {
    _sparse: rf"{WEIGHTS} has {4 * GIB} bytes; at most {2 * GIB} are read",
    _sparse_within_limit: "the tensors take .* bytes; the file holds",
    _header_bomb: "the safetensors file is cut off",
    _large_header: "the safetensors header has 268435456 bytes; at most 1048576",
    _nested_header: "the safetensors header is not JSON",
    _many_tensors: "the file holds 9000 tensors; at most 8192",
    _link_out: f"{WEIGHTS} is a link that leads outside the adapter roots",
    _device: f"{WEIGHTS} is a link that leads outside the adapter roots",
    _pipe: f"{WEIGHTS} is not a regular file",
    _cut: "the tensors take .* bytes; the file holds",
    _pickle: "adapter_model.bin is a pickle, which is never opened",
    _not_finite: "holds numbers that are not finite",
    _config_bomb: f"adapter_config.json has {4 * GIB} bytes; at most 1048576 are read",
}


@pytest.mark.parametrize("method", [load, register])
@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__.strip("_"))
def test_it_is_refused_and_nothing_is_kept(
    stores: Stores, spoil: Callable[[Path], None], method: Callable[[AdapterStore, str], None]
) -> None:
    make_folder(stores.root, "good", seed=1)
    spoil(make_folder(stores.root, "bad"))
    store = stores()
    good = store.load("good").result()
    blob = blob_of(store, good)
    before, held = kept(stores), store.stats
    with pytest.raises(AdapterRejected, match=HOSTILE[spoil]) as e:
        method(store, "bad")
    assert e.value.status == 400 and str(stores.root) not in e.value.message
    if store.get("bad"):  # by its metadata it was fine
        store.unload("bad")
    assert kept(stores) == before and store.names() == ["good"] and store.take_dead() == []
    assert (store.stats.host_bytes, store.stats.host_count) == (held.host_bytes, 1)
    np.testing.assert_array_equal(blob_of(store, good), blob)


# While they are read -----------------------------------------------------------------------------


@pytest.fixture
def rewriting(stores: Stores) -> Iterator[set[str]]:
    """A folder whose files change all the time; yields the digests of what it holds in between."""
    sources = [
        write(stores.root.parent / "sources" / str(rank), {**CONFIG, "r": rank}, tensors(rank))
        for rank in (2, 3)
    ]
    sources.append(write(sources[0].with_name("same"), weights=tensors(seed=7)))  # as long as 2's
    contents = [{path.name: path.read_bytes() for path in source.iterdir()} for source in sources]
    folder = shutil.copytree(sources[0], stores.root / "moving")
    stop = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for file, data in contents[turn % 3].items():
                match turn % 4:
                    case 0:
                        (folder / file).write_bytes(data)
                    case 1:
                        os.truncate(folder / file, len(data) // 2)
                    case _:
                        (folder.parent / ".new").write_bytes(data)
                        (folder.parent / ".new").rename(folder / file)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield {read_adapter(source, MODEL, Limits()).digest for source in sources}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("method", [load, register])
def test_what_changes_while_it_is_read_is_one_of_its_states_or_refused(
    stores: Stores, rewriting: set[str], method: Callable[[AdapterStore, str], None]
) -> None:
    """And no digest is ever remembered, on disk or in memory, beside another's numbers."""
    store = stores(host_cache_bytes=2 * BLOB)
    seen = set()
    for _ in range(150):
        try:
            method(store, "moving")
        except AdapterRejected:
            continue
        finally:
            registration = store.get("moving")
            if registration and registration.version:
                seen.add(registration.version.digest)
            if registration:
                store.unload("moving")
    assert seen <= rewriting
    assert store.stats.host_bytes == 0 and set(store.take_dead()) <= rewriting
    for path in stores.cache_folder.glob("*/blobs/*"):
        assert path.stem in rewriting


def test_what_is_known_is_what_a_read_finds(stores: Stores) -> None:
    """Settled files, then read, known and changed in turn, with and without a new inode."""
    folder = make_folder(stores.root, "x")
    for turn in range(30):
        digest = version_of(store := stores(), store.register("x")).digest
        assert digest == read_adapter(folder, MODEL, Limits()).digest
        known = stores().register("x").version
        assert known is not None and known.digest == digest
        if turn % 3:
            write(folder, weights=tensors(seed=turn))
        else:
            shutil.rmtree(folder)
            make_folder(stores.root, "x", seed=turn)


def test_a_pipe_or_a_hole_delays_no_other(stores: Stores) -> None:
    for number in range(5):
        _pipe(make_folder(stores.root, f"pipe{number}"))
        _sparse_within_limit(make_folder(stores.root, f"hole{number}"))
    make_folder(stores.root, "good")
    store = stores()
    bad = [store.load(f"{kind}{n}") for n in range(5) for kind in ("pipe", "hole")]
    assert store.load("good").result(60).version is not None
    for loading in bad:
        assert isinstance(loading.exception(60), AdapterRejected)
