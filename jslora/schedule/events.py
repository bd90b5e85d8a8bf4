"""What a request is told of its sequence: scores cut to what it asked for, and failures as data.

Host only: no jax.
"""

import math

from jslora.errors import JsloraError
from jslora.request import ErrorInfo, TokenEvent, TokenLogprob
from jslora.schedule.sequence import Sequence


def prompt_scores(sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """Of each prompt token, None for the first, if the request asked for them."""
    top = sequence.request.params.prompt_logprobs
    if top is None:
        return None
    return (None, *(shortened(sequence.scores[p], top) for p in range(1, sequence.prompt_length)))


def all_finite(scores: tuple[TokenLogprob | None, ...] | None) -> bool:
    """Whether no logprob is a NaN or an infinity."""
    return all(score is None or math.isfinite(score.logprob) for score in scores or ())


def shortened(score: TokenLogprob, n: int | None) -> TokenLogprob:
    """With the n likeliest alternatives."""
    return TokenLogprob(
        token=score.token, logprob=score.logprob, rank=score.rank, top=score.top[: n or 0]
    )


def failure(sequence: Sequence, error: JsloraError) -> TokenEvent:
    """The sequence's last event."""
    info = ErrorInfo(type=error.type, message=error.message, param=error.param)
    return TokenEvent(id=sequence.request.id, error=info)
