"""How long a step takes: models of a device, from the work that the step is.

Three models. `Roofline`: each part of a step is bounded by memory or by arithmetic, the parts
follow each other, and a few numbers say how far from the data sheet a real engine stays. `Linear`:
a sum fitted to measured steps. `FloorTimes`: the least time (see `floor`) times a factor.
Host only: no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from jslora.bench.floor import Cost, Device, kv_numbers
from jslora.errors import ConfigError
from jslora.model.config import MODULES, ModelConfig


@dataclass(slots=True)
class Work:
    """What a step does.

    Attributes:
        rows: sequences; for the last token of each there are logits.
        tokens: computed, of all rows.
        cached: positions before those tokens, of all rows: keys and values to read.
        seen: positions that the tokens see, each its own, added up.
        lora_products: of every token, the numbers of its adapter, added up.
        adapter_numbers: numbers of the distinct adapters.
        adapters: distinct adapters.
        written: bytes of adapters that are written into the pool before the step.
    """

    rows: int = 0
    tokens: int = 0
    cached: int = 0
    seen: int = 0
    lora_products: int = 0
    adapter_numbers: int = 0
    adapters: int = 0
    written: int = 0

    def add(self, tokens: int, position: int) -> None:
        """A row that computes so many tokens from a position on."""
        self.rows += 1
        self.tokens += tokens
        self.cached += position
        self.seen += tokens * position + tokens * (tokens + 1) // 2


class StepTime(Protocol):
    """Seconds of a step."""

    def seconds(self, work: Work) -> float: ...


@dataclass(frozen=True)
class Parts:
    """The least cost of a step by its parts; together what `floor.step_floor` counts.

    Args:
        itemsize: bytes of a number of the weights, of the KV cache and of the adapters.
    """

    model: ModelConfig
    itemsize: int = 2

    @cached_property
    def weights(self) -> int:
        """Weights of the linear layers."""
        widths = [self.model.widths(module) for module in MODULES]
        return self.model.layers * sum(wide_in * wide_out for wide_in, wide_out in widths)

    @cached_property
    def _embeddings(self) -> int:
        return self.model.vocab_size * self.model.hidden

    @cached_property
    def _small(self) -> int:
        """Norms and biases."""
        tables = 1 if self.model.tie_embeddings else 2
        return self.model.parameters - self.weights - tables * self._embeddings

    @cached_property
    def per_position(self) -> int:
        """Keys and values of a position."""
        return kv_numbers(self.model)

    def linear(self, work: Work) -> Cost:
        """All linear layers, the embedding and the logits."""
        numbers = self.weights + self._small + self._embeddings + work.tokens * self.model.hidden
        flops = 2 * (work.tokens * self.weights + work.rows * self._embeddings)
        return Cost(self.itemsize * numbers, flops)

    def attention(self, work: Work) -> Cost:
        """Keys and values read and written, scores and weighted sums."""
        width = self.model.layers * self.model.heads * self.model.head_dim
        return Cost(
            self.itemsize * (work.cached + work.tokens) * self.per_position,
            4 * width * work.seen,
        )

    def lora(self, work: Work) -> Cost:
        """Both products, and the factors of each distinct adapter."""
        return Cost(self.itemsize * work.adapter_numbers, 2 * work.lora_products)

    def total(self, work: Work) -> Cost:
        return self.linear(work) + self.attention(work) + self.lora(work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How far an engine stays from the data sheet: the free numbers of a `Roofline`.

    Attributes:
        overhead: seconds of a step beside its parts: launches, and what the host adds.
        memory, compute: shares of the bandwidth and of the FLOP/s that are reached.
        lora_overhead: seconds more with any adapter in the step.
        lora_compute: share of the FLOP/s that the LoRA products reach.
    """

    overhead: float
    memory: float
    compute: float
    lora_overhead: float
    lora_compute: float


@dataclass(frozen=True)
class Linear:
    """Seconds as a sum of a constant, and one each for a token, a row and a position read.

    Attributes:
        residual: of a fit: root mean square of what the sum misses, relative to measured steps.
    """

    constant: float
    token: float
    row: float
    position: float
    residual: float = field(default=0.0, compare=False)

    def seconds(self, work: Work) -> float:
        found = self.token * work.tokens + self.row * work.rows + self.position * work.cached
        return self.constant + found


