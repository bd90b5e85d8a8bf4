"""Products of training and their gradients, in bfloat16 too, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.training.products import adapted, shrink
from pallas_kernels.lora.finish import Finish

T, IN, OUT = 40, 24, 32
DTYPES = [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)]


def close(found: jax.Array, right: np.ndarray, share: float) -> None:
    off = np.abs(np.asarray(found, np.float64) - right).max()
    assert off <= share * np.abs(right).max(), f"{off} of {np.abs(right).max()}"


def numbers(*shapes: tuple[int, ...], dtype: jnp.dtype) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 32])
@pytest.mark.parametrize(("dtype", "share"), DTYPES)
def test_shrink(dtype: jnp.dtype, share: float, rank: int) -> None:
    (x,) = numbers((T, IN), dtype=dtype)
    a, g = numbers((rank, IN), (T, rank), dtype=jnp.float32)
    z, pullback = jax.vjp(shrink, x, a)
    of_x, of_a = pullback(g)
    assert (z.dtype, of_x.dtype, of_a.dtype) == (jnp.float32, dtype, jnp.float32)
    wide_x, wide_a, wide_g = (np.asarray(each, np.float64) for each in (x, a, g))
    close(z, wide_x @ wide_a.T, share)
    close(of_x, wide_g @ wide_a, share)
    close(of_a, wide_g.T @ wide_x, share)


@pytest.mark.parametrize("rank", [1, 16, 17])
@pytest.mark.parametrize("finish", Finish)
@pytest.mark.parametrize(("dtype", "share"), DTYPES)
def test_adapted(dtype: jnp.dtype, share: float, finish: Finish, rank: int) -> None:
    out = OUT // 2 if finish is Finish.GATED else OUT
    x, w, z, stream, g = numbers(
        (T, IN), (OUT, IN), (T, rank), (T, OUT), (T, out), dtype=dtype
    )  # fmt: skip
    (b,) = numbers((rank, OUT), dtype=jnp.float32)
    residual = finish is Finish.RESIDUAL
    if finish is Finish.SUM:
        g = g.astype(jnp.float32)

    def plain(x: jax.Array, z: jax.Array, b: jax.Array, stream: jax.Array) -> jax.Array:
        y = x @ w.astype(x.dtype).T + z @ b
        if finish is Finish.GATED:
            return jax.nn.silu(y[:, :out]) * y[:, out:]
        return stream + y if residual else y

    def ours(x: jax.Array, z: jax.Array, b: jax.Array, stream: jax.Array) -> jax.Array:
        return adapted(finish, x, w, (z, b), stream if residual else None)

    mine, pullback = jax.vjp(ours, x, z, b, stream)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(each, np.float64)) for each in (x, z, b, stream, g)]
        right, other = jax.vjp(plain, *wide[:4])
        gradients = [np.asarray(each) for each in other(wide[4])]
        close(mine, np.asarray(right), share)
    for found, expected in zip(pullback(g)[: 4 if residual else 3], gradients, strict=False):
        close(found, expected, 2 * share)
