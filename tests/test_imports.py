"""Imports point one way: the host side runs without jax, the device side without a server."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "jax_triton", "triton"}
SERVER_LIBRARIES = {
    "pydantic", "msgspec", "fastapi", "starlette", "uvicorn", "zmq", "prometheus_client", "aiohttp",
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path
    for package in ("jslora", "pallas_kernels", "scripts")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def below(*names: str) -> list[str]:
    """Modules of these names and, for packages, everything in them."""
    assert all(name in SOURCES for name in names), names
    return [module for module in SOURCES if f"{module}.".startswith(tuple(f"{n}." for n in names))]


HOST = below(
    "jslora.config", "jslora.errors", "jslora.request", "jslora.wire", "jslora.tokenizer",
    "jslora.vocabulary", "jslora.sentencepiece", "jslora.text", "jslora.chat", "jslora.fetch",
    "jslora.logs", "jslora.markdown", "jslora.progress", "jslora.files", "jslora.batch",
    "jslora.buckets",
    "jslora.model.config", "jslora.model.gguf", "jslora.memory", "jslora.schedule",
    "jslora.adapters", "jslora.aliases", "jslora.lifecycle", "jslora.bench", "jslora.server",
    "jslora.composition", "jslora.new_folder",
    "jslora.blocks", "jslora.calls", "jslora.child", "jslora.section", "jslora.spans",
    "jslora.split", "jslora.gpu.report", "jslora.model.gguf_file", "jslora.aot.adapter_bytes",
    "jslora.aot.cases", "jslora.aot.record", "jslora.aot.rules", "jslora.aot.table",
    "jslora.distributed.agreement", "jslora.distributed.channel", "jslora.distributed.deliveries",
    "jslora.distributed.deltas", "jslora.distributed.digests", "jslora.distributed.environment",
    "jslora.distributed.group", "jslora.distributed.hosts", "jslora.distributed.interface",
    "jslora.distributed.links", "jslora.distributed.messages", "jslora.distributed.obedience",
    "jslora.distributed.section", "jslora.distributed.shelf", "jslora.distributed.transfers",
    "jslora.distributed.uplink",
    "jslora.training.config", "jslora.training.data", "jslora.training.demo",
    "jslora.training.heap",
    "jslora.training.packing", "jslora.training.publish",
    "jslora.integrations.changes", "jslora.integrations.exchange", "jslora.integrations.homes",
    "jslora.integrations.merged_metrics", "jslora.integrations.scale",
)  # fmt: skip
DEVICE = below(
    "jslora.model.transformer", "jslora.model.weights", "jslora.lora", "jslora.sampling",
    "jslora.step", "pallas_kernels",
)  # fmt: skip
MAY_BE_SERVED_FROM = {
    "jslora", "jslora.request", "jslora.config", "jslora.errors", "jslora.tokenizer",
    "jslora.vocabulary", "jslora.text", "jslora.chat", "jslora.wire", "jslora.fetch", "jslora.logs",
    "jslora.progress", "jslora.files", "jslora.model", "jslora.model.config", "jslora.adapters",
    "jslora.aliases", "jslora.composition", "jslora.distributed", "jslora.distributed.section",
}  # fmt: skip


class Imports(ast.NodeVisitor):
    """Names that a module imports: anywhere in it (`all`), or when it is imported (`now`)."""

    def __init__(self, path: Path) -> None:
        self.all: set[str] = set()
        self.now: set[str] = set()
        self._inside = 0
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0 and node.module, "imports are absolute here"
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            self._add(module if module in SOURCES else node.module)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside += 1
        self.generic_visit(node)
        self._inside -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def _add(self, name: str) -> None:
        parts = name.split(".")
        ours = parts[0] in ("jslora", "pallas_kernels", "scripts", "tests")
        # Importing a.b.c imports a and a.b first.
        names = {".".join(parts[: i + 1]) for i in range(len(parts))} if ours else {parts[0]}
        self.all |= names
        if not self._inside:
            self.now |= names


@cache
def imports(module: str) -> Imports:
    return Imports(SOURCES[module])


@cache
def reached(module: str) -> frozenset[str]:
    """Everything a module may come to import, through our own modules."""
    found, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()).all - found:
            found.add(name)
            if name in SOURCES:
                todo.append(name)
    return frozenset(found)


def test_imports_in_functions_and_through_others_are_seen() -> None:
    assert "jslora.build" in imports("jslora.worker").all - imports("jslora.worker").now
    assert "jax" in reached("jslora.worker") and "jax" not in imports("jslora.worker").all
    assert "jslora.engine" not in reached("jslora"), "it is for type checkers only"


@pytest.mark.parametrize("module", HOST)
def test_host_modules_never_import_jax(module: str) -> None:
    assert not reached(module) & DEVICE_LIBRARIES


@pytest.mark.parametrize("module", DEVICE)
def test_device_modules_import_no_server(module: str) -> None:
    assert not reached(module) & SERVER_LIBRARIES
    assert not [name for name in reached(module) if name.startswith("jslora.server")]


@pytest.mark.parametrize("module", below("pallas_kernels"))
def test_kernels_import_jax_only(module: str) -> None:
    allowed = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names, *below("pallas_kernels")}
    lazily = {"triton", "jax_triton"}
    if module.endswith(".triton_kernels"):
        allowed |= lazily
    assert imports(module).now <= allowed
    assert imports(module).all <= allowed | lazily


@pytest.mark.parametrize("module", below("jslora.server"))
def test_the_server_imports_what_it_may(module: str) -> None:
    ours = {name for name in imports(module).all if name.partition(".")[0] in ("jslora", "scripts")}
    lazily = {"jslora.adapters.synthetic"} & (imports(module).all - imports(module).now)
    assert ours <= MAY_BE_SERVED_FROM | {*below("jslora.server")} | lazily


@pytest.mark.parametrize("module", below("jslora", "pallas_kernels"))
def test_nobody_imports_what_stands_above(module: str) -> None:
    tops = {name.partition(".")[0] for name in imports(module).all}
    assert not tops & {"scripts", "tests", "conftest", "pytest", "hypothesis"}
    if not module.startswith(("jslora.server", "jslora.integrations")):
        assert "jslora.server" not in imports(module).all
    if module.startswith("pallas_kernels"):
        assert "jslora" not in tops
    if not module.startswith(("jslora.bench", "jslora.aot", "jslora.gpu")):
        assert not imports(module).all & {"jslora.bench", "jslora.aot", "jslora.gpu"}


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imports(module).now & SOURCES.keys() - {module} for module in SOURCES}
    assert len([*TopologicalSorter(graph).static_order()]) == len(SOURCES)


def loaded_after(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter that imported these modules."""
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in text.stdout.split()}


def test_the_front_end_starts_without_jax() -> None:
    loaded = loaded_after("jslora.server.frontend")
    assert not loaded & DEVICE_LIBRARIES
    assert "fastapi" in loaded


def test_no_library_brings_jax_into_host_modules() -> None:
    assert not loaded_after(*HOST) & DEVICE_LIBRARIES


def test_a_follower_starts_without_jax() -> None:
    """It tells the leader of itself before it opens the device."""
    assert not loaded_after("jslora.distributed.follower") & DEVICE_LIBRARIES


def test_importing_jslora_is_cheap() -> None:
    assert not loaded_after("jslora") & (DEVICE_LIBRARIES | SERVER_LIBRARIES | {"numpy"})
