"""Names, versions and tiers: what is registered, what is shared, what stays out, and when."""

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import CONFIG, MODEL, draw, name, tensors, write
from stores import BLOB, F32, PAGE, Stores, blob_of, make_folder, poll, states, version_of

from jslora.adapters.cache import PackedCache
from jslora.adapters.layout import pack
from jslora.adapters.peft import Limits, read_adapter
from jslora.adapters.store import MAX_FAILURES, AdapterStore
from jslora.errors import AdapterRejected, Unavailable, UnknownModel
from jslora.split import Split

# Finding and loading -----------------------------------------------------------------------------


def test_discovery_is_sorted_and_skips_what_cannot_be_served(
    stores: Stores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = make_folder(tmp_path, "outside")
    for label in ("zeta", "alpha", "base", "bad name", ".hidden", "-dash"):
        make_folder(stores.root, label)
    (stores.root / "escape").symlink_to(outside)
    (stores.root / "inside").symlink_to(stores.root / "zeta")
    (stores.root / "empty").mkdir()
    (stores.root / "file").write_text("")
    second = tmp_path / "second"
    make_folder(second, "alpha", seed=1)
    make_folder(second, "beta")

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


def test_a_split_adapter_is_reported_whole(stores: Stores) -> None:
    """A process with one of two devices keeps half of the bytes, and tells the true rank."""
    folder = make_folder(stores.root, "sql", target_modules=["q_proj", "down_proj"])
    whole = stores().load("sql").result()
    split, devices = Split(2, fully=True), range(1, 2)
    cache = PackedCache(stores.cache_folder, MODEL, PAGE // 2, F32, 2**30, split, devices)
    limits: Any = {"limits": Limits(), "host_cache_bytes": 2**20, "base_name": "base"}
    store = AdapterStore(
        (stores.root,), MODEL, PAGE // 2, F32, **limits, cache=cache, split=split, devices=devices
    )
    stores.made.append(store)
    part = store.load("sql").result()
    assert (part.info.rank, part.info.modules) == (whole.info.rank, whole.info.modules)
    assert whole.version is not None and part.version is not None
    assert part.version.digest == whole.version.digest
    assert 2 * part.version.rank[0, 0] == whole.version.rank[0, 0]
    assert 2 * part.version.packed_bytes == whole.version.packed_bytes
    adapter = read_adapter(folder, MODEL, Limits())
    expected = pack(adapter, MODEL, PAGE // 2, F32, split, devices)
    np.testing.assert_array_equal(blob_of(store, part), expected.blob)


def test_a_loaded_adapter_is_packed_and_described(stores: Stores) -> None:
    folder = make_folder(stores.root, "sql", base_model_name_or_path="org/Base")
    store = stores()
    registration = store.load("sql").result()
    adapter = read_adapter(folder, MODEL, Limits())
    expected = pack(adapter, MODEL, PAGE, F32)
    version = store.resolve(registration)
    assert version is not None and store.get("sql") is registration
    blob = store.blob(version)
    assert blob is not None and not blob.flags.writeable
    np.testing.assert_array_equal(blob, expected.blob)
    for field in ("a_offset", "b_offset", "rank", "scale"):
        np.testing.assert_array_equal(getattr(version, field), getattr(expected, field))
    assert (version.digest, version.n_pages) == (adapter.digest, 1)
    (info,) = store.infos()
    assert (info.name, info.state, info.rank, info.layers) == ("sql", "host", 2, 3)
    assert info.modules == {"q_proj": (2, 2, 2.0), "down_proj": (2, 2, 2.0)}
    assert (info.pages, info.bytes, info.path) == (1, adapter.bytes, "sql")
    assert (info.digest, info.bytes_host, info.in_flight) == (adapter.digest, BLOB, 0)
    assert info.bytes_disk > BLOB and info.seconds.keys() == {"read", "pack", "store"}
    assert info.padding == pytest.approx(1 - adapter.bytes / BLOB)
    assert info.warnings == () and info.base_model == "org/Base"


def test_another_base_is_a_warning(stores: Stores) -> None:
    make_folder(
        stores.root, "sql", base_model_name_or_path="org/other", rank_pattern={"nothing": 1}
    )
    info = stores().load("sql").result().info
    assert info.warnings == (
        "rank_pattern: no targeted module matches nothing",
        "it was trained for org/other; the base here is base",
    )


def test_paths_resolve_below_the_roots_in_order(stores: Stores, tmp_path: Path) -> None:
    second = tmp_path / "second"
    a = make_folder(stores.root / "deep" / "er", "x", seed=1)
    b = make_folder(second / "deep" / "er", "x", seed=2)
    c = make_folder(second, "only", seed=3)
    store = stores(stores.root, second)
    paths = {"a": "deep/er/x", "b": str(b), "c": "only", "d": "deep/./er//x"}
    digests = {
        label: version_of(store, store.load(label, path).result()).digest
        for label, path in paths.items()
    }
    expected = [read_adapter(folder, MODEL, Limits()).digest for folder in (a, b, c, a)]
    assert list(digests.values()) == expected
    assert [info.path for info in store.infos()] == ["deep/er/x", "deep/er/x", "only", "deep/er/x"]


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


def _load(store: AdapterStore, label: str, path: str) -> None:
    store.load(label, path).result()


@pytest.mark.parametrize("method", [_load, AdapterStore.register])
@pytest.mark.parametrize("path", FORBIDDEN, ids=ascii)
def test_absent_and_forbidden_paths_have_one_answer(
    stores: Stores, tmp_path: Path, path: str, method: Any
) -> None:
    outside = make_folder(tmp_path, "outside")
    write(outside / "sub")
    good = make_folder(stores.root, "good")
    (good / "link").symlink_to(outside)
    (stores.root / "escape").symlink_to(outside)
    (stores.root / "up").symlink_to("..")
    store = stores()
    text = path.replace("{outside}", str(outside)).replace("{root}", str(stores.root))
    with pytest.raises(
        AdapterRejected, match=r"is no adapter folder below the adapter roots$"
    ) as e:
        method(store, "x", text)
    assert e.value.param == "path" and e.value.message.isprintable()
    assert store.get("x") is None and store.names() == []


def test_a_link_that_moves_while_it_is_read_never_leads_out(stores: Stores, tmp_path: Path) -> None:
    inside = make_folder(stores.root, "inside", seed=1)
    outside = make_folder(tmp_path, "outside", seed=2)
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
            found.add("refused" if error else version_of(store, future.result()).digest)
    finally:
        stop.set()
        mover.join()
    assert found <= {"refused", read_adapter(inside, MODEL, Limits()).digest}


@pytest.mark.parametrize(
    "label", ["", "a b", "../x", "a/b", ".x", "-x", "x" * 129, "x\0", "x\n", "ä", "a:b"]
)
def test_names_are_checked(stores: Stores, label: str) -> None:
    make_folder(stores.root, "good")
    with pytest.raises(AdapterRejected, match="is not an adapter name"):
        stores().load(label, "good").result()


def test_a_name_is_loaded_once_unless_it_is_replaced(stores: Stores) -> None:
    make_folder(stores.root, "a", seed=1)
    make_folder(stores.root, "b", seed=2)
    store = stores()
    old = store.load("x", "a").result()
    with pytest.raises(AdapterRejected, match="adapter 'x' is registered already"):
        store.load("x", "b").result()
    with pytest.raises(AdapterRejected, match="'base' is the base model's name"):
        store.load("base", "b", replace=True).result()
    assert store.get("x") is old
    new = store.load("x", "b", replace=True).result()
    assert store.get("x") is new and new.version != old.version and not old.named
    assert store.load("y", "a", replace=True).result().version == old.version


def test_a_failed_load_leaves_only_word_of_it(stores: Stores) -> None:
    folder = make_folder(stores.root, "x", use_dora=True)
    store = stores()
    with pytest.raises(AdapterRejected, match="use_dora"):
        store.load("x").result()
    assert store.get("x") is None and store.names() == []
    (info,) = store.infos()
    assert info == store.info("x") and store.stats.failures == 1
    assert (info.state, info.error) == (
        "failed",
        "use_dora is set: DoRA adapters are not supported",
    )
    with pytest.raises(UnknownModel, match="no adapter 'x' is registered"):
        store.unload("x")
    write(folder)
    store.load("x").result()
    assert states(store) == [("x", "host")]


def test_a_failed_replacement_keeps_the_old_version(stores: Stores) -> None:
    folder = make_folder(stores.root, "x")
    store = stores()
    old = store.load("x").result()
    write(folder, {**CONFIG, "r": 3})
    with pytest.raises(AdapterRejected, match="rank 3"):
        store.load("x", replace=True).result()
    assert store.get("x") is old and states(store) == [("x", "host")]
    assert "rank 3" in (store.info("x").error or "")
    write(folder)
    store.load("x", replace=True).result()
    assert store.info("x").error is None


def test_remembered_failures_are_bounded(stores: Stores) -> None:
    store = stores()
    wait([store.load(f"x{i}") for i in range(MAX_FAILURES + 9)])
    assert len(store.infos()) == MAX_FAILURES


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


# Holding -----------------------------------------------------------------------------------------


def test_unloading_what_nobody_uses_frees_it(stores: Stores) -> None:
    make_folder(stores.root, "x")
    store = stores()
    registration = store.load("x").result()
    version = version_of(store, registration)
    assert store.unload("x") is registration and not registration.named
    assert store.get("x") is None and store.names() == [] and store.infos() == []
    assert store.stats.host_bytes == 0 and not store.holds(version.digest)
    assert store.take_dead() == [version.digest] and store.take_dead() == []
    for method in (store.unload, store.bind, store.info):
        with pytest.raises(UnknownModel, match="no adapter 'x' is registered"):
            method("x")
    assert store.load("x").result().version == version


def test_a_sequence_keeps_what_it_was_bound_to(stores: Stores) -> None:
    folder = make_folder(stores.root, "x", seed=1)
    store = stores()
    store.load("x").result()
    old = store.bind("x")
    blob = blob_of(store, old)
    write(folder, weights=tensors(seed=2))
    new = store.load("x", replace=True).result()
    assert store.bind("x") is new and not np.array_equal(blob_of(store, new), blob)
    store.unload("x")
    reports = [(info.state, info.in_flight, info.digest) for info in store.infos()]
    assert reports == [
        ("draining", 1, version_of(store, old).digest),
        ("draining", 1, version_of(store, new).digest),
    ]
    np.testing.assert_array_equal(blob_of(store, old), blob)
    store.release(old)
    assert store.take_dead() == [version_of(store, old).digest]
    store.release(new)
    assert store.infos() == [] and store.stats.host_bytes == 0
    with pytest.raises(AssertionError, match="adapter 'x' is not in use"):
        store.release(new)


def test_an_old_version_outlives_its_folder(stores: Stores) -> None:
    """Its blob left memory, and its folder has other contents: the cache has it still."""
    folder = make_folder(stores.root, "x", seed=1)
    make_folder(stores.root, "y", seed=3)
    store = stores(host_cache_bytes=BLOB)
    store.load("x").result()
    old = store.bind("x")
    blob = blob_of(store, old)
    write(folder, weights=tensors(seed=2))
    store.load("x", replace=True).result()
    store.load("y").result()
    assert [info.bytes_host for info in store.infos()] == [0, 0, BLOB]
    np.testing.assert_array_equal(blob_of(store, old), blob)


def test_the_dead_are_asked_again_when_they_are_told(stores: Stores) -> None:
    make_folder(stores.root, "x")
    store = stores()
    version = store.load("x").result().version
    store.unload("x")
    store.load("x").result()
    assert version is not None and store.holds(version.digest) and store.take_dead() == []


# The host tier -----------------------------------------------------------------------------------


def test_names_with_equal_contents_share_a_version_and_a_blob(stores: Stores) -> None:
    for label, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_folder(stores.root, label, seed=seed)
    store = stores(host_cache_bytes=2 * BLOB)
    a, b, c = (version_of(store, store.load(label).result()) for label in "abc")
    assert a is b and a != c and hash(a) == hash(b)
    assert store.stats.host_count == 2 and store.stats.host_bytes == 2 * BLOB
    store.unload("a")
    assert store.blob(b) is not None and store.take_dead() == []
    store.unload("b")
    assert store.stats.host_count == 1 and store.take_dead() == [a.digest]


def test_the_least_recently_used_blob_leaves_and_comes_back(stores: Stores) -> None:
    for seed in range(4):
        make_folder(stores.root, f"x{seed}", seed=seed)
    store = stores(host_cache_bytes=3 * BLOB)
    names = [store.load(f"x{seed}").result() for seed in range(3)]
    blobs = [blob_of(store, registration) for registration in names]
    store.prefetch(names[0])  # used again, so x1 is the oldest
    store.load("x3").result()
    assert [state for _, state in states(store)] == ["host", "registered", "host", "host"]
    np.testing.assert_array_equal(blob_of(store, names[1]), blobs[1])
    assert [state for _, state in states(store)] == ["host", "host", "registered", "host"]
    assert store.info("x1").seconds.keys() == {"map"} and store.stats.seconds["map"] > 0


@pytest.mark.parametrize("change", ["changed", "gone", "broken"])
def test_without_the_cache_a_folder_must_have_its_contents_still(
    stores: Stores, change: str
) -> None:
    folder = make_folder(stores.root, "x", seed=1)
    make_folder(stores.root, "y", seed=2)
    store = stores(host_cache_bytes=BLOB, cache=stores.cache(0))
    version = version_of(store, store.load("x").result())
    store.load("y").result()
    weights = folder / "adapter_model.safetensors"
    message = {
        "changed": "adapter 'x' changed on disk; load it again",
        "gone": "the folder holds no adapter_model",
        "broken": "is cut off",
    }[change]
    if change == "changed":
        write(folder, weights=tensors(seed=9))
    elif change == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"x")
    assert store.blob(version) is None
    with pytest.raises(AdapterRejected, match=message):
        poll(lambda: store.blob(version))
    assert states(store) == [("x", "failed"), ("y", "host")] and store.info("x").error
    write(folder, weights=tensors(seed=1))
    assert store.blob(version) is None  # the error was told once; this starts over
    assert poll(lambda: store.blob(version)) is not None
    assert store.info("x").error is None and store.info("x").state == "host"


def test_another_folder_with_the_contents_will_do(stores: Stores) -> None:
    first = make_folder(stores.root, "a", seed=1)
    make_folder(stores.root, "b", seed=1)
    make_folder(stores.root, "c", seed=2)
    store = stores(host_cache_bytes=BLOB, cache=stores.cache(0))
    version = version_of(store, store.load("a").result())
    for label in "bc":
        store.load(label).result()
    write(first, weights=tensors(seed=3))
    assert poll(lambda: store.blob(version)) is not None


def test_what_the_device_says_is_reported(stores: Stores) -> None:
    make_folder(stores.root, "x")
    store = stores()
    digest = version_of(store, store.load("x").result()).digest
    store.note_failure(digest, "no transfer")
    assert store.info("x").error == "no transfer" and store.stats.failures == 1
    store.note_seconds(digest, "transfer", 0.5)
    assert store.info("x").error is None and store.info("x").seconds["transfer"] == 0.5
    store.note_seconds("0" * 64, "transfer", 0.25)
    assert store.stats.seconds["transfer"] == 0.75


# Threads -----------------------------------------------------------------------------------------


class Gate:
    """Holds every whole read of an adapter until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        monkeypatch.setattr("jslora.adapters.reader.read_adapter", self._read)

    def _read(self, *arguments: Any) -> Any:
        self.entered.release()
        assert self.open.wait(60)
        return read_adapter(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_while_a_name_is_loading_nothing_else_may_change_it(stores: Stores, gate: Gate) -> None:
    make_folder(stores.root, "x")
    store = stores()
    first = store.load("x")
    assert gate.entered.acquire(timeout=60)
    for second in (store.load("x"), store.load("x", replace=True)):
        with pytest.raises(AdapterRejected, match="adapter 'x' is being loaded"):
            second.result()
    for method in (store.unload, store.register):
        with pytest.raises(AdapterRejected, match="adapter 'x' is being loaded"):
            method("x")
    assert store.get("x") is None and states(store) == [("x", "loading")]
    gate.open.set()
    assert first.result() is store.get("x")
    store.unload("x")


def test_an_old_version_serves_until_the_new_one_is_whole(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(stores.root, "x", seed=1)
    store = stores()
    old = store.load("x").result()
    write(folder, weights=tensors(seed=2))
    gate = Gate(monkeypatch)
    loading = store.load("x", replace=True)
    assert gate.entered.acquire(timeout=60)
    assert store.bind("x") is old and states(store) == [("x", "host")]
    gate.open.set()
    new = loading.result()
    assert store.get("x") is new and new.version != old.version
    assert old.version is not None and store.blob(old.version) is not None


def test_a_long_read_delays_no_blob_that_is_cached(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, label in enumerate("abc"):
        make_folder(stores.root, label, seed=seed)
    store = stores(host_cache_bytes=BLOB)
    a = store.load("a").result()
    store.load("b").result()
    gate = Gate(monkeypatch)
    reading = store.load("c")
    assert gate.entered.acquire(timeout=60)
    assert blob_of(store, a) is not None
    store.unload("b")
    assert store.load("b").result(60).version is not None  # known, and cached
    assert not reading.done()
    gate.open.set()
    reading.result()


def test_one_read_serves_all_who_wait(stores: Stores, gate: Gate) -> None:
    make_folder(stores.root, "x")
    store = stores()
    registration = store.register("x")
    for _ in range(5):
        assert store.resolve(registration) is None
        store.prefetch(registration)
    assert gate.entered.acquire(timeout=60) and not gate.entered.acquire(timeout=0.05)
    assert states(store) == [("x", "loading")]
    gate.open.set()
    assert blob_of(store, registration) is not None
    assert not gate.entered.acquire(timeout=0.05)


def test_one_of_many_concurrent_loads_wins(stores: Stores) -> None:
    make_folder(stores.root, "x")
    store = stores()
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


def test_a_name_may_be_loaded_again_as_soon_as_it_is_loaded(stores: Stores) -> None:
    make_folder(stores.root, "x")
    store = stores()
    for _ in range(300):
        store.load("x", replace=True).result(60)


def test_what_is_released_while_it_is_read_leaves_nothing(stores: Stores, gate: Gate) -> None:
    make_folder(stores.root, "x")
    store = stores()
    registration = store.register("x")
    store.prefetch(registration)
    assert gate.entered.acquire(timeout=60)
    store.unload("x")
    gate.open.set()
    store.close()
    assert registration.version is None and store.stats.host_bytes == 0
    assert store.infos() == [] and store.take_dead() == []


def test_closing_tells_who_waits(stores: Stores, gate: Gate) -> None:
    for label in "abc":
        make_folder(stores.root, label)
    store = stores()
    loads = [store.load(label) for label in "abc"]
    assert gate.entered.acquire(timeout=60)
    threading.Timer(0.2, gate.open.set).start()
    store.close()
    for load in (*loads, store.load("d")):
        error = load.exception(0)
        assert error is None or isinstance(error, Unavailable)
    assert isinstance(loads[2].exception(), Unavailable) and not gate.entered.acquire(timeout=0.05)
    with pytest.raises(Unavailable, match="the engine was closed"):
        store.register("a")


def test_other_errors_reach_the_caller_and_show_nothing(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("at 0xdeadbeef")

    make_folder(stores.root, "x")
    make_folder(stores.root, "y")
    store = stores()
    registration = store.register("y")
    monkeypatch.setattr("jslora.adapters.reader.read_adapter", broken)
    with pytest.raises(MemoryError):
        store.load("x").result()
    with pytest.raises(AdapterRejected, match=r"^internal error$"):
        version_of(store, registration)
    assert [info.error for info in store.infos()] == ["internal error"] * 2
    assert "0xdeadbeef" in caplog.text  # the log has it
    monkeypatch.undo()
    store.load("x").result()


def test_no_error_names_a_place_outside_the_roots(stores: Stores, tmp_path: Path) -> None:
    broken = {
        "config": ("adapter_config.json", b"{"),
        "weights": ("adapter_model.safetensors", b"{}"),
    }
    store = stores()
    for label, (file, data) in broken.items():
        (make_folder(stores.root, label) / file).write_bytes(data)
        error = store.load(label).exception()
        assert isinstance(error, AdapterRejected) and str(tmp_path) not in error.message
    weights = {**tensors(), name(0, "v_proj", "A"): np.ones((2, 32), np.float32)}
    write(stores.root / "stray", weights=weights)
    error = store.load("stray").exception()
    assert isinstance(error, AdapterRejected) and "v_proj.lora_A" in error.message
