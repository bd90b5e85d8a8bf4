"""What the device reaches on the simplest work: a large copy, and a large bf16 product.

Every other figure is held against these, not against a data sheet.
"""

import jax
import jax.numpy as jnp

from jslora.gpu.cases import Plan
from jslora.gpu.session import Session
from jslora.gpu.timing import measure


def run(session: Session, plan: Plan) -> None:
    """Record bytes/s of copying, bytes read plus bytes written, and FLOP/s of a product."""
    key = jax.random.key(0)
    source = jax.random.normal(key, (plan.copy_bytes // 2,), jnp.bfloat16)
    n = plan.product
    a, b = (jax.random.normal(jax.random.fold_in(key, i), (n, n), jnp.bfloat16) for i in (1, 2))
    # Negation moves what a copy does, and cannot be taken for the identity and left out.
    copy, product = jax.jit(jnp.negative), jax.jit(jnp.matmul)
    timings = measure(
        {"copy": lambda: copy(source), "product": lambda: product(a, b)},
        plan.rounds, plan.sample_seconds,
    )  # fmt: skip
    bandwidth = 2 * source.nbytes / timings["copy"].seconds
    flops = 2 * n**3 / timings["product"].seconds
    session.emit("ceiling", what="copy", bytes_per_second=bandwidth, **timings["copy"].record())
    session.emit("ceiling", what="product", flops_per_second=flops, **timings["product"].record())
