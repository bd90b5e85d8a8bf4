"""A layer's backward pass that can leave the program that made it.

What `jax.vjp` returns is a tree of arrays, so one program may return it and another call it. Among
those arrays are some that the first program was given, weights above all, and a compiled program
copies what it returns; those are left out here and handed in again when the pullback is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["tree", "shared"])
@dataclass(frozen=True)
class Pullback:
    """From the gradient of a result to those of the arguments.

    Attributes:
        kept: the arrays that only the pullback holds.
        tree: of the function and all its arrays.
        shared: for each array of it, which of the shared ones it is; None for one that is kept.
    """

    kept: tuple[jax.Array, ...]
    tree: Any
    shared: tuple[int | None, ...]

    def __call__(self, shared: Any, gradient: Any) -> Any:
        """Gradients of the arguments, from that of the result.

        Args:
            shared: as `pull` was given it.
        """
        arrays, kept = jax.tree.leaves(shared), iter(self.kept)
        full = [next(kept) if place is None else arrays[place] for place in self.shared]
        return jax.tree.unflatten(self.tree, full)(gradient)


def pull(
    function: Callable[..., jax.Array], *arguments: Any, shared: Any
) -> tuple[jax.Array, Pullback]:
    """`jax.vjp`, but that the pullback leaves out the arrays in `shared`."""
    result, pullback = jax.vjp(function, *arguments)
    flat, tree = jax.tree.flatten(pullback)
    places = {id(array): place for place, array in enumerate(jax.tree.leaves(shared))}
    found = tuple(places.get(id(array)) for array in flat)
    kept = tuple(array for array, place in zip(flat, found, strict=True) if place is None)
    return result, Pullback(kept, tree, found)
