"""The fewest bytes and FLOPs that a step needs on one device, and from them its least time.

Counted as bytes: each weight once, those of a distinct adapter once however many rows share it, an
embedding row for every token; of the KV cache, each row's positions before this step read once, and
its new ones written once. Counted as FLOPs, two for a multiplication and its addition: every linear
layer, scores and weighted sums over the positions that each token sees, both LoRA products, and the
logits of each row's last token.

Not counted: activations, logits and new keys and values read back, which can stay on the chip;
norms, rope, softmax and sampling; work lists and block tables; launches. The least time takes
memory and arithmetic as perfectly overlapped, so it is the larger of the two. A step is never
faster than this, and how far above it is what there is to gain. Host only: no jax.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jslora.model.config import GROUPS, MODULES, ModelConfig


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do at most: bytes/s of memory, FLOP/s of dense bf16 products."""

    name: str
    bandwidth: float
    flops: float


# The vendor's data sheets: SXM parts, without sparsity.
H100 = Device("H100 SXM", bandwidth=3.35e12, flops=989e12)
H200 = Device("H200 SXM", bandwidth=4.8e12, flops=989e12)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved and FLOPs made."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, device: Device) -> float:
        """The least time it takes on a device."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter by its name, and its rank in each of `MODULES`, in every layer; 0: no target."""

    name: str
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(MODULES), f"{len(self.ranks)} ranks of {self.name}"


def uniform(name: str, rank: int) -> Adapter:
    """An adapter of one rank in all modules."""
    return Adapter(name, (rank,) * len(MODULES))


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence in a step: positions that its last token sees, itself included, and tokens."""

    context: int
    tokens: int = 1
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        assert 0 < self.tokens <= self.context, (
            f"{self.tokens} tokens in a context of {self.context}"
        )


@dataclass(frozen=True, slots=True)
class Floor:
    """The least cost of a step by its parts."""

    weights: Cost
    embedding: Cost
    kv_read: Cost
    kv_write: Cost
    head: Cost
    lora: Cost

    @property
    def base(self) -> Cost:
        """All but LoRA."""
        return self.weights + self.embedding + self.kv_read + self.kv_write + self.head

    @property
    def total(self) -> Cost:
        return self.base + self.lora

    def ratio(self, device: Device) -> float:
        """Least time with LoRA over that without."""
        return self.total.seconds(device) / self.base.seconds(device)


def step_floor(config: ModelConfig, rows: Sequence[Row], itemsize: int) -> Floor:
    """The floor of one step.

    Args:
        itemsize: bytes of a number of the weights, of the KV cache and of the adapters.
    """
    tokens = sum(row.tokens for row in rows)
    linear = config.layers * sum(math.prod(config.widths(module)) for module in MODULES)
    embeddings = config.vocab_size * config.hidden
    small = config.parameters - linear - embeddings * (1 if config.tie_embeddings else 2)
    return Floor(
        weights=Cost(itemsize * (linear + small), 2 * tokens * linear),
        embedding=Cost(itemsize * tokens * config.hidden),
        kv_read=Cost(
            itemsize * sum(row.context - row.tokens for row in rows) * kv_numbers(config),
            sum(map(_seen, rows)) * 4 * config.layers * config.heads * config.head_dim,
        ),
        kv_write=Cost(itemsize * tokens * kv_numbers(config)),
        head=Cost(itemsize * embeddings, 2 * len(rows) * embeddings),
        lora=_lora(config, rows, itemsize),
    )


def kv_numbers(config: ModelConfig) -> int:
    """Numbers of the keys and values of one token, in all layers."""
    return config.layers * 2 * config.kv_heads * config.head_dim


def adapter_numbers(config: ModelConfig, adapter: Adapter) -> int:
    """Numbers of an adapter's factors in one layer."""
    ranks = zip(MODULES, adapter.ranks, strict=True)
    return sum(rank * sum(config.widths(module)) for module, rank in ranks)


def lora_layer(config: ModelConfig, rows: Sequence[Row], itemsize: int) -> Cost:
    """One layer's LoRA kernels alone, between which activations do cross memory.

    Beside the factors: of every token with an adapter, the input of each group of modules is read
    once, and the base output, in float32, read and written.
    """
    factors = _lora(config, rows, itemsize)
    activations = sum(
        row.tokens * _activations(config, row.adapter, itemsize) for row in rows if row.adapter
    )
    return Cost(factors.bytes // config.layers + activations, factors.flops // config.layers)


def attention_layer(config: ModelConfig, rows: Sequence[Row], itemsize: int) -> Cost:
    """One layer's attention kernel alone.

    It reads all keys and values of a row once, the queries once, and writes as many numbers.
    """
    kv = sum(row.context for row in rows) * kv_numbers(config) // config.layers
    width = config.heads * config.head_dim
    queries = 2 * sum(row.tokens for row in rows) * width
    return Cost(itemsize * (kv + queries), 4 * width * sum(map(_seen, rows)))


def _seen(row: Row) -> int:
    """Positions that the row's tokens see, added up: the last `context`, each before one less."""
    return row.tokens * row.context - row.tokens * (row.tokens - 1) // 2


def _lora(config: ModelConfig, rows: Sequence[Row], itemsize: int) -> Cost:
    """Both products of every layer, and the factors of each distinct adapter."""
    tokens: Counter[Adapter] = Counter()
    for row in rows:
        if row.adapter:
            tokens[row.adapter] += row.tokens
    numbers = {adapter: adapter_numbers(config, adapter) for adapter in tokens}
    flops = sum(2 * tokens[adapter] * numbers[adapter] for adapter in tokens)
    return Cost(config.layers * itemsize * sum(numbers.values()), config.layers * flops)


def _activations(config: ModelConfig, adapter: Adapter, itemsize: int) -> int:
    """Bytes of one token's inputs and outputs of the modules that the adapter targets."""
    targets = [module for module, rank in zip(MODULES, adapter.ranks, strict=True) if rank]
    inputs = {group: config.widths(group[0])[0] for group in GROUPS if {*group} & {*targets}}
    return itemsize * sum(inputs.values()) + 8 * sum(config.widths(m)[1] for m in targets)
