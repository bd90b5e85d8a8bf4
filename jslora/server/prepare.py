"""From a validated body to a `Job`: what the engine has to run, and how to word the answer.

Prompts become token ids here, limits that depend on the model are checked here, and n choices of
p prompts become n·p single requests; choice j of a prompt draws from seed + j, whatever the
prompt's place in a list.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jslora.composition import compose
from jslora.config import Key
from jslora.errors import InvalidRequest
from jslora.request import EngineInfo, Request, SamplingParams, Scaled
from jslora.server.protocol import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody
from jslora.server.service import Service

DEFAULT_COMPLETION_TOKENS = 16
MAX_SCORES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request of a client.

    Attributes:
        model: the base or the adapter that answers, which is not what an alias was called; the base
            too where several are added to it, or one with a scale.
        requests: its sequences, n in a row for each prompt.
        echo: per sequence, the prompt's text to begin the answer with; empty for no echo.
    """

    id: str
    model: str
    created: int
    chat: bool
    requests: tuple[Request, ...]
    n: int
    echo: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once whatever n is."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])


async def completion_job(service: Service, body: CompletionBody, key: Key) -> Job:
    """Prepare `POST /v1/completions`.

    Raises:
        InvalidRequest, UnknownModel, Unavailable: as they say.
    """
    engine = service.engine()
    service.config.scheduler.check_wishes(body.priority, body.ttft_slo)
    model, adapters = _answering(service, body, key)
    _bound_choices(len(body.prompts), body.n)
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens 0 needs echo: true", param="max_tokens")
    prompts, echo = [], []
    for prompt in body.prompts:
        ids = prompt
        if isinstance(ids, str):
            ids = await service.encode(ids, engine.max_model_len)
        _check_ids(ids, engine.vocab_size)
        prompts.append(tuple(ids))
        if body.echo:
            text = prompt if isinstance(prompt, str) else service.tokenizer.decode(ids)
            echo += [text] * body.n
    params = [_completion_params(body, len(prompt), engine) for prompt in prompts]
    _bound_scores(params, [len(prompt) for prompt in prompts] if body.echo else [], body.n)
    return _job("cmpl", body, key, model, adapters, prompts, params, tuple(echo))


async def chat_job(service: Service, body: ChatBody, key: Key) -> Job:
    """Prepare `POST /v1/chat/completions`.

    Raises:
        InvalidRequest, UnknownModel, Unavailable: as they say.
    """
    engine = service.engine()
    service.config.scheduler.check_wishes(body.priority, body.ttft_slo)
    model, adapters = _answering(service, body, key)
    messages = [message.plain() for message in body.messages]
    prompt = tuple(await service.render(messages, engine.max_model_len, body.add_generation_prompt))
    asked = body.max_completion_tokens or body.max_tokens
    if asked == 0:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    max_tokens = _fit(len(prompt), asked, engine.max_model_len, engine.max_model_len)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _with_ids_checked(body.sampling(max_tokens, logprobs=logprobs), engine)
    _bound_scores([params], [], body.n)
    return _job("chatcmpl", body, key, model, adapters, [prompt], [params])


def _answering(service: Service, body: GenerationBody, key: Key) -> tuple[str, tuple[Scaled, ...]]:
    """What the answer's `model` says, and the adapters of its requests."""
    names = service.names
    adapter = names.resolve(body.model, key, body.user)
    if not body.adapters:
        return (names.base, ()) if adapter is None else (adapter, (Scaled(adapter),))
    if body.model != names.base:
        raise InvalidRequest(
            f"adapters are added to the base: model must be {names.base!r} then, "
            f"not {body.model!r}",
            param="adapters",
        )
    asked = []
    for named in body.adapters:
        if named.name == names.base:
            raise InvalidRequest(f"{named.name!r} is the base, no adapter", param="adapters")
        adapter = names.resolve(named.name, key, body.user, param="adapters")
        if adapter is not None:  # an alias led to the base, which adds nothing
            asked.append((adapter, named.scale))
    return names.base, compose(asked, service.config.adapters.max_composed)


def _completion_params(body: CompletionBody, length: int, engine: EngineInfo) -> SamplingParams:
    max_tokens = _fit(length, body.max_tokens, DEFAULT_COMPLETION_TOKENS, engine.max_model_len)
    scored = None
    if body.echo:
        # Without tokens to generate, scoring the prompt is all there is to run.
        scored = body.logprobs if max_tokens else body.logprobs or 0
    return _with_ids_checked(
        body.sampling(max_tokens, logprobs=body.logprobs, prompt_logprobs=scored), engine
    )


def _job(
    prefix: str,
    body: GenerationBody,
    key: Key,
    model: str,
    adapters: tuple[Scaled, ...],
    prompts: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
    echo: tuple[str, ...] = (),
) -> Job:
    id = f"{prefix}-{uuid.uuid4().hex}"
    requests: list[Request] = []
    for prompt, sampling in zip(prompts, params, strict=True):
        for choice in range(body.n):
            # Engines take seeds of 63 bits.
            seed = None if body.seed is None else (body.seed + choice) % 2**63
            requests.append(
                Request(
                    id=f"{id}-{len(requests)}",
                    prompt=prompt,
                    params=replace(sampling, seed=seed),
                    adapters=adapters,
                    tenant=key.tenant,
                    cache_salt=body.cache_salt,
                    priority=body.priority,
                    ttft_slo=body.ttft_slo,
                )
            )
    options = body.stream_options
    return Job(
        id=id,
        model=model,
        created=int(time.time()),
        chat=isinstance(body, ChatBody),
        requests=tuple(requests),
        n=body.n,
        echo=echo,
        stream=body.stream,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        return_token_ids=body.return_token_ids,
    )


def _bound_choices(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise InvalidRequest(
            f"{prompts} prompts times n {n} make {prompts * n} choices; at most {MAX_CHOICES} "
            "are allowed in one request",
            param="n" if n > prompts else "prompt",
        )


def _bound_scores(params: Sequence[SamplingParams], echoed: Sequence[int], n: int) -> None:
    """Log-probabilities are the one thing that can make an answer very large."""
    logprobs = params[0].logprobs
    if logprobs is None:
        return
    tokens = n * (sum(sampling.max_tokens for sampling in params) + sum(echoed))
    if tokens * (logprobs + 1) > MAX_SCORES:
        raise InvalidRequest(
            f"{logprobs + 1} log-probabilities for each of up to {tokens} tokens are more than "
            f"the {MAX_SCORES} allowed in one answer",
            param="logprobs",
        )


def _fit(length: int, asked: int | None, default: int, limit: int) -> int:
    """Tokens to generate after a prompt of `length` tokens; a default shrinks to what is left."""
    if length == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    wanted = min(default, max(limit - length, 1)) if asked is None else asked
    if length + wanted > limit:
        raise InvalidRequest(
            f"the prompt's {length} tokens and max_tokens {wanted} are {length + wanted} tokens; "
            f"this model takes at most {limit}",
            param="max_tokens" if length < limit else "prompt",
        )
    return wanted


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    if ids and max(ids) >= vocabulary:
        raise InvalidRequest(
            f"token id {max(ids)} is outside the vocabulary of {vocabulary}", param="prompt"
        )


def _with_ids_checked(params: SamplingParams, engine: EngineInfo) -> SamplingParams:
    for name, ids in (
        ("logit_bias", [token for token, _ in params.logit_bias]),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and max(ids) >= engine.vocab_size:
            raise InvalidRequest(
                f"token id {max(ids)} is outside the vocabulary of {engine.vocab_size}", param=name
            )
    return params
