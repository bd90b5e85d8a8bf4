"""Grouped-query attention over pages of the pool, for decode rows and prefill chunks alike.

The contract of every implementation: one call attends all tokens of a step to their rows' contexts,
with scores, softmax and sums in float32; a key or value beyond a row's context is never multiplied,
only selected away, so a NaN in a page that a row does not own cannot reach it (0 * NaN is NaN).

The host lists what is to be done (`Rows.items`). What an item is depends on the implementation's
`Cut`: the reference attends rows of one token all at once and lists only tiles of longer rows; the
kernels list everything, and a long context of a one-token row in several parts that a second kernel
merges in order.
"""

from jaxtyping import Array, Float, Int32

from pallas_kernels.launch import Kernels
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.cut import Cut
from pallas_kernels.paged_attention.rows import Rows

PART_SPAN = 256
"""Positions of a part at least: below that, merging costs more than it wins."""


def attention_cut(max_positions: int, kernels: Kernels) -> Cut:
    """How steps are cut for the implementation that attends them.

    Parts are enough for the longest context and few rows to keep a GPU busy, and so few that what
    they leave to be merged stays small.
    """
    if kernels.attention == "reference":
        return Cut(query_tile=reference.QUERY_TILE, parts=0, span=0)
    return Cut(query_tile=16, parts=min(16, -(-max_positions // PART_SPAN)), span=PART_SPAN)


def check(implementation: str, head_dim: int) -> None:
    """Whether an implementation can attend heads of `head_dim` numbers.

    Raises:
        NotImplementedError: it cannot; says why.
    """
    if implementation != "reference" and (head_dim < 16 or head_dim & (head_dim - 1)):
        raise NotImplementedError(
            f"heads of {head_dim} numbers; the kernels need a power of two, 16 at least"
        )


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "pages S 2 K D"],
    first_page: Int32[Array, ""],
    rows: Rows,
    *,
    scale: float,
    prefill: bool,
    cut: Cut,
    kernels: Kernels,
) -> Float[Array, "T N D"]:
    """Attend every token of the step to its row's context, itself included.

    Args:
        q: queries, rotated; tokens of a row are consecutive and end at its context's end.
        pages: the pool, with this step's keys and values already written.
        first_page: row of the pool that is this layer's page 0.
        scale: applied to the scores; 1/sqrt(D).
        prefill: False when no row has more than one token.

    Returns:
        in the queries' dtype; what stands in rows of padding tokens is not specified.
    """
    if kernels.attention == "reference":
        return reference.paged_attention(q, pages, first_page, rows, scale=scale, prefill=prefill)
    if kernels.attention == "triton":
        from pallas_kernels.paged_attention import triton

        return triton.paged_attention(
            q, pages, first_page, rows, scale=scale, prefill=prefill, cut=cut
        )
    from pallas_kernels.paged_attention import pallas

    return pallas.paged_attention(
        q, pages, first_page, rows, scale=scale, prefill=prefill, cut=cut,
        interpret=kernels.interpret,
    )  # fmt: skip
