"""The configuration: what is wrong is named, with what is allowed; secrets are never shown."""

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from jslora.config import EngineConfig, Key, load, parse
from jslora.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"source": "m"}}
SECRET = "sk-Quite.Secret/123"
TENANTS: dict[str, Any] = {
    "policy": ["priority", "fair_tenants", "slo"],
    "tenants": {"a": {"share": 3, "max_outstanding": 7}, "*": {"priority": 1, "ttft_slo": 2.5}},
    "adapters": {"sql": {"tokens_per_minute": 600}},
}
CONFIGS = Path(__file__).parents[1] / "configs"


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse(data)
    return error.value.message


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# What is read ------------------------------------------------------------------------------------


OTHERS = ("k8s", "train")
SHIPPED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name not in OTHERS]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_configurations_we_ship_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"\$\{(\w+)\}", path.read_text()):
        monkeypatch.setenv(name, f"secret of {name}")
    assert load(path).model.source


def test_everything_but_the_source_has_a_default() -> None:
    assert parse(MINIMAL) == EngineConfig.model_validate(
        {"model": {"source": "m", "dtype": "bfloat16"}, "server": {"port": 8000}}
    )
    assert refused({}) == "model: required"
    assert refused({"model": {}}) == "model.source: required"


def test_a_configuration_survives_the_way_to_the_engine_process() -> None:
    adapters = {"host_cache_bytes": "1.5GiB", "roots": ["/a"]}
    for scheduler in ({}, TENANTS, TENANTS | {"policy": [], "tenants": {"a": {}}}):
        config = parse(MINIMAL | {"adapters": adapters, "scheduler": scheduler})
        assert EngineConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), (17, 17), ("2KiB", 2048), ("1.5 MiB", 3 * 2**19), ("2GiB", 2**31)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse(MINIMAL | {"server": {"max_body_bytes": text}}).server.max_body_bytes == size


@pytest.mark.parametrize("text", ["5KB", "GiB", "-1", "1e3", "", "1 2", True, None, [], "5 gib"])
def test_what_is_no_size_is_refused(text: object) -> None:
    message = refused(MINIMAL | {"server": {"max_body_bytes": text}})
    assert message.startswith(f"server.max_body_bytes: {text!r} is not a size; write bytes or")


def test_paths_at_home_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    config = parse(MINIMAL | {"cache_dir": "~/c", "adapters": {"roots": ["~/a", "b"]}})
    assert config.cache_dir == Path("/home/x/c")
    assert config.adapters.roots == [Path("/home/x/a"), Path("b")]


def test_a_root_may_have_come_with_the_package() -> None:
    config = parse(MINIMAL | {"adapters": {"roots": ["package:jslora/training/demo"]}})
    assert (config.adapters.roots[0] / "facts.yaml").is_file()
    assert parse(json.loads(config.model_dump_json())) == config


def test_nothing_is_made_in_the_package() -> None:
    roots = ["package:jslora/demo_adapters", "mine"]
    adapters = {"roots": roots, "synthetic": {"count": 1}}
    assert "the first of roots" in refused(MINIMAL | {"adapters": adapters})
    parse(MINIMAL | {"adapters": adapters | {"roots": roots[::-1]}})


@pytest.mark.parametrize(
    "name", ["", "jslora", "jslora/none", "jslora/../tests", "/etc", "numpy/lib"]
)
def test_other_packages_and_folders_are_no_roots(name: str) -> None:
    message = refused(MINIMAL | {"adapters": {"roots": [f"package:{name}"]}})
    assert message.startswith(
        "adapters.roots.0: after package: a folder of the package is expected"
    )


# Unknown keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modle": {}}, "modle: unknown key; the nearest valid key is 'model'"),
        ({"pool": {"sise": 8}}, "pool.sise: unknown key; the nearest valid key is 'page_size'"),
        (
            {"adapters": {"synthetic": {"count": 1, "rank": 8}}},
            "adapters.synthetic.rank: unknown key; the nearest valid key is 'ranks'",
        ),
        (
            {"auth": {"keys": {SECRET: {"tenent": "a"}}}},
            "auth.keys.<key>.tenent: unknown key; the nearest valid key is 'tenant'",
        ),
        (
            {"scheduler": {"tenants": {"sql-team": {"shares": 2}}}},
            "scheduler.tenants.sql-team.shares: unknown key; the nearest valid key is 'share'",
        ),
        (
            {"scheduler": {"adapters": {"*": {"sharing": 2}}}},
            "scheduler.adapters.*.sharing: unknown key; the nearest valid key is 'share'",
        ),
        ({"auth": {"key": {}}}, "auth.key: unknown key; the nearest valid key is 'keys'"),
    ],
)  # fmt: skip
def test_unknown_keys_are_named_with_the_nearest_valid_one(data: dict, message: str) -> None:
    assert message in refused(MINIMAL | data).split("; model")[0]


