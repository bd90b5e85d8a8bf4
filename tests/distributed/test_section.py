"""The section `distributed`: what is refused, and that its token is nowhere to be seen."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jslora import config
from jslora.distributed import environment
from jslora.distributed.agreement import agreement, differences
from jslora.distributed.interface import address_of
from jslora.distributed.section import DistributedSection, split_address
from jslora.errors import ConfigError
from jslora.memory.budget import plan_memory
from jslora.model.config import ModelConfig
from jslora.server import process
from scripts import serve

TOKEN = "hush-hush-0123456789"
GROUP = {"coordinator": "127.0.0.1:9000", "num_processes": 2, "token": TOKEN}
BASE: dict[str, Any] = {"model": {"source": "somewhere"}, "mesh": {"model": 2}}


def parse(**group: Any) -> config.EngineConfig:
    return config.parse(BASE | {"distributed": group})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coordinator": None}, "coordinator is required"),
        ({"coordinator": "host"}, "'host' is no address; write host:port"),
        ({"coordinator": "host:99999"}, "no address"),
        ({"coordinator": "a b:9"}, "no address"),
        ({"process_id": 2}, "process_id is 2; with 2 processes it is at most 1"),
        ({"token": None}, r"token \(or token_file\) is required"),
        ({"token": "short"}, "token is too short; 16 characters are the least"),
        ({"token_file": "/run/token"}, "give one"),
        ({"control_port": 9000}, "both on port 9000"),
        ({"heartbeat_seconds": 0.1}, "heartbeat_seconds"),
        ({"heartbeats": 1}, "nearest valid key is 'heartbeat_seconds'"),
        ({"num_processes": 3}, "mesh.model is 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(**(GROUP | keys))
    assert TOKEN not in caught.value.message and "'short'" not in caught.value.message


def test_one_process_needs_nothing() -> None:
    assert config.parse({"model": {"source": "somewhere"}}).distributed.num_processes == 1


@pytest.mark.parametrize(
    ("address", "parts"),
    [("host:1", ("host", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:8", ("::1", 8))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_the_token_is_shown_nowhere_and_given_to_the_child_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GROUP_TOKEN", TOKEN)
    found = parse(**(GROUP | {"token": "${GROUP_TOKEN}"}))
    assert found.distributed.secret() == TOKEN.encode()
    shown = repr(found) + str(found) + found.model_dump_json() + repr(found.distributed.token)
    shown += yaml.safe_dump(process.redacted(found)) + json.dumps(agreement(found, None))
    assert TOKEN not in shown
    order = json.loads(process.start_line(found, None))
    child = config.EngineConfig.model_validate(order["config"])
    assert child.distributed == found.distributed
    assert child.distributed.secret() == TOKEN.encode()


@pytest.mark.parametrize("override", ["distributed.token=[", "distributed.token.a=x"])
def test_a_token_of_the_command_line_is_in_no_error(tmp_path: Path, override: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(BASE | {"distributed": GROUP}))
    with pytest.raises(ConfigError) as caught:
        config.load(file, [override + TOKEN])
    assert TOKEN not in caught.value.message


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"distributed.token: .* NO_SUCH_TOKEN is not set"):
        parse(**(GROUP | {"token": "${NO_SUCH_TOKEN}"}))


def test_a_token_file_is_read_when_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "token"
    group = parse(**(GROUP | {"token": None, "token_file": str(file)})).distributed
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        group.secret()
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 bytes"):
        group.secret()
    file.write_text(TOKEN + "\n")
    assert group.secret() == TOKEN.encode()


# Interfaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interface", "address"),
    [(None, "127.0.0.1"), ("lo", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "::1")],
)
def test_the_leaders_address(interface: str | None, address: str) -> None:
    assert address_of(DistributedSection(**GROUP, interface=interface)) == address


def test_an_interface_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'eth77' is neither an address nor one of"):
        address_of(DistributedSection(**GROUP, interface="eth77"))
    group = DistributedSection(**(GROUP | {"coordinator": "no.such.host.invalid:9"}))
    with pytest.raises(ConfigError, match=r"'no\.such\.host\.invalid' has no address"):
        address_of(group)


# The environment ----------------------------------------------------------------------------------

LWS = {"LWS_LEADER_ADDRESS": "lws-0.lws", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}


def test_leader_worker_sets_variables_are_mapped() -> None:
    assert environment.overrides(LWS, set()) == [
        'distributed.coordinator="lws-0.lws:8476"', "distributed.num_processes=4",
        "distributed.process_id=3",
    ]  # fmt: skip
    assert environment.overrides(LWS, {"num_processes", "coordinator"}) == [
        "distributed.process_id=3"
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LWS_GROUP_SIZE": "many"}, "LWS_GROUP_SIZE is 'many', not a number"),
        ({"LWS_WORKER_INDEX": ""}, "LWS_WORKER_INDEX is not set"),
    ],
)
def test_half_a_leader_worker_set_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        environment.overrides(LWS | change, set())


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "host", "device"), [(SLURM, "node001", 0), (OMPI, "10.96.0.1", 1)]
)
def test_slurm_and_open_mpi_are_detected_by_jax(
    launcher: dict[str, str], host: str, device: int
) -> None:
    found = environment.overrides({**os.environ, **launcher}, set())
    assert found[0].startswith(f'distributed.coordinator="{host}:')
    assert found[1:] == [
        "distributed.num_processes=2", "distributed.process_id=1",
        f"distributed.local_devices=[{device}]",
    ]  # fmt: skip


def test_no_launcher_at_all_is_told() -> None:
    with pytest.raises(ConfigError, match="neither LeaderWorkerSet"):
        environment.overrides(os.environ, set())


# What must agree ----------------------------------------------------------------------------------


def test_what_concerns_one_host_need_not_agree(tmp_path: Path) -> None:
    one = BASE | {"distributed": GROUP, "cache_dir": "/a", "adapters": {"roots": ["/here"]}}
    other = BASE | {
        "distributed": GROUP | {"process_id": 1, "interface": "lo"}, "cache_dir": "/b",
        "adapters": {"roots": ["/there"]}, "server": {"port": 1}, "model": {"source": "elsewhere"},
    }  # fmt: skip
    both = [agreement(config.parse(data), None) for data in (one, other)]
    assert differences(*both, 1) == []


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("model", {"source": "somewhere", "dtype": "float32"}, "model.dtype"),
        ("pool", {"page_size": 32}, "pool.page_size"),
        ("scheduler", {"max_running": 8}, "scheduler.max_running is 64 .* and 8 on process 1"),
        ("adapters", {"roots": ["/a", "/b"]}, "adapters.roots is 0 .* and 2 on process 1"),
        ("adapters", {"host_cache_bytes": "2GiB"}, r"adapters\.host_cache_bytes is \d+ on .* 2147"),
        ("adapters", {"storage_of": {"a": "int8"}}, r'adapters\.storages is \["full"\] .*"int8".*'),
        ("mesh", {"model": 4}, "mesh.model"),
        ("kernels", "reference", "kernels"),
    ],
)
def test_what_all_must_share_is_told_by_key(section: str, keys: Any, words: str) -> None:
    one = BASE | {"distributed": GROUP}
    both = [agreement(config.parse(data), None) for data in (one, one | {section: keys})]
    (difference,) = differences(*both, 1)
    assert re.match(words, difference), difference


# Llama-3-8B.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden=4096, layers=32, heads=32,
    kv_heads=8, head_dim=128, feed_forward=14336, max_positions=8192,
)  # fmt: skip
VALUES: dict[str, dict[str, list[Any]]] = {
    "model": {"source": ["a", "b"], "dtype": ["bfloat16", "float32"], "max_model_len": [512, 4096]},
    "pool": {
        "pages": [None, 300], "page_size": [16, 32], "memory_fraction": [0.5, 0.85],
        "prefix_cache": [True, False],
    },
    "scheduler": {
        "max_running": [8, 64], "max_step_tokens": [512, 2048], "max_queued": [100, 1000],
    },
    "adapters": {
        "roots": [["/a"], ["/b"]], "max_rank": [8, 64], "host_cache_bytes": ["2GiB", "4GiB"],
        "disk_cache_bytes": ["2GiB", "4GiB"], "storage": ["full", "int4"],
        "storage_of": [{"a": "full", "b": "int4"}],
    },
    "mesh": {"lora": ["auto", "no_collective", "fully_sharded"]},
}  # fmt: skip
WHOLE = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries({key: st.sampled_from(few) for key, few in keys.items()})
        for name, keys in VALUES.items()
    }
)


@given(
    one=WHOLE, change=st.sampled_from([(name, key) for name in VALUES for key in VALUES[name]]),
    available=st.integers(40, 90),
)  # fmt: skip
def test_hosts_that_agree_plan_alike(
    one: dict[str, Any], change: tuple[str, str], available: int
) -> None:
    """Of two configurations that differ in one key: it is told, or the plans are equal."""
    (name, key), found = change, []
    for value in VALUES[name][key]:
        data = {**one, name: one[name] | {key: value}}
        data["mesh"] = data["mesh"] | {"model": 2}
        loaded = config.parse(data | {"distributed": GROUP})
        plan = plan_memory(loaded, MODEL, available * 2**30, processes=2)
        found.append((agreement(loaded, None), plan))
    for (mine, plan), (theirs, other) in itertools.pairwise(found):
        assert plan == other or differences(mine, theirs, 1)


def test_how_most_adapters_are_stored_must_agree() -> None:
    """By it the split is chosen, also where all hosts compile for the same ways of storing."""
    found = []
    for storage in ("full", "int4"):
        data = BASE | {
            "distributed": GROUP, "mesh": {"model": 2}, "pool": {"pages": 300},
            "scheduler": {"max_running": 8},
            "adapters": {"storage": storage, "storage_of": {"a": "full", "b": "int4"}},
        }  # fmt: skip
        loaded = config.parse(data)
        plan = plan_memory(loaded, MODEL, 40 * 2**30, processes=2)
        found.append((agreement(loaded, None), plan.split.fully))
    (mine, one), (theirs, other) = found
    assert one != other
    (difference,) = differences(mine, theirs, 1)
    assert re.match(r'adapters\.storage is "full" .* and "int4"', difference), difference


def test_the_models_files_must_agree_to_the_byte(tmp_path: Path) -> None:
    loaded = config.parse(BASE | {"distributed": GROUP})
    found = []
    for name, weights in (("one", b"same"), ("two", b"same"), ("three", b"sane")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "readme.md").write_text(name)
        found.append(agreement(loaded, folder))
    assert differences(found[0], found[1], 1) == []
    assert [d.split(" is ")[0] for d in differences(found[0], found[2], 1)] == ["model files"]


def test_a_large_file_counts_by_size_and_samples(tmp_path: Path) -> None:
    loaded = config.parse(BASE | {"distributed": GROUP})
    found = []
    for change in (None, 0, 24 * 2**20 - 1):
        file = tmp_path / "model.safetensors"
        with open(file, "wb") as writing:
            writing.truncate(24 * 2**20)
            if change is not None:
                writing.seek(change)
                writing.write(b"x")
        found.append(agreement(loaded, tmp_path)["model files"])
    assert len({*found}) == 3


def test_serve_takes_its_place_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file says wins over the environment, and the command line over both."""
    file = tmp_path / "config.yaml"
    group = {"auto": True, "token": TOKEN, "local_devices": [0, 1]}
    file.write_text(json.dumps(BASE | {"mesh": {"model": 4}, "distributed": group}))
    for name, value in LWS.items():
        monkeypatch.setenv(name, value)
    found = serve.load(file, []).distributed
    assert (found.coordinator, found.num_processes, found.process_id) == ("lws-0.lws:8476", 4, 3)
    assert found.local_devices == [0, 1]
    assert serve.load(file, ["distributed.process_id=2"]).distributed.process_id == 2


def test_the_shipped_file_is_one_of_a_group() -> None:
    file = Path(__file__).parents[2] / "configs" / "two-hosts.yaml"
    for process_id in range(2):
        found = config.load(file, [f"distributed.process_id={process_id}"])
        assert found.distributed.num_processes == 2 and found.mesh.model == 8
