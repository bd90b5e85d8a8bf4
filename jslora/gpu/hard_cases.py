"""The cases that correctness is checked with: batches of the kinds that a kernel may get wrong."""

from dataclasses import dataclass, replace
from typing import Literal

from jslora.gpu.cases import Plan
from jslora.model.config import MODULES
from pallas_kernels.lora.pieces import STORAGES

Where = Literal["bottom", "top", "scattered"]
"""Pages from the pool's lowest on, up to its highest, or every other one before its middle."""

MOST_COMPOSED = 3
"""Adapters that a token has at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, end) and the ranks of their adapter; a bad one is NaN throughout.

    Where tokens have several adapters, their parts are alike but for these, and follow each other.
    """

    start: int
    end: int
    ranks: tuple[int, ...]
    where: Where = "bottom"
    bad: bool = False
    storage: str = "full"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LoraCase:
    name: str
    tokens: int
    rows: int
    parts: tuple[Part, ...]

    @property
    def storages(self) -> tuple[str, ...]:
        """Those that the kernels are compiled for."""
        return STORAGES if any(part.storage != "full" for part in self.parts) else ("full",)

    def __str__(self) -> str:
        return f"lora, {self.name}"


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Rows as (tokens in this step, context with them)."""

    name: str
    tokens: int
    batch: int
    rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"attention, {self.name}"


def lora_cases(plan: Plan) -> list[LoraCase]:
    """Decode and prefill, of the kinds that a kernel may get wrong; sizes follow the plan."""
    B, T = plan.step_rows, 4 * plan.step_rows
    few = (1, 7, 8, 16, 33, 12, plan.max_rank, 3)
    some = (5, 0, 9, 0, 0, 17, 0), (0, 4, 0, 40, 2, 0, 8), (0, 0, 0, 0, 0, 0, 16)
    places: tuple[Where, ...] = ("bottom", "top", "scattered")
    own = tuple(Part(b, b + 1, _every(few[b % 8]), places[b % 3]) for b in range(min(B, 8)))
    thirds = [B // 4, B // 2, B - 1]
    return [
        LoraCase("every row its own adapter", B, B, own),
        LoraCase(
            "one adapter of the highest rank", B, B, (Part(0, B, _every(plan.wide_rank), "top"),)
        ),
        LoraCase("no adapter", B, B, ()),
        LoraCase(
            "targets of their own, rows between without", B, B,
            tuple(
                Part(end - B // 8, end, ranks, where)
                for end, ranks, where in zip(thirds, some, places, strict=True)
            ),
        ),
        LoraCase(
            "a bad adapter", B, B,
            (Part(0, 2, _every(8)), Part(2, 4, _every(16), bad=True), Part(4, B, _every(5), "top")),
        ),
        LoraCase(
            "prefill, segments of all lengths", T, B,
            (
                Part(3, T // 2 - 1, _every(16), "top"), Part(T // 2 - 1, T // 2, _every(64)),
                Part(T // 2 + 1, 3 * T // 4, _every(1), "scattered"),
                Part(T - 5, T, _every(33)),
            ),
        ),
        LoraCase(
            "integers beside full numbers, every row its own adapter", B, B,
            tuple(replace(part, storage=STORAGES[b // 3]) for b, part in enumerate(own)),
        ),
        LoraCase(
            "prefill, integers", T, B,
            (
                Part(0, 3, _every(8), bad=True, storage="int4"),
                Part(3, T // 2 - 1, _every(16), "top", storage="int4"),
                Part(T // 2 - 1, T // 2, _every(64), storage="int8"),
                Part(T // 2 + 1, 3 * T // 4, some[0], "scattered", storage="int4"),
                Part(T - 5, T, _every(33), storage="int8"),
            ),
        ),
        LoraCase(
            "prefill, sums of scaled adapters", T, B,
            (
                Part(2, T // 2, _every(8), scale=0.5), Part(2, T // 2, some[1], "top", scale=2.0),
                Part(2, T // 2, _every(33), "scattered"), Part(T // 2, T - 1, _every(16)),
                Part(T - 1, T, some[0]), Part(T - 1, T, _every(1), scale=0.0),
            ),
        ),
        LoraCase(
            "sums of integers and full numbers", B, B,
            (
                Part(0, 2, _every(5)), Part(0, 2, _every(16), "top", storage="int4", scale=0.7),
                Part(0, 2, _every(9), "scattered", storage="int8", scale=1.5),
                Part(3, 4, some[1], storage="int8"), Part(3, 4, _every(8), storage="int8"),
            ),
        ),
    ]  # fmt: skip


def attention_cases(plan: Plan) -> list[AttentionCase]:
    """Contexts around the ends of pages and parts, alone and beside chunks of prompts."""
    B, S, most = plan.step_rows, plan.page_size, plan.max_model_len
    ends = [1, S - 1, S, S + 1, 255, 256, 257, 512, most // 2 + 1, most - 1, most]
    contexts = [context for context in ends if context <= most][-B:]
    T = 4 * B
    return [
        AttentionCase("decode", B, B, tuple((1, context) for context in contexts)),
        AttentionCase("one row", B, B, ((1, most),)),
        AttentionCase(
            "prefill beside decode", T, B,
            ((1, most), (T // 2, T // 2), (2, S + 3), (1, 1), (T // 4 + 1, most // 2), (1, S)),
        ),
        AttentionCase("one prompt's chunk", T, B, ((T, min(most, 3 * T)),)),
    ]  # fmt: skip


def _every(rank: int) -> tuple[int, ...]:
    """An adapter that has it on every module."""
    return (rank,) * len(MODULES)
