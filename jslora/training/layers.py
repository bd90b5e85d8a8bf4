"""The model forward and backward on packed rows: the programs of a training step.

The layers are those that are served (`Block.forward`). One program runs any layer forward and one
backward, dispatched once a layer: XLA:CPU would compile every layer of a whole step anew, and what
is in memory is decided here, layer by layer. Gradients of all layers are summed in place.

Over several devices each has some rows of the batch and all of the rest; gradients are summed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, UInt32

from jslora.model.config import GROUPS, MODULES, ModelConfig
from jslora.model.transformer import Block, Layout, rms_norm, rope_tables
from jslora.training.adapters import Columns, Pair, Trained
from jslora.training.attention import attention
from jslora.training.dropout import dropped
from jslora.training.head import head_loss
from jslora.training.products import adapted, shrink
from jslora.training.pullback import Pullback, pull
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import work_shape
from pallas_kernels.lora.finish import Finish
from pallas_kernels.paged_attention.cut import Cut

AXIS = "data"
"""The mesh axis over which the rows of a batch are divided."""

_GROUP_WEIGHTS = ("qkv", "o", "gate_up", "down")


class Packed(NamedTuple):
    """A batch on the device; `weight` is of each token's loss in that of its adapter."""

    tokens: Int32[Array, "B T"]
    position: Int32[Array, "B T"]
    segment: Int32[Array, "B T"]
    target: Int32[Array, "B T"]
    weight: Float[Array, "B T"]
    adapter: Int32[Array, " B"]
    seed: UInt32[Array, " B"]


class Rows(NamedTuple):
    """What every layer needs of a batch."""

    cos: Float[Array, "T 1 D"]
    sin: Float[Array, "T 1 D"]
    segment: Int32[Array, "B T"]
    adapter: Int32[Array, " B"]
    seed: UInt32[Array, " B"]


