"""Which adapters a request may name together: one rule for the server and for `jslora.Engine`.

A sum has no order, so neither have the adapters of a request: they are sorted by name, and requests
that ask for the same in another order share steps and cached pages. How large their ranks may be
together is for the scheduler to say, which knows them. Host only: no jax.
"""

from collections.abc import Iterable
from itertools import pairwise

from jslora.errors import InvalidRequest
from jslora.request import MAX_SCALE, Scaled


def compose(asked: Iterable[tuple[str, float]], most: int) -> tuple[Scaled, ...]:
    """The adapters of a request and their scales, as it carries them.

    Raises:
        InvalidRequest: there are more than `most`, one is there twice, a name is no text, or a
            scale is not a number from 0 to `MAX_SCALE`.
    """
    asked = list(asked)
    for name, _ in asked:
        if not isinstance(name, str):
            raise InvalidRequest(f"{name!r} is no adapter's name", param="adapters")
    found = sorted(Scaled(name, _scale(name, scale)) for name, scale in asked)
    if len(found) > most:
        raise InvalidRequest(
            f"{len(found)} adapters in one request; at most {most} may be named", param="adapters"
        )
    for one, other in pairwise(found):
        if one.name == other.name:
            raise InvalidRequest(f"the adapter {one.name!r} is named twice", param="adapters")
    return tuple(found)


def _scale(name: str, scale: float) -> float:
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not 0 <= scale <= MAX_SCALE:
        raise InvalidRequest(
            f"the scale of {name!r} is {scale!r}, not a number from 0 to {MAX_SCALE:g}",
            param="adapters",
        )
    return float(scale)