Place = tuple[tuple[str, ...], str]


def sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[Place]:
    """Every key of every section with the path to it; a mapping of sections has one named "x"."""
    found = []
    for name, field in model.model_fields.items():
        found.append((path, name))
        inner = get_args(field.annotation)
        named = ("x",) if get_origin(field.annotation) is dict else ()
        for part in (field.annotation, *inner):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += sections(part, (*path, name, *named))
    return found


@pytest.mark.parametrize(("path", "key"), sections(EngineConfig), ids=str)
def test_a_slip_of_any_key_at_any_depth_leads_back_to_it(path: tuple[str, ...], key: str) -> None:
    slip = key + "q"
    data: Any = {slip: 1}
    for part in reversed(path):
        data = {part: data}
    message = refused(data)
    assert f"{'.'.join((*path, slip))}: unknown key; the nearest valid key is {key!r}" in message


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pool": {"page_size": 7}}, "pool.page_size: Input should be 8, 16, 32 or 64 (got 7)"),
        ({"pool": {"memory_fraction": 1.5}}, "pool.memory_fraction: Input should be less than or"),
        ({"server": {"port": "x"}}, "server.port: Input should be a valid integer"),
        ({"scheduler": {"max_running": 0}}, "scheduler.max_running: Input should be greater than"),
        ({"kernels": "cuda"}, "'auto', 'triton', 'pallas' or 'reference' (got 'cuda')"),
        ({"model": {"source": "m", "served_name": "a b"}}, "model.served_name: String should"),
        ({"model": {"source": "dummy"}}, "model.architecture is required when model.source is d"),
        ({"mesh": {"data": 2}}, "replicas are servers of their own behind a router"),
        (
            {"mesh": {"model": 3}, "distributed": {
                "num_processes": 2, "coordinator": "h:1", "token": "s" * 16}},
            "mesh.model is 3: so many devices cannot be divided equally among",
        ),
        ({"distributed": {"num_processes": 2}}, "distributed: coordinator is required"),
        ({"server": {"host": "0.0.0.0"}}, "server.host is '0.0.0.0': set auth.keys, or bind to"),
        ({"adapters": []}, "adapters: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_what_is_allowed(data: dict, message: str) -> None:
    assert message in refused(MINIMAL | data)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_without_keys_only_this_machine_is_served(host: str) -> None:
    parse(MINIMAL | {"server": {"host": host}})
    parse(MINIMAL | {"server": {"host": "0.0.0.0"}, "auth": {"keys": {SECRET: {}}}})


def test_all_that_is_wrong_is_told_at_once() -> None:
    message = refused(MINIMAL | {"pool": {"pages": 1}, "server": {"port": -1}, "x": 1})
    assert all(name in message for name in ("pool.pages", "server.port", "x: unknown key"))


# The file and --set ------------------------------------------------------------------------------


def test_overrides_come_last_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: m}\npool: {pages: 5}\n")
    config = load(path, [
        "pool.pages=7", "pool.pages=9", "server.port=1", "adapters.roots=[/a, /b]",
        "model.served_name=x", "adapters.synthetic.count=3", "adapters.max_file_bytes=1KiB",
    ])  # fmt: skip
    assert (config.pool.pages, config.server.port, config.model.served_name) == (9, 1, "x")
    assert config.adapters.roots == [Path("/a"), Path("/b")]
    assert config.adapters.synthetic and config.adapters.synthetic.count == 3
    assert config.adapters.max_file_bytes == 1024
    assert load(path, ["pool.pages=null"]).pool.pages is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pool.pages", "--set 'pool.pages': expected section.key=value"),
        ("=5", "--set '=5': expected section.key=value"),
        ("model.source.x=5", "--set 'model.source.x=5': 'source' is not a section"),
        ("pool.pages=[", "--set 'pool.pages=[': the value is not valid YAML: .*(line 1, column 2)"),
        ("pool.pags=5", "pool.pags: unknown key; the nearest valid key is 'pages'"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "model: {source: m}\n")
    start, _, end = message.partition(".*")
    with pytest.raises(ConfigError) as error:
        load(path, [override])
    assert error.value.message.startswith(start) and error.value.message.endswith(end)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of sections, got NoneType"),
        ("[model]", "expected a mapping of sections, got list"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here (line 1, column 5)"),
        ("a: [1", "is not valid YAML: expected ',' or ']'"),
        ("a: 2024-13-45", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a: \0", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text))
    assert message in error.value.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {source: \xe9}")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(tmp_path / "latin.yaml")


# Secrets -----------------------------------------------------------------------------------------


def test_variables_are_replaced_below_auth_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_KEY", SECRET)
    monkeypatch.setenv("TEAM", "sql")
    rights = {"adapters": ["a-${TEAM}"]}
    config = parse({"model": {"source": "${TEAM}"}, "auth": {"keys": {"${TEAM_KEY}": rights}}})
    assert config.auth.keys == {SECRET: Key(adapters=["a-sql"])}
    assert config.model.source == "${TEAM}"


def test_a_variable_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    message = refused(MINIMAL | {"auth": {"keys": {"${NO_SUCH_KEY}": {}}}})
    assert message == "auth: the environment variable NO_SUCH_KEY is not set"


@pytest.mark.parametrize("value", ["", "  \n"])
def test_an_empty_secret_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It would let in whoever sends no key."""
    monkeypatch.setenv("TEAM_KEY", value)
    assert "at least 1 character" in refused(MINIMAL | {"auth": {"keys": {"${TEAM_KEY}": {}}}})


def test_a_secret_read_from_a_file_may_end_in_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Header values come without white space around them."""
    monkeypatch.setenv("TEAM_KEY", SECRET + "\n")
    assert parse(MINIMAL | {"auth": {"keys": {"${TEAM_KEY}": {}}}}).auth.keys == {SECRET: Key()}


MISPLACED = [
    SECRET,
    [SECRET],
    {SECRET: {}},
    {"keys": SECRET},
    {"keys": [SECRET]},
    {"keys": {SECRET: SECRET}},
    {"keys": {SECRET: [SECRET]}},
    {"keys": {SECRET: {"tenant": SECRET + "!"}}},
    {"keys": {SECRET: {"share": SECRET}}},
    {"keys": {SECRET: {"admin": SECRET}}},
    {"keys": {SECRET: {"adapters": SECRET}}},
    {"keys": {SECRET: {"adapters": {SECRET: 1}}}},
    {"keys": {SECRET: {"adapters": [[SECRET]]}}},
    {"keys": {SECRET: {SECRET: {}}}},
    {"keys": {"a": {"tenant": [{SECRET: SECRET}]}}},
]


@pytest.mark.parametrize("auth", MISPLACED, ids=str)
def test_no_error_shows_a_secret_wherever_it_was_put(auth: object) -> None:
    message = refused(MINIMAL | {"auth": auth})
    assert "auth" in message and SECRET not in message


@pytest.mark.parametrize(
    "text",
    [
        f"auth: {{keys: {{{SECRET}: {{tenant: a}}\n",
        f"auth:\n  keys:\n    {SECRET}: tenant: a\n",
        f"auth:\n  keys:\n    *{SECRET.lower().replace('.', '').replace('/', '')}: {{}}\n",
        f"auth:\n  keys:\n    !{SECRET} : {{}}\n",
        f"auth: {{keys: {{'{SECRET}: {{}}}}}}\n",
        f"auth.keys.{SECRET}: {{tenant: a}}\n",
    ],
)
def test_no_error_of_a_file_shows_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, "model: {source: m}\n" + text))
    assert "quite" not in error.value.message.lower().replace(str(tmp_path).lower(), "")


