"""Names, versions and tiers: what is registered, what is shared, what stays out, and when."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import CONFIG, MODEL, draw, name, tensors, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jslora.adapters.layout import pack
from jslora.adapters.peft import Limits, read_adapter
from jslora.adapters.store import MAX_FAILURES, AdapterStore
from jslora.errors import AdapterRejected, UnknownModel

PAGE = 512
F32 = np.dtype(np.float32)
BLOB = 3 * PAGE * 4  # bytes of an adapter of `CONFIG`: three layers of one page


class Stores:
    """Makes stores over `root`, and closes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[AdapterStore] = []

    def __call__(self, *roots: Path, **changes: Any) -> AdapterStore:
        settings = {
            "limits": Limits(),
            "host_cache_bytes": 64 * BLOB,
            "base_name": "base",
            **changes,
        }
        store = AdapterStore(roots or (self.root,), MODEL, PAGE, F32, **settings)
        self.made.append(store)
        return store


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    made = Stores(tmp_path / "root")
    made.root.mkdir()
    yield made
    for store in made.made:
        store.close()


def _adapter(root: Path, label: str, seed: int = 0, **config: Any) -> Path:
    return write(root / label, {**CONFIG, **config}, tensors(seed=seed))


# Finding and loading -----------------------------------------------------------------------------


