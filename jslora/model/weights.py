"""Base-model weights: Hugging Face safetensors → one sharded `jax.Array` per leaf.

`shapes` is the single source of leaf names and shapes. Linear weights are stored [out, in], as in
the files; q, k, v and gate, up are fused along `out`, shard by shard (q₀|k₀|v₀|q₁|…), so that
splitting the fused rows over devices gives each device whole heads of its own. Every tensor of the
files binds to a leaf by name and shape or loading fails before anything is read, and a device's
part is read slice by slice: nothing else of the files is touched for it. What is quantised is so
leaf by leaf as it comes, so that few leaves lie in memory at their full size.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jslora.errors import ModelError
from jslora.files import read_json
from jslora.model.config import ModelConfig
from jslora.model.quantize import FORMATS, SCALE, Named, is_linear, quantized, scales
from jslora.progress import Progress, silent
from jslora.split import Split

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Leaf name and shape → where it lives."""

_DTYPES = ("BF16", "F16", "F32")
_READERS = 4


@dataclass(frozen=True, slots=True)
class _Leaf:
    """`sources`: (tensor name, its rows) in the order they are fused along the rows."""

    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]

    def rows(self, shards: int) -> tuple[tuple[int, int], ...]:
        """Stretches of rows of the whole leaf, in the order that `shards` parts have."""
        ends = accumulate(rows for _, rows in self.sources)
        at = {name: end - rows for (name, rows), end in zip(self.sources, ends, strict=True)}
        return tuple(
            (at[name] + first, at[name] + first + rows) for name, first, rows in self.runs(shards)
        )

    def runs(self, shards: int) -> Iterator[tuple[str, int, int]]:
        """(tensor name, first row, rows) in the order the leaf's rows have."""
        parts = shards if len(self.sources) > 1 else 1
        for part in range(parts):
            for name, rows in self.sources:
                yield name, part * rows // parts, rows // parts


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf name → shape of every weight of the model, in the order the forward pass uses them."""
    return {name: leaf.shape for name, leaf in _leaves(config).items()}


def abstract_weights(
    config: ModelConfig, dtype: DTypeLike, quantize: str = "none", shards: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `load_weights` gives: the leaves of `shapes`, and scales behind what is quantised."""
    found = {}
    for name, shape in shapes(config).items():
        found[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        if quantize != "none" and is_linear(name):
            found[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(FORMATS[quantize].dtype))
            count = scales(name, shape[0], shards)
            found[name + SCALE] = jax.ShapeDtypeStruct((count,), jnp.dtype(jnp.float32))
    return found


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: DTypeLike,
    sharding: Shardings,
    shards: int = 1,
    progress: Progress = silent,
    quantize: str = "none",
) -> dict[str, jax.Array]:
    """Read the safetensors in `folder` into the leaves of `shapes`.

    Args:
        dtype: of every leaf, norms included; files may hold bfloat16, float16 or float32.
        shards: number of parts that fused rows are ordered for.
        progress: told ("weights", bytes read, bytes in all, leaf name).
        quantize: what is made of linear layers, "none" or one of `quantize.FORMATS`.

    Raises:
        ModelError: a tensor is missing, has no place, or has another shape or type; a file is
            missing or damaged; heads or the feed-forward width do not divide by `shards`.
    """
    Split(shards).local(config)
    leaves = _leaves(config)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _bind(leaves, tensors, config)

        def load(name: str) -> jax.Array:
            leaf = leaves[name]
            read = partial(_read, tensors, leaf, tuple(leaf.runs(shards)), np.dtype(dtype))
            return jax.make_array_from_callback(leaf.shape, sharding(name, leaf.shape), read)

        total = config.parameters * np.dtype(dtype).itemsize
        loaded = _told(_in_order(list(leaves), load), total, progress)
        return dict(quantized(loaded, quantize, sharding))


