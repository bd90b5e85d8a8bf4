"""What crosses between a client of the engine and the engine: token ids in, token events out.

Text never appears here. A `Request` is one sequence; a caller who wants n choices sends n requests
with n seeds. Everything is frozen: these objects cross threads and, as msgpack, processes.
Host only: no jax.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from jslora.errors import BY_TYPE, JsloraError

MAX_LOGPROBS = 20
MAX_STOP_IDS = 16
MAX_LOGIT_BIAS = 300
MAX_PRIORITY = 100
MAX_SLO_SECONDS = 3600.0
MAX_SCALE = 2.0
MAX_NAMED = 256  # adapters in one list of `Stats` that is told of


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled and when it ends.

    Attributes:
        max_tokens: most tokens to generate; 0 scores the prompt only (with `prompt_logprobs`).
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest likeliest set whose probability reaches this.
        min_p: drop tokens less likely than this share of the likeliest one.
        seed: draws depend on (seed, position) only; None lets the engine choose one.
        stop: strings that end the text; applied where text is made, not in the engine.
        stop_token_ids: ids that end the sequence, beside the model's own end tokens.
        ignore_eos: do not end at the model's end tokens.
        min_tokens: end tokens and `stop_token_ids` cannot be drawn before this many tokens.
        logit_bias: (token id, bias) pairs added to the logits.
        logprobs: number of alternatives to report beside each token's logprob; None reports none.
        prompt_logprobs: the same for each prompt token.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


class Scaled(NamedTuple):
    """An adapter of a request, by its registered name, and what its delta is multiplied by."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate.

    Attributes:
        id: unique among running requests.
        prompt: token ids, at least one.
        adapters: whose deltas are added to the base model's outputs; none is the base alone.
        tenant: who pays for it; the API key's tenant.
        cache_salt: prompts share cached pages only within one tenant and one salt.
        priority: levels after the most urgent of its tenant, 0 to `MAX_PRIORITY`.
        ttft_slo: seconds in which it wants its first token; None means its tenant's.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapters: tuple[Scaled, ...] = ()
    tenant: str = "default"
    cache_salt: str = ""
    priority: int = 0
    ttft_slo: float | None = None

    @property
    def label(self) -> str:
        """The names of its adapters, joined by "+"; empty for the base model."""
        return "+".join(adapter.name for adapter in self.adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token and of the likeliest alternatives, likeliest first.

    Taken from the model's own distribution, before temperature, penalties and filters.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """A `JsloraError` as data: `type` is a key of `errors.BY_TYPE`."""

    type: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: JsloraError) -> "ErrorInfo":
        """An error as data."""
        return cls(
            type=error.type, message=error.message, param=error.param,
            retry_after=error.retry_after,
        )  # fmt: skip

    def error(self) -> JsloraError:
        """The error again."""
        kind = BY_TYPE.get(self.type, JsloraError)
        return kind(self.message, param=self.param, retry_after=self.retry_after)


class TokenEvent(NamedTuple):
    """News of one request; the last one carries `finish_reason`, or `error`, never both.

    A tuple, because hundreds are made for every step.

    Attributes:
        tokens: new token ids; an end token that finished the sequence is not among them.
        logprobs: one entry per token when asked for.
        finish_reason: "stop" or "length" on the last event.
        stop_token: the end or stop token id that finished the sequence.
        prompt_logprobs: on the first event when asked for; None for the first prompt token.
        cached_tokens: on the first event, prompt tokens whose keys and values were in the cache.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_token: int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    error: ErrorInfo | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What is known of one registered adapter version (the bind report, and where it is now).

    Attributes:
        digest: sha256 over tensor bytes and the configuration fields that change outputs; empty
            until the adapter was first read whole.
        state: "registered" (on disk only), "loading", "host", "device", "draining" or "failed".
        modules: target module -> (lowest rank, highest rank, scale) over the layers.
        bytes: size of its tensors as saved.
        bytes_disk, bytes_host, bytes_device: what its packed pages take in each tier now.
        pages: pages it takes on the device; the same ids in every layer.
        padding: share of those pages' numbers that hold no weight.
        storage: how its weights are kept: "full", "int8" or "int4".
        output_error: root mean square of what that changes its deltas by, as a share of theirs, for
            inputs of independent numbers; None until it was read whole, 0 if nothing changes.
        in_flight: requests that hold it, running or waiting.
        seconds: stage of its last load -> seconds ("read", "pack", "map", "transfer", ...).
        warnings: for instance that it was trained for a base of another name.
        error: why the last load under this name failed.
    """

    name: str
    digest: str
    state: str
    rank: int
    modules: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    layers: int = 0
    bytes: int = 0
    bytes_disk: int = 0
    bytes_host: int = 0
    bytes_device: int = 0
    pages: int = 0
    padding: float = 0.0
    storage: str = "full"
    output_error: float | None = None
    pinned: bool = False
    in_flight: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    path: str = ""
    base_model: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a ready engine tells its client once."""

    model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    pages: int
    fingerprint: str
    device: str
    adapters: tuple[AdapterInfo, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStats:
    """What one tenant has waiting and was given.

    Attributes:
        oldest_wait: seconds that its longest waiting request has waited for its first token.
        service: tokens computed for it, weighted as for fair shares; only grows.
    """

    running: int = 0
    waiting: int = 0
    oldest_wait: float = 0.0
    service: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters and gauges of the engine; counters only grow during an engine's life.

    Attributes:
        pages_cached: pages that only the prefix cache holds; they count as neither free nor KV.
        prefix_hit_tokens: prompt tokens found in the prefix cache, of `prefix_asked_tokens`.
        pages_adapters: pages of all adapters, and pages_idle of those among them that nothing uses
            and that may go at once.
        adapters_host, adapters_device: adapters whose packed pages are in that tier.
        idle_adapters: names on the device that nothing uses, the last used first; not all of them.
        adapter_seconds: stage of loading -> seconds, over all loads.
        too_late: requests given up because they could not be answered in their time.
        rate_limited: requests refused by a quota or a rate.
        oldest_wait: seconds that the longest waiting request has waited for its first token.
        tenants: of each tenant that ever sent a request.
        oldest_adapters: (adapter, seconds) of the adapters whose requests wait longest, the
            longest first; the base model is "".
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_kv: int = 0
    pages_cached: int = 0
    pages_adapters: int = 0
    pages_idle: int = 0
    ledger_errors: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_asked_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evictions: int = 0
    preemptions: int = 0
    corrupt_requests: int = 0
    recoveries: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    adapters_registered: int = 0
    adapters_host: int = 0
    adapters_device: int = 0
    host_bytes: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_failures: int = 0
    adapter_seconds: dict[str, float] = field(default_factory=dict)
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    idle_adapters: tuple[str, ...] = ()
    too_late: int = 0
    rate_limited: int = 0
    oldest_wait: float = 0.0
    tenants: dict[str, TenantStats] = field(default_factory=dict)
    oldest_adapters: tuple[tuple[str, float], ...] = ()
