"""What a request is told of its sequence: new tokens, its end, scores, and failures as data.

Host only: no jax.
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import repeat

from jslora.errors import CorruptOutput, JsloraError
from jslora.request import ErrorInfo, SamplingParams, TokenEvent, TokenLogprob
from jslora.schedule.plan import Results
from jslora.schedule.sequence import Sequence

_NEW = partial(tuple.__new__, TokenEvent)
_DEFAULTS = [repeat(TokenEvent._field_defaults[name]) for name in TokenEvent._fields[2:]]


def token_events(sequences: Iterable[Sequence], tokens: Iterable[int]) -> list[TokenEvent]:
    """What the usual row means, one more token; there are hundreds, so no Python runs for each."""
    ids = [sequence.request.id for sequence in sequences]
    return [*map(_NEW, zip(ids, zip(tokens), *_DEFAULTS, strict=False))]


def news(
    sequence: Sequence, b: int, token: int, finite: bool, samples: bool, results: Results,
    eos: tuple[int, ...],
) -> TokenEvent:  # fmt: skip
    """What row `b` of a step, and the token it drew, mean for its request.

    Where the row drew none, its prompt was all that was asked about. A token that does not end the
    sequence is appended to it.
    """
    request, params = sequence.request, sequence.request.params
    begins = sequence.generated == 0
    prompt_logprobs = _prompt_scores(sequence) if begins else None
    cached = sequence.cached if begins else 0
    if not (_all_finite(prompt_logprobs) and (finite or not samples)):
        return failure(sequence, CorruptOutput("the model's output is not finite"))
    if not samples:
        return TokenEvent(
            id=request.id, finish_reason="length",
            prompt_logprobs=prompt_logprobs, cached_tokens=cached,
        )  # fmt: skip
    if _ends(token, sequence.generated + 1, params, eos):
        return TokenEvent(
            id=request.id, finish_reason="stop", stop_token=token,
            prompt_logprobs=prompt_logprobs, cached_tokens=cached,
        )  # fmt: skip
    sequence.tokens.append(token)
    asked = params.logprobs is not None
    return TokenEvent(
        id=request.id,
        tokens=(token,),
        logprobs=(_shortened(results.logprob(b), params.logprobs),) if asked else (),
        finish_reason="length" if sequence.generated >= params.max_tokens else None,
        prompt_logprobs=prompt_logprobs,
        cached_tokens=cached,
    )


def failure(sequence: Sequence, error: JsloraError) -> TokenEvent:
    """The sequence's last event."""
    return TokenEvent(id=sequence.request.id, error=ErrorInfo.of(error))


def _ends(token: int, generated: int, params: SamplingParams, eos: tuple[int, ...]) -> bool:
    """Whether a sequence ends with a token, its `generated`-th."""
    stops = (token in eos and not params.ignore_eos) or token in params.stop_token_ids
    return stops and generated > params.min_tokens


def _prompt_scores(sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """Of each prompt token, None for the first, if the request asked for them."""
    top = sequence.request.params.prompt_logprobs
    if top is None:
        return None
    return (None, *(_shortened(sequence.scores[p], top) for p in range(1, sequence.prompt_length)))


def _all_finite(scores: tuple[TokenLogprob | None, ...] | None) -> bool:
    """Whether no logprob is a NaN or an infinity."""
    return all(score is None or math.isfinite(score.logprob) for score in scores or ())


def _shortened(score: TokenLogprob, n: int | None) -> TokenLogprob:
    """With the n likeliest alternatives."""
    return TokenLogprob(
        token=score.token, logprob=score.logprob, rank=score.rank, top=score.top[: n or 0]
    )
