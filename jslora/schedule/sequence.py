"""One running or waiting sequence, as the scheduler sees it. Host only: no jax."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jslora.adapters.registration import Registration
from jslora.batch import SAMPLERS, Applied, Draw
from jslora.memory.prefix import next_keys, root_key
from jslora.request import Request, SamplingParams, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """The host's mutable record of a request.

    Attributes:
        registrations: the adapters it is bound to for life, in the order of `request.adapters`;
            their versions may not be known yet.
        order: of arrival.
        tokens: prompt and generated tokens that the host has read.
        cached: leading prompt tokens that the prefix cache gave when it last started.
        slot: place of its per-sequence state while it runs, on the device and in `Running`.
        life: how often it was taken off the device.
        scores: logprobs of the prompt tokens read so far, by position.
        draw: how its tokens are drawn; `sampler` is the least of `SAMPLERS` that can.
        applied: where its adapters lie while it runs, and their scales.
        place: its row in the queue's table, -1 while it is not there.
        since, tenant, adapter, level, work, deadline: its values there (see `queue.Waiting`);
            several adapters together count as one of their own.
        expected: tokens that its answer is expected to have.
        started: when it last began to run.
        watched: whether its arrival and start tell how great the load is.
        owed: tokens that loads for it are to be charged as.
    """

    request: Request
    registrations: tuple[Registration, ...]
    seed: int
    order: int
    tokens: list[int]
    cached: int = 0
    slot: int | None = None
    life: int = 0
    finished: bool = False
    scores: dict[int, TokenLogprob] = field(default_factory=dict)
    applied: tuple[Applied, ...] = ()
    place: int = -1
    since: float = 0.0
    tenant: int = 0
    adapter: int = 0
    level: float = 0.0
    work: float = 0.0
    deadline: float = float("inf")
    expected: int = 0
    started: float = 0.0
    owed: float = 0.0
    watched: bool = True
    # Asked for in every step, so worked out once.
    prompt_length: int = field(init=False)
    draw: Draw = field(init=False)
    sampler: int = field(init=False)
    _digests: tuple[str, ...] | None = None  # once all are known
    _key: str | None = None
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)
        self.draw = _draw(self.request.params, self.seed)
        self.sampler = SAMPLERS.index(_sampler(self.request.params, self.draw))

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its adapters, as far as their contents are known."""
        if self._digests is None:
            found = tuple(r.version.digest for r in self.registrations if r.version)
            if len(found) < len(self.registrations):
                return found
            self._digests = found
        return self._digests

    @property
    def read(self) -> bool:
        """Whether the contents of all its adapters are known."""
        return self._digests is not None or len(self.digests) == len(self.registrations)

    @property
    def weights(self) -> str:
        """A name for all that is added to the base model for it, once that is known."""
        if self._key is None:
            assert self.read, f"request {self.request.id} has adapters that were not read"
            scales = (adapter.scale for adapter in self.request.adapters)
            self._key = weights_key(self.digests, scales)
        return self._key

    @property
    def reuses(self) -> bool:
        """Whether it takes pages of the prefix cache; prompt logprobs have to be computed."""
        return self.request.params.prompt_logprobs is None

    @property
    def adapter_pages(self) -> int:
        """Pages that its adapters take on the device."""
        return sum(registration.n_pages for registration in self.registrations)

    def keys(self, pages: int, page_size: int) -> list[bytes]:
        """Prefix-cache keys of its first `pages` pages, whose tokens must all be known."""
        if not self._keys:
            self._keys = [root_key(self.weights, self.request.tenant, self.request.cache_salt)]
        known, end = (len(self._keys) - 1) * page_size, pages * page_size
        if known < end:
            assert end <= len(self.tokens), f"page to {end}, {len(self.tokens)} tokens known"
            self._keys += next_keys(self._keys[-1], self.tokens[known:end], page_size)
        return self._keys[1 : pages + 1]


def weights_key(digests: Iterable[str], scales: Iterable[float]) -> str:
    """A name for scaled adapters: equal for equal weights added in the same order."""
    parts = zip(digests, scales, strict=True)
    return "+".join(digest if scale == 1 else f"{scale!r}*{digest}" for digest, scale in parts)


def _draw(params: SamplingParams, seed: int) -> Draw:
    neutral = params.repetition_penalty == 1
    neutral &= params.presence_penalty == params.frequency_penalty == 0
    return Draw(
        seed=seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        stateful=not neutral or bool(params.logit_bias) or params.min_tokens > 0,
    )


def _sampler(params: SamplingParams, draw: Draw) -> str:
    if draw.temperature > 0 and (draw.top_k > 0 or draw.top_p < 1 or draw.min_p > 0):
        return "filter"
    return (
        "draw" if draw.temperature > 0 or params.logprobs is not None or draw.stateful else "greedy"
    )
