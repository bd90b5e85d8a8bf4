"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

One operation for decode and prefill, over the modules that read the same input. The contract of
every implementation: time and bytes follow the tokens that have an adapter and the true ranks of
their adapters; sums are in float32; the low-rank product is scaled in float32 and rounded to the
factors' dtype; the result is deterministic, and takes the place of the base output.

The work list has a form that suits the implementation: blocks of ranks for the reference, which
likes few large gathers, spans of tokens for a GPU's many programs. Each has a product with A
(`shrink`) and one with B (`expand`), between which devices that share an adapter meet (`meeting`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.launch import OFF, Kernels
from pallas_kernels.lora import reference, segments
from pallas_kernels.lora.finish import Finish, finish_sum
from pallas_kernels.lora.meeting import Meeting
from pallas_kernels.lora.pieces import column_block

Work = reference.BlockWork | segments.SegmentWork
Shape = reference.BlockShape | segments.SegmentShape


def work_shape(
    tokens: int, max_rank: int, kernels: Kernels, *, prefill: bool, peers: int = 1,
    storages: tuple[str, ...] = ("full",),
) -> Shape:  # fmt: skip
    """How a bucket's work is cut for the implementation that walks it.

    Args:
        peers: devices that share the ranks of some modules (`Meeting.peers`).
        storages: those that adapters may have (`pieces.STORAGES`).
    """
    if kernels.lora == "reference":
        return reference.block_shape(tokens, prefill=prefill, storages=storages)
    return segments.segment_shape(tokens, max_rank, prefill=prefill, peers=peers, storages=storages)


def check(implementation: str, rows: tuple[tuple[int, int], ...], page: int) -> None:
    """Whether an implementation can read factors with these rows of A and of B.

    Raises:
        NotImplementedError: it cannot; says why.
    """
    if implementation != "reference":
        column_block(tuple(row for pair in rows for row in pair), page, limit=16)


def add_lora(
    y: Float[Array, "T out_all"],
    x: Float[Array, "T in"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    layer: Int32[Array, ""],
    work: Work,
    *,
    modules: tuple[int, ...],
    widths: tuple[int, ...],
    shape: Shape,
    kernels: Kernels,
    finish: Finish = Finish.SUM,
    stream: Float[Array, "T out"] | None = None,
    meeting: Meeting | None = None,
) -> Float[Array, "T out"]:
    """Add the deltas of modules that read the same input to their fused base output.

    Args:
        y: base output in float32, the modules side by side.
        x: their common input; rows without an adapter are not read.
        pages: the pool, slack pages behind the last layer included.
        first_page: row of the pool that is this layer's page 0.
        layer, modules: whose lists of `work` to walk.
        widths: of each module's output; they add up to the columns of y.
        finish: what is made of the sums.
        stream: what they are added to when that is `RESIDUAL`.
        meeting: of devices that have parts of the factors. Where those of A are columns, y is a
            part of a sum too, and `widths` are of the columns that this device has B for.

    Returns:
        as `Finish` says.
    """
    if kernels.lora == OFF:
        return finish_sum(y, finish, stream, x.dtype)
    lists: dict[str, Any] = dict(pages=pages, first_page=first_page, layer=layer, work=work)
    of: dict[str, Any] = dict(modules=modules, widths=widths)
    then: dict[str, Any] = dict(finish=finish, stream=stream, dtype=x.dtype)
    if meeting is None and isinstance(shape, reference.BlockShape):
        return reference.add_lora(y, x, **lists, **of, shape=shape, **then)
    shrink, expand = _implementation(kernels)
    if isinstance(shape, segments.SegmentShape):
        shape = shape._replace(peers=1 if meeting is None else meeting.peers)
    low, first = shrink(x, **lists, modules=modules, shape=shape), None
    if meeting is not None:
        if isinstance(shape, segments.SegmentShape):
            low, shape = segments.sum_splits(low, shape)
        low = meeting.meet(low)
        first = meeting.first_column(sum(widths))
    assert first is None or finish is Finish.SUM, f"{finish} of a part of a sum"
    return expand(y, low, **lists, **of, shape=shape, **then, first=first)


def _implementation(kernels: Kernels) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Its products with A and with B."""
    if kernels.lora == "reference":
        return reference.shrink, reference.expand
    if kernels.lora == "triton":
        from pallas_kernels.lora import triton

        return triton.shrink, triton.expand
    from pallas_kernels.lora import pallas

    interpreted = partial(partial, interpret=kernels.interpret)
    return interpreted(pallas.shrink), interpreted(pallas.expand)