@dataclass(frozen=True)
class Model:
    """The base's leaves by name, on every device, and what is trained beside them.

    Attributes:
        longest: tokens in the longest example of any batch.
        recompute: whether the backward pass begins with what entered a layer.
    """

    config: ModelConfig
    leaves: Mapping[str, jax.Array]
    columns: Columns
    mesh: Mesh
    longest: int
    recompute: bool = False

    def place(self, arrays: Sequence[np.ndarray]) -> Packed:
        """The fields of a batch, its rows divided over the devices."""
        return Packed(*jax.device_put(tuple(arrays), self._by_row))

    def everywhere[Tree](self, tree: Tree) -> Tree:
        """A host's arrays, whole on every device."""
        return jax.device_put(tree, self._whole)

    def losses(self, trained: Trained, batch: Packed) -> Float[Array, " adapters"]:
        """The weighted sum of each adapter's losses, without dropout."""
        x, rows = self._begin(self.leaves["embed"], batch)
        for layer in range(self.config.layers):
            x, _ = self._forward(False, False, *self._of_layer(layer), trained, x, rows)
        return self._finish(self._head, self.leaves["norm"], x, batch)[0]

    def gradients(
        self, trained: Trained, sums: Trained, batch: Packed
    ) -> tuple[Float[Array, " adapters"], Trained]:
        """The same with dropout, and their sum's gradient added to `sums`, which are given away."""
        x, rows = self._begin(self.leaves["embed"], batch)
        kept = []
        for layer in range(self.config.layers):
            entered = x
            keep = not self.recompute
            x, pullback = self._forward(True, keep, *self._of_layer(layer), trained, x, rows)
            kept.append(pullback if keep else entered)
        losses, g = self._finish(self._head, self.leaves["norm"], x, batch)
        for layer in reversed(range(self.config.layers)):
            of_layer = self._of_layer(layer)
            g, sums = self._backward(kept.pop(), *of_layer, trained, rows, g, sums)
        return losses, sums

    def zeros(self) -> Trained:
        """Sums of gradients before the first batch."""
        return self._zeros()

    # Programs -----------------------------------------------------------------------------------

    @cached_property
    def _zeros(self) -> Any:
        L = self.config.layers

        def make() -> Trained:
            found = {}
            for module in self.columns.modules:
                C = self.columns.scales(module).shape[1]
                wide_in, wide_out = self.config.widths(module)
                found[module] = Pair(jnp.zeros((L, C, wide_in)), jnp.zeros((L, C, wide_out)))
            return found

        return jax.jit(make, out_shardings=self._whole)

    @cached_property
    def _begin(self) -> Any:
        def begin(embed: Array, batch: Packed) -> tuple[Array, Rows]:
            cos, sin = rope_tables(self.config, batch.position.reshape(-1))
            rows = Rows(cos, sin, batch.segment, batch.adapter, batch.seed)
            return embed.at[batch.tokens.reshape(-1)].get(mode="clip"), rows

        return jax.jit(begin, out_shardings=self._by_row)

    @cached_property
    def _forward(self) -> Any:
        return jax.jit(self._layer_forward, static_argnums=(0, 1))

    @cached_property
    def _backward(self) -> Any:
        return jax.jit(
            self._layer_backward, donate_argnums=(6,), out_shardings=(self._by_row, self._whole)
        )

    @cached_property
    def _finish(self) -> Any:
        rows, whole = PartitionSpec(AXIS), PartitionSpec()
        each = jax.shard_map(
            self._losses, mesh=self.mesh, in_specs=(whole, whole, rows, rows),
            out_specs=(whole, rows), check_vma=False,
        )  # fmt: skip
        return jax.jit(each)

    def _layer_forward(
        self, training: bool, keep: bool, leaves: list[Array], layer: Array, trained: Trained,
        x: Float[Array, "T H"], rows: Rows,
    ) -> tuple[Float[Array, "T H"], Pullback | None]:  # fmt: skip
        own = _own(trained, layer)
        run = partial(self._run, leaves, layer, rows, training)
        return pull(run, x, own, shared=(leaves, rows)) if keep else (run(x, own), None)

    def _layer_backward(
        self, kept: Pullback | Array, leaves: list[Array], layer: Array, trained: Trained,
        rows: Rows, g: Float[Array, "T H"], sums: Trained,
    ) -> tuple[Float[Array, "T H"], Trained]:  # fmt: skip
        if isinstance(kept, Pullback):
            g, own = kept((leaves, rows), g)
        else:
            run = partial(self._run, leaves, layer, rows, True)
            _, pullback = jax.vjp(run, kept, _own(trained, layer))
            g, own = pullback(g)
        return g, jax.tree.map(lambda total, new: total.at[layer].add(new), sums, own)

    def _run(
        self, leaves: list[Array], layer: Array, rows: Rows, training: bool,
        x: Float[Array, "T H"], own: Trained,
    ) -> Float[Array, "T H"]:  # fmt: skip
        """One layer with its adapters."""
        graph, paths = self._block
        flat = [(path, nnx.Param(leaf)) for path, leaf in zip(paths.values(), leaves, strict=True)]
        block = nnx.merge(graph, nnx.from_flat_state(flat))
        named = dict(zip(paths, leaves, strict=True))
        beside = _Beside(self, named, layer, rows, own, training)
        return block.forward(x, rows.cos, rows.sin, beside.lora, beside.attend)

    def _losses(
        self, head: Array, norm: Array, x: Float[Array, "T H"], batch: Packed
    ) -> tuple[Float[Array, " adapters"], Float[Array, "T H"]]:
        """Of the rows of one device; the losses are those of all."""
        normed = partial(rms_norm, weight=norm, eps=self.config.norm_eps)
        h, pullback = jax.vjp(normed, x)
        weight = batch.weight.reshape(-1)
        losses, g = head_loss(h, head, batch.target.reshape(-1), weight)
        of_row = (losses * weight).reshape(batch.weight.shape).sum(1)
        of_adapter = jnp.zeros(len(self.columns.plans)).at[batch.adapter].add(of_row)
        return lax.psum(of_adapter, AXIS), pullback(g.astype(h.dtype))[0]

    # What they are made of ----------------------------------------------------------------------

    @property
    def _head(self) -> jax.Array:
        return self.leaves["embed" if self.config.tie_embeddings else "head"]

    def _of_layer(self, layer: int) -> tuple[list[jax.Array], np.int32]:
        names = self._block[1]
        return [self.leaves[f"layers.{layer}.{name}"] for name in names], np.int32(layer)

    @cached_property
    def _block(self) -> tuple[nnx.GraphDef, dict[str, tuple]]:
        """A block's structure, and the state path of each weight by its name."""
        kernels = Kernels("reference", "reference", "cpu")
        # What it says of pages and kernels, `forward` does not use.
        layout = Layout(0, True, work_shape(8, 1, kernels, prefill=True), Cut(1, 0, 1), kernels)
        dtype = self.leaves["embed"].dtype
        block = nnx.eval_shape(lambda: Block(self.config, dtype, layout))
        graph, state = nnx.split(block)
        return graph, {str(path[0]): path for path, _ in nnx.to_flat_state(state)}

    @property
    def _by_row(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def _own(trained: Trained, layer: Array) -> Trained:
    """The factors of one layer."""
    return jax.tree.map(lambda x: x[layer], trained)


class _Beside:
    """What stands beside the weights of one layer: adapters, and attention of packed rows."""

    def __init__(
        self, model: Model, leaves: Mapping[str, Array], layer: Array, rows: Rows, own: Trained,
        training: bool,
    ) -> None:  # fmt: skip
        self._config, self._columns, self._leaves = model.config, model.columns, leaves
        self._longest = model.longest
        self._layer, self._rows, self._own = layer, rows, own
        self._dropout = np.array([plan.dropout * training for plan in model.columns.plans])

    def lora(
        self, y: Float[Array, "T out"], x: Float[Array, "T in"], *, group: int,
        finish: Finish = Finish.SUM, stream: Float[Array, "T H"] | None = None,
    ) -> Float[Array, "T out"]:  # fmt: skip
        """The base output and the deltas of a group of modules, finished.

        Both are made here, with a gradient of their own; `y`, which nothing uses then, is compiled
        away.
        """
        weight = self._leaves[_GROUP_WEIGHTS[group]]
        low = self._low(x, GROUPS[group])
        return adapted(finish, x, weight, low, stream)

    def attend(
        self, q: Float[Array, "T N D"], k: Float[Array, "T K D"], v: Float[Array, "T K D"]
    ) -> Float[Array, "T N D"]:
        B, T = self._rows.segment.shape
        q, k, v = (x.reshape(B, T, *x.shape[1:]) for x in (q, k, v))
        return attention(q, k, v, self._rows.segment, self._longest).reshape(B * T, *q.shape[2:])

    def _low(
        self, x: Float[Array, "T in"], modules: Sequence[str]
    ) -> tuple[Float[Array, "T C"], Float[Array, "C out_all"]] | None:
        """The low-rank products of a group's modules, and the B that makes deltas of them."""
        targeted = [module for module in modules if module in self._own]
        if not targeted:
            return None
        if self._dropout.any():
            low = [shrink(self._dropped(x, m), self._own[m].a) for m in targeted]
            z = jnp.concatenate(low, axis=1)
        else:
            z = shrink(x, jnp.concatenate([self._own[m].a for m in targeted]))
        scales = np.concatenate([self._columns.scales(m) for m in targeted], axis=1)
        return self._gated(z, scales).astype(x.dtype), self._side_by_side(modules)

    def _side_by_side(self, modules: Sequence[str]) -> Float[Array, "C out_all"]:
        """B of a group: every module's ranks reach its own columns of the fused output."""
        ends = np.cumsum([self._config.widths(module)[1] for module in modules])
        rows = []
        for module, end in zip(modules, ends, strict=True):
            if module in self._own:
                b = self._own[module].b
                rows.append(jnp.pad(b, ((0, 0), (end - b.shape[1], ends[-1] - end))))
        return jnp.concatenate(rows)

    def _gated(
        self, z: Float[Array, "T C"], scales: Float[np.ndarray, "adapters C"]
    ) -> Float[Array, "T C"]:
        """Times the scales of each row's own adapter, which are zero for the others' ranks."""
        B, T = self._rows.segment.shape
        own = jnp.asarray(scales)[self._rows.adapter]
        return (z.reshape(B, T, -1) * own[:, None]).reshape(z.shape)

    def _dropped(self, x: Float[Array, "T in"], module: str) -> Float[Array, "T in"]:
        """`x` with the dropout of each row's adapter; every module has its own, as PEFT's do."""
        B, T = self._rows.segment.shape
        share = jnp.asarray(self._dropout, jnp.float32)[self._rows.adapter]
        number = self._layer * len(MODULES) + MODULES.index(module)
        rows = x.reshape(B, T, -1)
        return dropped(rows, share, self._rows.seed, number).reshape(x.shape)