@pytest.mark.parametrize(
    "override",
    [
        f"auth.{SECRET}",
        f"auth={SECRET}",
        f"auth.keys.{SECRET}.tenant=[",
        f"auth.keys={{{SECRET}: {{",
        f"auth.keys={{{SECRET}: !x y}}",
        f"auth.keys.a.share={SECRET}",
    ],
)
def test_no_error_of_an_override_shows_a_secret(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, "model: {source: m}\n"), [override])
    assert "auth" in error.value.message and "Secret" not in error.value.message


def test_a_configuration_shows_no_secret() -> None:
    config = parse(MINIMAL | {"auth": {"keys": {SECRET: {}}}})
    for text in (repr(config), str(config), repr(config.auth), f"{config.auth}"):
        assert SECRET not in text


# Anything ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = sorted({name for _, name in sections(EngineConfig)} | {"x"})


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(EngineConfig.model_fields)),
        JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
        max_size=4,
    )
)
def test_whatever_is_given_is_read_or_refused(data: dict) -> None:
    with contextlib.suppress(ConfigError):
        parse(MINIMAL | data)


@settings(deadline=None)
@given(st.text(max_size=40) | st.builds(yaml.safe_dump, JSON))
def test_whatever_a_file_holds_is_read_or_refused(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"config-{next(_names)}.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(ConfigError):
        load(path)
    path.unlink()


_names = itertools.count()
