"""One running or waiting sequence, as the scheduler sees it. Host only: no jax."""

from dataclasses import dataclass, field

from jslora.adapters.registration import Registration
from jslora.adapters.version import Version
from jslora.batch import SAMPLERS, Draw, Placement
from jslora.memory.prefix import next_key, root_key
from jslora.request import Request, SamplingParams, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """The host's mutable record of a request.

    Attributes:
        registration: the adapter it is bound to for life, whose version may not be known yet.
        order: of arrival.
        tokens: prompt and generated tokens that the host has read.
        computed: leading tokens whose keys and values are written, or dispatched to be.
        pending: tokens sampled on the device and not yet read, 0 or 1 between steps.
        pages: block table; holds at least `computed` tokens.
        published: leading pages that the prefix cache was offered, or gave.
        given: leading pages that the prefix cache gave when it last started.
        cached: leading prompt tokens that the prefix cache gave when it last started.
        slot: place of its per-sequence state on the device while it runs.
        life: how often it was taken off the device; steps of an earlier one may be in flight.
        hold: planned no more until its pending token is read, because it will be preempted.
        scores: logprobs of the prompt tokens read so far, by position.
        draw: how its tokens are drawn; `sampler` is the least of `SAMPLERS` that can.
        placement: where its adapter lies while it runs.
        place: its row in the queue's table, -1 while it is not there.
        since, tenant, adapter, level, work, deadline: its values there (see `queue.Waiting`).
        expected: tokens that its answer is expected to have.
        started: when it last began to run.
        watched: whether its arrival and start tell how great the load is.
        owed: tokens that loads for it are to be charged as.
    """

    request: Request
    registration: Registration | None
    seed: int
    order: int
    tokens: list[int]
    computed: int = 0
    pending: int = 0
    pages: list[int] = field(default_factory=list)
    published: int = 0
    given: int = 0
    cached: int = 0
    slot: int | None = None
    life: int = 0
    hold: bool = False
    finished: bool = False
    scores: dict[int, TokenLogprob] = field(default_factory=dict)
    placement: Placement | None = None
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
    _whole: int = field(init=False)  # its length at the end, if nothing ends it sooner
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)
        self._whole = self.prompt_length + self.request.params.max_tokens
        self.draw = _draw(self.request.params, self.seed)
        self.sampler = SAMPLERS.index(_sampler(self.request.params, self.draw))

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def version(self) -> Version | None:
        """Its adapter's version; None also where that is not known yet."""
        return self.registration.version if self.registration else None

    @property
    def digest(self) -> str:
        version = self.version
        return version.digest if version else ""

    @property
    def reuses(self) -> bool:
        """Whether it takes pages of the prefix cache; prompt logprobs have to be computed."""
        return self.request.params.prompt_logprobs is None

    @property
    def adapter_pages(self) -> int:
        """Pages that its adapter takes on the device."""
        return self.registration.n_pages if self.registration else 0

    def keys(self, pages: int, page_size: int) -> list[bytes]:
        """Prefix-cache keys of its first `pages` pages, whose tokens must all be known."""
        keys = self._keys or [root_key(self.digest, self.request.tenant, self.request.cache_salt)]
        for end in range(len(keys) * page_size, pages * page_size + 1, page_size):
            assert end <= len(self.tokens), f"page to {end}, {len(self.tokens)} tokens known"
            keys.append(next_key(keys[-1], self.tokens[end - page_size : end]))
        self._keys = keys
        return keys[1 : pages + 1]

    def wanted(self) -> int:
        """Tokens to compute next, 0 if there is nothing to compute them for."""
        known = len(self.tokens) + self.pending
        if self.finished or self.hold:
            return 0
        if known >= self._whole and (self._whole > self.prompt_length or self.computed >= known):
            return 0
        return known - self.computed


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
