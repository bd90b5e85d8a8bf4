"""What we ship configurations for leaves a pool worth having on the machine it is for; S-LoRA's
settings, in configs/s-lora, are those of its tables."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jslora.bench import s_lora
from jslora.bench.hardware import LLAMA3_8B
from jslora.bench.traces import RANKS
from jslora.config import EngineConfig, load
from jslora.memory.budget import MemoryPlan, plan_memory
from jslora.model.config import MODULES, ModelConfig, from_hf

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = sorted((CONFIGS / "s-lora").glob("*.yaml"))
USABLE = 0.9  # of a device's memory, at most what JAX is given

# Hidden width, layers, heads, feed-forward width: Table 1, the last two mprophet/model_config.py.
DIMENSIONS = {
    "S1": (4096, 32, 32, 11008), "S2": (4096, 32, 32, 11008), "S3": (5120, 40, 40, 13824),
    "S4": (5120, 40, 40, 13824), "S5": (7168, 48, 56, 19456), "S6": (8192, 80, 64, 24576),
}  # fmt: skip
SLOTS = {"S1": ("a100-80", "S1"), "S2": ("a10g", "S2"), "S4": ("a100-80", "S4")}

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def machine(path: Path) -> tuple[int, int]:
    """Devices, and bytes of one, of the machine that a file names."""
    (found,) = re.findall(r"Machine: (\d) x (\d+) GB", path.read_text())
    return int(found[0]), int(found[1]) * 2**30


def read(path: Path) -> tuple[EngineConfig, ModelConfig, MemoryPlan]:
    config = load(path)
    assert config.model.architecture is not None
    model = from_hf(config.model.architecture)
    return config, model, plan_memory(config, model, int(USABLE * machine(path)[1]))


def test_all_settings_are_there() -> None:
    assert [path.stem.upper() for path in PATHS] == sorted(RANKS) == sorted(DIMENSIONS)


@each
def test_a_setting_is_that_of_its_table(path: Path) -> None:
    config, model, plan = read(path)
    setting = path.stem.upper()
    assert f"setting {setting}" in path.read_text().splitlines()[0]
    assert (model.hidden, model.layers, model.heads, model.feed_forward) == DIMENSIONS[setting]
    assert model.kv_heads == model.heads and model.vocab_size == 32000
    synthetic = config.adapters.synthetic
    assert synthetic is not None and tuple(synthetic.ranks) == RANKS[setting]
    assert synthetic.targets == [["q_proj", "k_proj", "v_proj", "o_proj"]]
    assert config.mesh.model == machine(path)[0]
    assert plan.max_model_len >= 2 * 511  # the trace's longest prompt and answer
    assert config.scheduler.reserve == "declared" and not config.pool.prefix_cache


@each
def test_a_setting_leaves_a_pool_worth_having(path: Path) -> None:
    config, model, plan = read(path)
    _, memory = machine(path)
    slots = (plan.pages - 1) * plan.page_size
    assert plan.weights + plan.slots + plan.pool < USABLE * memory
    if (key := SLOTS.get(path.stem.upper())) is not None:
        assert slots > 0.85 * s_lora.SLOTS[key]
    # Twelve rows of full length, each with another of the largest adapters.
    synthetic = config.adapters.synthetic
    assert synthetic is not None
    most = max(synthetic.ranks)
    numbers = sum(sum(model.widths(module)) for module in synthetic.targets[0]) * most
    page = plan.page_size * 2 * model.kv_heads * model.head_dim
    pages = math.ceil(numbers / page) + math.ceil(plan.max_model_len / plan.page_size)
    assert 12 * pages < plan.pages


@each
def test_the_host_holds_a_working_set(path: Path) -> None:
    config, model, _ = read(path)
    synthetic = config.adapters.synthetic
    assert synthetic is not None
    widths = sum(sum(model.widths(module)) for module in synthetic.targets[0])
    mean = widths * model.layers * 2 * sum(synthetic.ranks) / len(synthetic.ranks)
    assert synthetic.count * mean < config.adapters.host_cache_bytes
    assert synthetic.count * mean < config.adapters.disk_cache_bytes


LLAMA3_70B = replace(LLAMA3_8B, hidden=8192, layers=80, heads=64, kv_heads=8, feed_forward=28672)
K8S = CONFIGS / "k8s"


def embedded(path: Path, folder: Path) -> Path:
    """The server's configuration inside a file for Kubernetes, in a file of its own."""
    (text,) = (
        found["data"]["jslora.yaml"]
        for found in yaml.safe_load_all(path.read_text())
        if found["kind"] == "ConfigMap"
    )
    file = folder / path.name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("path", "model", "devices", "gigabytes", "processes"),
    [
        (CONFIGS / "llama3-8b.yaml", LLAMA3_8B, 1, 80, 1),
        (CONFIGS / "llama3-8b-tp4.yaml", LLAMA3_8B, 4, 24, 1),
        (K8S / "replicas.yaml", LLAMA3_8B, 1, 80, 1),
        (K8S / "group.yaml", LLAMA3_70B, 8, 80, 2),
        (CONFIGS / "two-hosts.yaml", LLAMA3_70B, 8, 80, 2),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_llama_3_has_room_for_long_chats_and_many_adapters(
    path: Path, model: ModelConfig, devices: int, gigabytes: int, processes: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("API_KEY", "a")
    monkeypatch.setenv("ADMIN_KEY", "b")
    config = load(path if path.parent == CONFIGS else embedded(path, tmp_path))
    memory = int(USABLE * gigabytes * 2**30)
    plan = plan_memory(config, model, memory, processes)
    assert config.distributed.auto or config.distributed.num_processes == processes
    assert plan.split.devices == config.mesh.model == devices
    assert plan.weights + plan.slots + plan.pool < memory
    # A quarter of the rows at full length, and as many adapters of rank 16 on every module.
    numbers = 0
    for module in MODULES:
        rows_a, rows_b = plan.split.rows(model, module)
        rank = plan.split.rank(module, 16)
        numbers += rank * rows_a + plan.split.peers(module) * rank * rows_b
    page = plan.page_size * 2 * model.kv_heads // devices * model.head_dim
    longest = math.ceil(plan.max_model_len / plan.page_size)
    rows = config.scheduler.max_running // 4
    assert rows * (math.ceil(numbers / page) + longest) < plan.pages
