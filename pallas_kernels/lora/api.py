"""Low-rank deltas read from pages of the pool: y += scale * (x A^T) B, for many adapters at once.

One operation for decode and prefill, over the modules that read the same input. The contract of
every implementation: time and bytes follow the tokens that have an adapter and the true ranks of
their adapters; sums are in float32; the low-rank product is scaled in float32 and rounded to the
factors' dtype; the result is deterministic, and takes the place of the base output.

The work list has a form that suits the implementation: blocks of ranks for the reference, which
likes few large gathers, spans of tokens for a GPU's many programs.
"""

from jaxtyping import Array, Float, Int32

from pallas_kernels.launch import OFF, Kernels
from pallas_kernels.lora import reference, segments
from pallas_kernels.lora.finish import Finish, finish_sum
from pallas_kernels.lora.pieces import column_block

Work = reference.BlockWork | segments.SegmentWork
Shape = reference.BlockShape | segments.SegmentShape


def work_shape(tokens: int, max_rank: int, kernels: Kernels, *, prefill: bool) -> Shape:
    """How a bucket's work is cut for the implementation that walks it."""
    if kernels.lora == "reference":
        return reference.block_shape(tokens, prefill=prefill)
    return segments.segment_shape(tokens, max_rank, prefill=prefill)


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

    Returns:
        as `Finish` says.
    """
    if kernels.lora == OFF:
        return finish_sum(y, x, finish, stream)
    if isinstance(work, reference.BlockWork):
        assert isinstance(shape, reference.BlockShape), f"{shape} for {kernels.lora}"
        y = reference.add_lora(
            y, x, pages, first_page, layer, work, modules=modules, widths=widths, shape=shape
        )
        return finish_sum(y, x, finish, stream)
    assert isinstance(shape, segments.SegmentShape), f"{shape} for {kernels.lora}"
    if kernels.lora == "triton":
        from pallas_kernels.lora import triton

        return triton.add_lora(
            y, x, pages, first_page, layer, work, modules=modules, widths=widths, shape=shape,
            finish=finish, stream=stream,
        )  # fmt: skip
    from pallas_kernels.lora import pallas

    return pallas.add_lora(
        y, x, pages, first_page, layer, work, modules=modules, widths=widths, shape=shape,
        finish=finish, stream=stream, interpret=kernels.interpret,
    )  # fmt: skip