@dataclass(frozen=True)
class Roofline:
    """Parts one after the other, each bounded by memory or arithmetic, at a share of the device."""

    parts: Parts
    device: Device
    shares: Shares

    def seconds(self, work: Work) -> float:
        s, bandwidth = self.shares, self.device.bandwidth * self.shares.memory
        base = self._part(self.parts.linear(work), s.compute)
        base += self._part(self.parts.attention(work), s.compute)
        lora = self._part(self.parts.lora(work), s.lora_compute)
        lora += s.lora_overhead if work.adapters else 0.0
        return s.overhead + base + lora + 2 * work.written / bandwidth

    def below(self, numbers: int = 0) -> tuple[Linear, Linear]:
        """Sums that no step is faster than: with linear layers bounded by memory, or by arithmetic.

        Args:
            numbers: of the smallest adapter, if every row has one.
        """
        s, parts, flops = self.shares, self.parts, self.device.flops
        byte = parts.itemsize / (self.device.bandwidth * s.memory)
        fixed, whole = parts.linear(Work()), parts.linear(Work(tokens=1, rows=1))
        tables = fixed.bytes / parts.itemsize * byte
        overhead = s.overhead + (s.lora_overhead if numbers else 0.0)
        lora = 2 * numbers / (flops * s.lora_compute)
        product = 2 * parts.weights / (flops * s.compute)
        position = parts.per_position * byte
        token = (whole.bytes - fixed.bytes) / parts.itemsize * byte
        row = whole.flops / (flops * s.compute) - product
        return (
            Linear(overhead + tables, token + position + lora, 0.0, position),
            Linear(overhead, product + position + lora, row, position),
        )

    def _part(self, cost: Cost, compute: float) -> float:
        memory = cost.bytes / (self.device.bandwidth * self.shares.memory)
        return max(memory, cost.flops / (self.device.flops * compute))


@dataclass(frozen=True)
class FloorTimes:
    """`factor` times the least time of a step on a device."""

    parts: Parts
    device: Device
    factor: float

    def seconds(self, work: Work) -> float:
        least = self.parts.total(work).seconds(self.device)
        return self.factor * (least + 2 * work.written / self.device.bandwidth)


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured step: its tokens and rows, the positions it read, and what it took."""

    tokens: int
    rows: int
    kv: int
    seconds: float


def fit_steps(steps: Sequence[Measured]) -> Linear:
    """The nonnegative least squares of relative errors.

    Raises:
        ConfigError: there are fewer than four steps, or one took no time.
    """
    if len(steps) < 4 or min(step.seconds for step in steps) <= 0:
        raise ConfigError(f"{len(steps)} measured steps; at least 4 are needed, each of some time")
    terms = np.array([[1, step.tokens, step.rows, step.kv] for step in steps], np.float64)
    seconds = np.array([step.seconds for step in steps])
    relative = terms / seconds[:, None]
    found = _nonnegative(relative, np.ones(len(steps)))
    residual = float(np.sqrt(np.mean((relative @ found - 1) ** 2)))
    constant, token, row, position = found.tolist()
    return Linear(constant, token, row, position, residual)


def load_steps(path: Path) -> Linear:
    """Fit a JSON list of `{"tokens", "rows", "kv", "seconds"}`.

    Raises:
        ConfigError: the file cannot be read, has another form, or does not suffice.
    """
    try:
        steps = msgspec.json.decode(path.read_bytes(), type=list[Measured])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read measured steps from {path}: {error}") from None
    return fit_steps(steps)


def _nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 of least |ax - b|: of all choices of positive columns, the best (few columns)."""
    columns = a.shape[1]
    best, least = np.zeros(columns), float(b @ b)
    for mask in range(1, 2**columns):
        chosen = [column for column in range(columns) if mask >> column & 1]
        x = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
        miss = float(np.sum((a[:, chosen] @ x - b) ** 2))
        if (x >= 0).all() and miss < least:
            best, least = np.zeros(columns), miss
            best[chosen] = x
    return best