def _in_order(names: list[str], load: Callable[[str], jax.Array]) -> Iterator[Named]:
    """Leaves by name, a few of them being read ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[tuple[str, Future[jax.Array]]] = deque()
        for name in names:
            ahead.append((name, pool.submit(load, name)))
            if len(ahead) > _READERS:
                first, reading = ahead.popleft()
                yield first, reading.result()
        yield from ((name, reading.result()) for name, reading in ahead)


def _told(weights: Iterator[Named], total: int, progress: Progress) -> Iterator[Named]:
    done = 0
    for name, weight in weights:
        done += weight.nbytes
        progress("weights", done, total, name)
        yield name, weight


def dummy_weights(
    config: ModelConfig,
    dtype: DTypeLike,
    sharding: Shardings,
    seed: int = 0,
    shards: int = 1,
    quantize: str = "none",
) -> dict[str, jax.Array]:
    """Random weights that keep activations near unit size; norms are ones.

    Args:
        shards: number of parts that fused rows are ordered for; the model is the same.
        quantize: as of `load_weights`.
    """
    programs: dict[Any, Callable[[jax.Array], jax.Array]] = {}

    def drawn() -> Iterator[Named]:
        for i, (name, leaf) in enumerate(_leaves(config).items()):
            where = sharding(name, leaf.shape)
            scale = None if name.endswith("norm") else _scale(name, leaf.shape)
            order = leaf.rows(shards)
            key = (leaf.shape, scale, where, order)
            if key not in programs:
                draw = partial(_draw, shape=leaf.shape, scale=scale, dtype=dtype, order=order)
                programs[key] = jax.jit(draw, out_shardings=where)
            yield name, programs[key](jax.random.fold_in(jax.random.key(seed), i))

    return dict(quantized(drawn(), quantize, sharding))


def _scale(name: str, shape: tuple[int, ...]) -> float:
    return 0.02 if name == "embed" or len(shape) == 1 else shape[-1] ** -0.5


def _draw(
    key: jax.Array, shape: tuple[int, ...], scale: float | None, dtype: DTypeLike,
    order: tuple[tuple[int, int], ...],
) -> jax.Array:  # fmt: skip
    if scale is None:
        return jnp.ones(shape, dtype)
    drawn = (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.concatenate([drawn[first:last] for first, last in order])


def _leaves(config: ModelConfig) -> dict[str, _Leaf]:
    H, V, D = config.hidden, config.vocab_size, config.head_dim
    leaves = {"embed": _Leaf((V, H), (("model.embed_tokens.weight", V),))}
    for i in range(config.layers):
        here, there = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{there}.self_attn", f"{there}.mlp"
        leaves[f"{here}.attn_norm"] = _vector(f"{there}.input_layernorm.weight", H)
        leaves[f"{here}.qkv"] = _linear(config, attention, "q_proj", "k_proj", "v_proj")
        if config.qkv_bias:
            leaves[f"{here}.qkv_bias"] = _bias(config, attention, "q_proj", "k_proj", "v_proj")
        if config.qk_norm:
            leaves[f"{here}.q_norm"] = _vector(f"{attention}.q_norm.weight", D)
            leaves[f"{here}.k_norm"] = _vector(f"{attention}.k_norm.weight", D)
        leaves[f"{here}.o"] = _linear(config, attention, "o_proj")
        leaves[f"{here}.mlp_norm"] = _vector(f"{there}.post_attention_layernorm.weight", H)
        leaves[f"{here}.gate_up"] = _linear(config, mlp, "gate_proj", "up_proj")
        leaves[f"{here}.down"] = _linear(config, mlp, "down_proj")
    leaves["norm"] = _vector("model.norm.weight", H)
    if not config.tie_embeddings:
        leaves["head"] = _Leaf((V, H), (("lm_head.weight", V),))
    return leaves


def _vector(name: str, size: int) -> _Leaf:
    return _Leaf((size,), ((name, size),))


def _linear(config: ModelConfig, parent: str, *modules: str) -> _Leaf:
    inputs = config.widths(modules[0])[0]
    sources = tuple((f"{parent}.{module}.weight", config.widths(module)[1]) for module in modules)
    return _Leaf((sum(rows for _, rows in sources), inputs), sources)


def _bias(config: ModelConfig, parent: str, *modules: str) -> _Leaf:
    sources = tuple((f"{parent}.{module}.bias", config.widths(module)[1]) for module in modules)
    return _Leaf((sum(rows for _, rows in sources),), sources)


# Files ---------------------------------------------------------------------------------------


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name → lazily read slice, over every file of the model."""
    tensors: dict[str, Any] = {}
    for name, listed in _files(folder).items():
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
            found = set(file.keys())
            if twice := found & tensors.keys():
                raise ModelError(f"tensor {min(twice)} is in {name} and in another file")
            tensors.update({key: file.get_slice(key) for key in found})
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {name}: {error}") from None
        if listed is not None and (absent := listed - found):
            raise ModelError(f"{name} lacks the tensor {min(absent)} that the index puts there")
    return tensors


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File name → tensors that the index says are in it; None where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(found) != 1 and "model.safetensors" not in found:
            raise ModelError(f"expected model.safetensors or its index; found {found or 'neither'}")
        return {"model.safetensors" if "model.safetensors" in found else found[0]: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ModelError(f"{index.name} has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index.name} puts {tensor} in {name!r}, which is not a file name")
        files.setdefault(name, set()).add(tensor)
    return dict(files)


def _bind(leaves: dict[str, _Leaf], tensors: dict[str, Any], config: ModelConfig) -> None:
    """Check that leaves and tensors match one to one, before anything is read."""
    expected = {
        name: (rows, *leaf.shape[1:]) for leaf in leaves.values() for name, rows in leaf.sources
    }
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"the model's files lack the tensor {name} of shape {list(shape)}")
        found, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if found != shape:
            raise ModelError(f"tensor {name} has shape {list(found)}; expected {list(shape)}")
        if kind not in _DTYPES:
            raise ModelError(f"tensor {name} has type {kind}; expected one of {', '.join(_DTYPES)}")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    for name in sorted(tensors.keys() - expected.keys() - tied):
        if not name.endswith("rotary_emb.inv_freq"):  # older files carry this constant
            raise ModelError(f"tensor {name} has no place in {config.architecture}")


def _read(
    tensors: dict[str, Any],
    leaf: _Leaf,
    runs: tuple[tuple[str, int, int], ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a leaf, reading only the rows and columns it needs."""
    bounds = [slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True)]
    out = np.empty([s.stop - s.start for s in bounds], dtype)
    rows, *rest = bounds
    position = 0
    for name, first, count in runs:
        start, stop = max(rows.start, position), min(rows.stop, position + count)
        if start < stop:
            at = slice(first + start - position, first + stop - position)
            out[start - rows.start : stop - rows.start] = tensors[name][(at, *rest)]
        position += count
    return out
