"""What a request may ask for, whoever sends it: settings in range, ids in the vocabulary, a fit.

The server checks bodies more closely and earlier; this is the last word before the device, where a
number of the wrong kind would fail the step of everybody. Host only: no jax.
"""

from collections.abc import Iterable, Sequence

from jslora.adapters.registration import Registration
from jslora.composition import compose
from jslora.errors import InvalidRequest, Overloaded
from jslora.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, Request, SamplingParams
from jslora.schedule.plan import Limits
from jslora.schedule.queue import Waiting
from jslora.schedule.settings import SchedulerSection

_INT32 = 2**31 - 1

Ends = tuple[float, float]

WHOLE: dict[str, Ends] = {
    "max_tokens": (0, _INT32),
    "min_tokens": (0, _INT32),
    "top_k": (-1, _INT32),
    "seed": (-(2**63), 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
"""Whole numbers and their ranges, both ends allowed; those in `OPTIONAL` may be None."""

OPTIONAL = ("seed", "logprobs", "prompt_logprobs")

REAL: dict[str, Ends] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
"""Numbers and their ranges, both ends allowed but for zero in `POSITIVE`."""

POSITIVE = ("top_p", "repetition_penalty")


def check(
    request: Request, registrations: Sequence[Registration], limits: Limits, pages: int,
    section: SchedulerSection,
) -> None:  # fmt: skip
    """Refuse what can never be served.

    Args:
        pages: of the pool.

    Raises:
        InvalidRequest: a setting or a token id is out of range, a wish is one that no policy looks
            at, or the request cannot fit; names which, and what is allowed.
    """
    section.check_wishes(request.priority, request.ttft_slo)
    prompt, most = len(request.prompt), request.params.max_tokens
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    _check_settings(request, limits.vocab_size)
    _check_composition(request, registrations, limits)
    total = prompt + most
    if total > limits.max_model_len:
        raise InvalidRequest(
            f"{prompt} prompt tokens and max_tokens {most} make {total}; "
            f"the model's context is {limits.max_model_len}",
            param="max_tokens",
        )
    own = sum(registration.n_pages for registration in registrations)
    if limits.pages(total) + own > pages - 1:
        raise InvalidRequest(
            f"{total} tokens need {limits.pages(total)} pages beside the adapters' {own}; "
            f"the pool has {pages - 1}",
            param="max_tokens",
        )


def _check_composition(
    request: Request, registrations: Sequence[Registration], limits: Limits
) -> None:
    """Raise InvalidRequest unless what is packed for a row has room for its adapters."""
    compose(request.adapters, limits.max_composed)
    ranks = [registration.info.rank for registration in registrations]
    if sum(ranks) > limits.max_rank:
        raise InvalidRequest(
            f"ranks {' + '.join(map(str, ranks))} make {sum(ranks)}; all adapters of a request "
            f"together may have {limits.max_rank} (adapters.max_rank)",
            param="adapters",
        )


def check_queue(
    request: Request, limits: Limits, section: SchedulerSection, waiting: Waiting, own: int
) -> None:
    """Refuse what the queue has no place for.

    Args:
        own: those of the same tenant that wait.

    Raises:
        Overloaded: it is full, or what is free is kept for other tenants.
    """
    n = len(waiting)
    tokens_full = n and waiting.tokens + len(request.prompt) > limits.max_queued_tokens
    if tokens_full or section.crowded(own, n, limits.max_queued):
        raise Overloaded(f"{n} requests are waiting, {own} of this tenant; the queue is full")


def _check_settings(request: Request, vocab_size: int) -> None:
    params = request.params
    for name, ends in WHOLE.items():
        value = getattr(params, name)
        if value is not None or name not in OPTIONAL:
            _check_number(name, value, ends, whole=True)
    for name, ends in REAL.items():
        _check_number(name, getattr(params, name), ends)
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens {params.min_tokens} is above max_tokens {params.max_tokens}",
            param="min_tokens",
        )
    _check_lists(params)
    _check_ids("prompt", request.prompt, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", [token for token, _ in params.logit_bias], vocab_size)


def _check_number(name: str, value: object, ends: Ends, *, whole: bool = False) -> None:
    low, high = ends
    right = isinstance(value, int if whole else int | float) and low <= value <= high
    if not right or (name in POSITIVE and not value):
        least = "above" if name in POSITIVE else "at least"
        raise InvalidRequest(
            f"{name} is {value!r}; it must be {least} {low} and at most {high}", param=name
        )


def _check_lists(params: SamplingParams) -> None:
    for name, values, most in (
        ("stop_token_ids", params.stop_token_ids, MAX_STOP_IDS),
        ("logit_bias", params.logit_bias, MAX_LOGIT_BIAS),
    ):
        if len(values) > most:
            raise InvalidRequest(f"{len(values)} entries; at most {most}", param=name)
    for _, bias in params.logit_bias:
        _check_number("logit_bias", bias, (-1e9, 1e9))


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not (isinstance(token, int) and 0 <= token < vocab_size):
            raise InvalidRequest(f"token id {token!r} is not below {vocab_size}", param=name)