def test_discovery_is_sorted_and_skips_what_cannot_be_served(
    stores: Stores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = _adapter(tmp_path, "outside")
    for label in ("zeta", "alpha", "base", "bad name", ".hidden", "-dash"):
        _adapter(stores.root, label)
    (stores.root / "escape").symlink_to(outside)
    (stores.root / "inside").symlink_to(stores.root / "zeta")
    (stores.root / "empty").mkdir()
    (stores.root / "file").write_text("")
    second = tmp_path / "second"
    _adapter(second, "alpha", seed=1)
    _adapter(second, "beta")

    found = stores(stores.root, second, tmp_path / "absent").discover()
    assert list(found.items()) == [
        ("alpha", stores.root / "alpha"),
        ("beta", second / "beta"),
        ("inside", stores.root / "zeta"),
        ("zeta", stores.root / "zeta"),
    ]
    for part in ("folder base", "folder bad name", "folder -dash", "alpha is skipped", "absent"):
        assert part in caplog.text
    assert "escape" not in found


def test_a_loaded_adapter_is_packed_and_described(stores: Stores) -> None:
    folder = _adapter(stores.root, "sql", base_model_name_or_path="org/Base")
    store = stores()
    version = store.load("sql").result()
    adapter = read_adapter(folder, MODEL, Limits())
    expected = pack(adapter, MODEL, PAGE, F32)
    packed = store.packed(version)
    assert packed is not None
    np.testing.assert_array_equal(packed.blob, expected.blob)
    for field in ("a_offset", "b_offset", "rank", "scale"):
        np.testing.assert_array_equal(getattr(version, field), getattr(expected, field))
    assert version.digest == adapter.digest and store.get("sql") is version
    (info,) = store.info()
    assert (info.name, info.state, info.rank, info.layers) == ("sql", "host", 2, 3)
    assert info.modules == {"q_proj": (2, 2, 2.0), "down_proj": (2, 2, 2.0)}
    assert (info.pages, info.bytes, info.path) == (1, adapter.bytes, "sql")
    assert info.padding == pytest.approx(1 - adapter.bytes / BLOB)
    assert info.warnings == () and info.base_model == "org/Base"


def test_another_base_is_a_warning(stores: Stores) -> None:
    _adapter(stores.root, "sql", base_model_name_or_path="org/other", rank_pattern={"nothing": 1})
    version = stores().load("sql").result()
    assert version.warnings == (
        "rank_pattern: no targeted module matches nothing",
        "it was trained for org/other; the base here is base",
    )


def test_paths_resolve_below_the_roots_in_order(stores: Stores, tmp_path: Path) -> None:
    second = tmp_path / "second"
    a = _adapter(stores.root / "deep" / "er", "x", seed=1)
    b = _adapter(second / "deep" / "er", "x", seed=2)
    c = _adapter(second, "only", seed=3)
    store = stores(stores.root, second)
    paths = {"a": "deep/er/x", "b": str(b), "c": "only", "d": "deep/./er//x"}
    digests = {label: store.load(label, path).result().digest for label, path in paths.items()}
    expected = [read_adapter(folder, MODEL, Limits()).digest for folder in (a, b, c, a)]
    assert list(digests.values()) == expected
    assert [info.path for info in store.info()] == ["deep/er/x", "deep/er/x", "only", "deep/er/x"]


FORBIDDEN = [
    "", ".", "..", "/", "//", "./", "../", "../root", "../outside", "../outside/", "x/../x",
    "../root/../outside", "x/../../outside", "good/..", "good/../good", "good/../../outside",
    "./../outside", "..\\outside", "good\\..\\..\\outside", "%2e%2e/outside", "%2e%2e%2foutside",
    "..%2foutside", "..;/outside", "....//outside", "..//outside", "...", ". .", "~", "~root",
    "~/outside", "$HOME", "${HOME}", "`id`", "$(id)", "|id", ";id", "good;id", "good&&id", "*",
    "g*d", "go?d", "[g]ood", "good\0", "\0", "good\0/../outside", "good\n", "good\r\n", "\tgood",
    "good\x1b[31m", "good\u2028", "\ud800", "file://good", "file:///etc/passwd", "file:good",
    "http://127.0.0.1/x", "https://h/x", "HTTP://h/x", "s3://bucket/x", "hf://org/x", "gs://b/x",
    "ftp://h/x", "data:,x", "\\\\host\\share", "//host/share", "C:\\x", "C:/x", "org/adapter",
    "org/adapter@main", "/etc", "/etc/passwd", "/etc/shadow", "/proc/self/environ",
    "/proc/self/fd/0", "/proc/self/cwd", "/proc/self/root", "/dev/zero", "/dev/stdin", "/dev/fd/0",
    "/sys", "/tmp", "escape", "escape/", "escape/.", "escape/sub", "up", "up/outside",
    "good/adapter_config.json", "good/adapter_config.json/", "good/adapter_model.safetensors",
    "good/link", "GOOD", "good ", " good", "g\u043e\u043ed", "absent", "absent/..", "a" * 255,
    "a" * 256, "a" * 5000, "a/" * 2000, "/" * 5000, "{outside}", "{outside}/", "{root}", "{root}/",
    "{root}/.", "{root}/..", "{root}/../outside", "{root}/escape", "{root}/good/../../outside",
    "{root}good", "{root}/absent", "{outside}/../root/../outside",
]  # fmt: skip


@pytest.mark.parametrize("path", FORBIDDEN, ids=ascii)
def test_absent_and_forbidden_paths_have_one_answer(
    stores: Stores, tmp_path: Path, path: str
) -> None:
    outside = _adapter(tmp_path, "outside")
    write(outside / "sub")
    good = _adapter(stores.root, "good")
    (good / "link").symlink_to(outside)
    (stores.root / "escape").symlink_to(outside)
    (stores.root / "up").symlink_to("..")
    store = stores()
    text = path.replace("{outside}", str(outside)).replace("{root}", str(stores.root))
    with pytest.raises(
        AdapterRejected, match=r"is no adapter folder below the adapter roots$"
    ) as e:
        store.load("x", text).result()
    assert e.value.param == "path" and e.value.message.isprintable()
    assert store.get("x") is None and store.names() == []


def test_a_link_that_moves_while_it_is_read_never_leads_out(stores: Stores, tmp_path: Path) -> None:
    inside = _adapter(stores.root, "inside", seed=1)
    outside = _adapter(tmp_path, "outside", seed=2)
    link, new = stores.root / "moving", stores.root / "new"
    link.symlink_to(inside)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for target in (outside, inside):
                new.symlink_to(target)
                new.rename(link)

    mover = threading.Thread(target=move)
    mover.start()
    store = stores()
    found = set()
    try:
        for _ in range(300):
            future = store.load("moving", replace=True)
            error = future.exception()
            assert error is None or isinstance(error, AdapterRejected)
            found.add("refused" if error else future.result().digest)
    finally:
        stop.set()
        mover.join()
    assert found <= {"refused", read_adapter(inside, MODEL, Limits()).digest}


@pytest.mark.parametrize(
    "label", ["", "a b", "../x", "a/b", ".x", "-x", "x" * 129, "x\0", "x\n", "ä", "a:b"]
)
def test_names_are_checked(stores: Stores, label: str) -> None:
    _adapter(stores.root, "good")
    with pytest.raises(AdapterRejected, match="is not an adapter name"):
        stores().load(label, "good").result()


def test_a_name_is_loaded_once_unless_it_is_replaced(stores: Stores) -> None:
    _adapter(stores.root, "a", seed=1)
    _adapter(stores.root, "b", seed=2)
    store = stores()
    old = store.load("x", "a").result()
    with pytest.raises(AdapterRejected, match="adapter 'x' is registered already"):
        store.load("x", "b").result()
    with pytest.raises(AdapterRejected, match="'base' is the base model's name"):
        store.load("base", "b", replace=True).result()
    assert store.get("x") is old
    new = store.load("x", "b", replace=True).result()
    assert store.get("x") is new and new != old
    assert store.load("y", "a", replace=True).result() == old


def test_a_failed_load_leaves_only_word_of_it(stores: Stores) -> None:
    folder = _adapter(stores.root, "x", use_dora=True)
    store = stores()
    with pytest.raises(AdapterRejected, match="use_dora"):
        store.load("x").result()
    assert store.get("x") is None and store.names() == []
    (info,) = store.info()
    assert (info.state, info.error) == (
        "failed",
        "use_dora is set: DoRA adapters are not supported",
    )
    with pytest.raises(UnknownModel, match="no adapter 'x' is registered"):
        store.unload("x")
    write(folder)
    store.load("x").result()
    assert [info.state for info in store.info()] == ["host"]


def test_a_failed_replacement_keeps_the_old_version(stores: Stores) -> None:
    folder = _adapter(stores.root, "x")
    store = stores()
    old = store.load("x").result()
    write(folder, {**CONFIG, "r": 3})
    with pytest.raises(AdapterRejected, match="rank 3"):
        store.load("x", replace=True).result()
    assert store.get("x") is old and [info.state for info in store.info()] == ["host"]


def test_remembered_failures_are_bounded(stores: Stores) -> None:
    store = stores()
    wait([store.load(f"x{i}") for i in range(MAX_FAILURES + 9)])
    assert len(store.info()) == MAX_FAILURES


def test_adapters_that_can_never_fit_are_refused(stores: Stores) -> None:
    ranks = {(0, "up_proj"): 13}
    write(stores.root / "x", {**CONFIG, "r": 13, "target_modules": ["0.mlp.up_proj"]}, draw(ranks))
    with pytest.raises(AdapterRejected, match="takes 3 pages; the pool has 2"):
        stores(limits=Limits(max_pages=2)).load("x").result()
    assert stores(limits=Limits(max_pages=3)).load("x").result().n_pages == 3
    needed = 3 * BLOB
    with pytest.raises(
        AdapterRejected, match=f"takes {needed} bytes of host memory; .* is {needed - 1}"
    ):
        stores(host_cache_bytes=needed - 1).load("x").result()


def test_unloading(stores: Stores) -> None:
    _adapter(stores.root, "x")
    store = stores()
    version = store.load("x").result()
    assert store.unload("x") is version
    assert store.get("x") is None and store.names() == [] and store.info() == []
    with pytest.raises(UnknownModel, match="no adapter 'x' is registered"):
        store.unload("x")
    assert store.packed(version) is not None  # who holds it may still use it
    assert store.load("x").result() == version


# The host tier -----------------------------------------------------------------------------------


def test_names_with_equal_contents_share_a_blob(stores: Stores) -> None:
    for label, seed in (("a", 1), ("b", 1), ("c", 2)):
        _adapter(stores.root, label, seed=seed)
    store = stores(host_cache_bytes=2 * BLOB)
    a, b, c = (store.load(label).result() for label in "abc")
    assert a == b != c and hash(a) == hash(b) and (a.name, b.name) == ("a", "b")
    assert store.packed(a) is store.packed(b)
    assert store.packed(c) is not None  # three names, two blobs: all are there


def test_the_least_recently_used_blob_leaves_and_comes_back(stores: Stores) -> None:
    for seed in range(4):
        _adapter(stores.root, f"x{seed}", seed=seed)
    store = stores(host_cache_bytes=3 * BLOB)
    versions = [store.load(f"x{seed}").result() for seed in range(3)]
    assert store.packed(versions[0]) is not None  # used again, so x1 is the oldest
    store.load("x3").result()
    assert [info.state for info in store.info()] == ["host", "registered", "host", "host"]
    first = store.fetch(versions[1])
    np.testing.assert_array_equal(first.result().rank, versions[1].rank)
    assert first.result().digest == versions[1].digest
    assert [info.state for info in store.info()] == ["host", "host", "registered", "host"]
    assert store.packed(versions[1]) is first.result()


def test_polling_brings_a_blob_back(stores: Stores) -> None:
    for seed in range(2):
        _adapter(stores.root, f"x{seed}", seed=seed)
    store = stores(host_cache_bytes=BLOB)
    old, _ = (store.load(f"x{seed}").result() for seed in range(2))
    assert store.packed(old) is None
    waiting = store.fetch(old)
    assert store.fetch(old) is waiting or waiting.done()  # one read for all who wait
    assert store.packed(old) is waiting.result() or store.packed(old) is not None


@pytest.mark.parametrize("damage", ["changed", "gone", "broken"])
def test_a_folder_that_changed_does_not_come_back(stores: Stores, damage: str) -> None:
    folder = _adapter(stores.root, "x", seed=1)
    _adapter(stores.root, "y", seed=2)
    store = stores(host_cache_bytes=BLOB)
    version = store.load("x").result()
    store.load("y").result()
    message = "adapter 'x' changed on disk"
    if damage == "changed":
        write(folder, weights=tensors(seed=9))
    elif damage == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        message = "is cut off"
    with pytest.raises(AdapterRejected, match=message):
        store.fetch(version).result()
    with pytest.raises(AdapterRejected, match=message):
        store.packed(version)
    write(folder, weights=tensors(seed=1))
    assert store.packed(version) is None  # the error was told once; this starts over
    assert store.fetch(version).result().digest == version.digest


def test_an_unloaded_blob_is_the_first_to_leave(stores: Stores) -> None:
    for seed in range(3):
        _adapter(stores.root, f"x{seed}", seed=seed)
    store = stores(host_cache_bytes=2 * BLOB)
    store.load("x0").result()
    newest = store.load("x1").result()
    store.unload("x1")
    store.load("x2").result()
    assert [info.state for info in store.info()] == ["host", "host"]
    assert store.get("x1") is None and newest.digest not in {i.digest for i in store.info()}


# Threads -----------------------------------------------------------------------------------------


class Gate:
    """Holds every read of an adapter until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        monkeypatch.setattr("jslora.adapters.store.read_adapter", self._read)

    def _read(self, *arguments: Any) -> Any:
        self.entered.release()
        assert self.open.wait(60)
        return read_adapter(*arguments)


def test_while_a_name_is_loading_nothing_else_may_change_it(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    _adapter(stores.root, "x")
    store = stores(workers=2)
    gate = Gate(monkeypatch)
    first = store.load("x")
    assert gate.entered.acquire(timeout=60)
    for second in (store.load("x"), store.load("x", replace=True)):
        with pytest.raises(AdapterRejected, match="adapter 'x' is being loaded"):
            second.result()
    with pytest.raises(AdapterRejected, match="adapter 'x' is being loaded"):
        store.unload("x")
    assert store.get("x") is None and [info.state for info in store.info()] == ["loading"]
    gate.open.set()
    assert first.result() is store.get("x")
    store.unload("x")


def test_an_old_version_serves_until_the_new_one_is_whole(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _adapter(stores.root, "x", seed=1)
    store = stores()
    old = store.load("x").result()
    blob = store.packed(old)
    write(folder, weights=tensors(seed=2))
    gate = Gate(monkeypatch)
    loading = store.load("x", replace=True)
    assert gate.entered.acquire(timeout=60)
    assert store.get("x") is old and [info.state for info in store.info()] == ["host"]
    gate.open.set()
    new = loading.result()
    assert store.get("x") is new and new != old
    assert store.packed(old) is blob is not None


def test_one_read_serves_all_who_wait(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        _adapter(stores.root, f"x{seed}", seed=seed)
    store = stores(host_cache_bytes=BLOB, workers=3)
    old, _ = (store.load(f"x{seed}").result() for seed in range(2))
    gate = Gate(monkeypatch)
    waiting = [store.fetch(old) for _ in range(5)]
    assert store.packed(old) is None
    assert gate.entered.acquire(timeout=60) and not gate.entered.acquire(timeout=0.05)
    gate.open.set()
    assert len({id(future.result()) for future in waiting}) == 1


def test_one_of_many_concurrent_loads_wins(stores: Stores) -> None:
    _adapter(stores.root, "x")
    store = stores(workers=4)
    barrier = threading.Barrier(8)
    outcomes: list[object] = []

    def load() -> None:
        barrier.wait()
        try:
            outcomes.append(store.load("x").result())
        except AdapterRejected as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert winners == [store.get("x")]
    refusals = {outcome for outcome in outcomes if isinstance(outcome, str)}
    assert refusals <= {"adapter 'x' is being loaded", "adapter 'x' is registered already"}


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["load", "replace", "unload", "use"]),
            st.sampled_from("pqr"),
            st.integers(0, 3),
        ),
        max_size=25,
    )
)
def test_any_sequence_of_operations_keeps_names_and_memory_right(
    stores: Stores, operations: list[tuple[str, str, int]]
) -> None:
    folders = {i: stores.root / f"x{i}" for i in range(4)}
    for seed, folder in folders.items():
        if not folder.exists():
            write(folder, weights=tensors(seed=seed))
    digests = {i: read_adapter(folder, MODEL, Limits()).digest for i, folder in folders.items()}
    store = stores(host_cache_bytes=2 * BLOB)
    expected: dict[str, str] = {}
    for operation, label, source in operations:
        if operation in ("load", "replace"):
            future = store.load(label, f"x{source}", replace=operation == "replace")
            if operation == "load" and label in expected:
                assert isinstance(future.exception(), AdapterRejected)
            else:
                expected[label] = future.result().digest
                assert expected[label] == digests[source]
        elif label not in expected:
            assert store.get(label) is None
        elif operation == "unload":
            assert store.unload(label).digest == expected.pop(label)
        else:
            version = store.get(label)
            assert version is not None and store.fetch(version).result().digest == version.digest
        assert store.names() == sorted(expected)
        assert {info.name: info.digest for info in store.info()} == expected
        in_memory = {info.digest for info in store.info() if info.state == "host"}
        assert len(in_memory) <= 2
    store.close()


def test_other_errors_reach_the_caller_and_show_nothing(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("at 0xdeadbeef")

    _adapter(stores.root, "x")
    store = stores()
    monkeypatch.setattr("jslora.adapters.store.read_adapter", broken)
    with pytest.raises(MemoryError):
        store.load("x").result()
    assert [info.error for info in store.info()] == ["internal error"]
    monkeypatch.undo()
    store.load("x").result()


def test_no_error_names_a_place_outside_the_roots(stores: Stores, tmp_path: Path) -> None:
    broken = {
        "config": ("adapter_config.json", b"{"),
        "weights": ("adapter_model.safetensors", b"{}"),
    }
    store = stores()
    for label, (file, data) in broken.items():
        (_adapter(stores.root, label) / file).write_bytes(data)
        error = store.load(label).exception()
        assert isinstance(error, AdapterRejected) and str(tmp_path) not in error.message
    weights = {**tensors(), name(0, "v_proj", "A"): np.ones((2, 32), np.float32)}
    write(stores.root / "stray", weights=weights)
    error = store.load("stray").exception()
    assert isinstance(error, AdapterRejected) and "v_proj.lora_A" in error.message
