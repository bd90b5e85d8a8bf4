"""One running or waiting sequence, as the scheduler sees it. Host only: no jax."""

from dataclasses import dataclass, field

from jslora.adapters.registration import Registration
from jslora.adapters.version import Version
from jslora.batch import SAMPLERS
from jslora.memory.prefix import next_key, root_key
from jslora.request import Request, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """The host's mutable record of a request.

    Attributes:
        registration: the adapter it is bound to for life, whose version may not be known yet.
        tokens: prompt and generated tokens that the host has read.
        computed: leading tokens whose keys and values are written, or dispatched to be.
        pending: tokens sampled on the device and not yet read, 0 or 1 between steps.
        pages: block table; holds at least `computed` tokens.
        published: leading pages that the prefix cache was offered, or gave.
        cached: leading prompt tokens that the prefix cache gave when it last started.
        slot: place of its per-sequence state on the device while it runs.
        life: how often it was taken off the device; steps of an earlier one may be in flight.
        hold: planned no more until its pending token is read, because it will be preempted.
        scores: logprobs of the prompt tokens read so far, by position.
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
    cached: int = 0
    slot: int | None = None
    life: int = 0
    hold: bool = False
    finished: bool = False
    scores: dict[int, TokenLogprob] = field(default_factory=dict)
    _keys: list[bytes] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def version(self) -> Version | None:
        """Its adapter's version; None also where that is not known yet."""
        return self.registration.version if self.registration else None

    @property
    def digest(self) -> str:
        version = self.version
        return version.digest if version else ""

    def keys(self, pages: int, page_size: int) -> list[bytes]:
        """Prefix-cache keys of its first `pages` pages, whose tokens must all be known."""
        keys = self._keys or [root_key(self.digest, self.request.tenant, self.request.cache_salt)]
        for end in range(len(keys) * page_size, pages * page_size + 1, page_size):
            assert end <= len(self.tokens), f"page to {end}, {len(self.tokens)} tokens known"
            keys.append(next_key(keys[-1], self.tokens[end - page_size : end]))
        self._keys = keys
        return keys[1 : pages + 1]

    @property
    def ready(self) -> bool:
        """Whether there is anything to compute: a token not yet fed, and tokens still wanted."""
        params = self.request.params
        wanted = self.generated + self.pending < params.max_tokens
        scoring = params.max_tokens == 0 and self.computed < self.prompt_length
        return not self.finished and not self.hold and (wanted or scoring)

    @property
    def stateful(self) -> bool:
        """Whether sampling needs counts, bias or stop ids of its own on the device."""
        p = self.request.params
        neutral = p.repetition_penalty == 1 and p.presence_penalty == p.frequency_penalty == 0
        return not neutral or bool(p.logit_bias) or p.min_tokens > 0

    @property
    def sampler(self) -> int:
        """Index in `SAMPLERS` of the least program that serves it."""
        p = self.request.params
        if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0):
            return SAMPLERS.index("filter")
        drawn = p.temperature > 0 or p.logprobs is not None or self.stateful
        return SAMPLERS.index("draw" if drawn else "greedy")
