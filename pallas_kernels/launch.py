"""What depends on the backend; the only file that asks which one there is."""

import jax


def one_program() -> bool:
    """Whether a step's layers are compiled as one program.

    XLA:CPU compiles each layer of such a program anew, which takes half a minute a bucket for 30
    layers; there, one program for any layer is compiled and dispatched once a layer instead.
    """
    return jax.default_backend() != "cpu"
