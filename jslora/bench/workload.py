"""What a benchmark sends and when: jobs without end, a pure function of a `Spec`, or a trace.

Invariants: the same spec and run give the same jobs, however many are taken. Arrivals, models and
prompts come from separate random streams, so changing one leaves the others as they were. Random
prompts differ from run to run, or a server's prefix cache would make every run after the first
look better; arrivals and models do not. A trace is sent as it is written. Host only: no jax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from jslora.errors import ConfigError

Assignment = Literal["round-robin", "random", "zipf"]
Prompt = tuple[int, ...] | str | tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request to send.

    Attributes:
        arrival: seconds after the start of the run; 0 where no rate is set.
        prompt: token ids, text, or chat messages; never empty.
        output_tokens: tokens to ask for.
        tenant: whose key it is sent with.
        priority, ttft_slo: as the request's own (`jslora.request`).
    """

    index: int
    arrival: float
    model: str
    prompt: Prompt
    output_tokens: int
    tenant: str = "default"
    priority: int = 0
    ttft_slo: float | None = None

    @property
    def input_tokens(self) -> int:
        """The prompt's length in token ids; 0 for text, which only a server can count."""
        return len(self.prompt) if isinstance(self.prompt[0], int) else 0


Trace = tuple[Job, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The parameters of a workload.

    Attributes:
        models: names in order of popularity, where `assignment` has one.
        zipf_alpha: the k-th model of a zipf assignment is drawn with weight k^-alpha.
        rate: requests a second on average; None sets no arrival times.
        burstiness: shape of the gamma-distributed gaps; 1 is a Poisson process, less is burstier.
        input_tokens: length of the random prompts.
        vocab: random token ids are below this.
        prompts: taken in turn instead of random prompts, when there are any.

    Raises:
        ConfigError: a value is out of its range.
    """

    models: tuple[str, ...]
    assignment: Assignment = "round-robin"
    zipf_alpha: float = 1.0
    rate: float | None = None
    burstiness: float = 1.0
    input_tokens: int = 64
    output_tokens: int = 64
    vocab: int = 32000
    prompts: tuple[Prompt, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.assignment not in get_args(Assignment):
            allowed = ", ".join(get_args(Assignment))
            raise ConfigError(f"assignment is {self.assignment!r}; allowed are {allowed}")
        if not self.models:
            raise ConfigError("a workload needs at least one model")
        if self.zipf_alpha < 0 or self.seed < 0:
            raise ConfigError(
                f"zipf_alpha ({self.zipf_alpha}) and seed ({self.seed}) cannot be negative"
            )
        for name in ("rate", "burstiness", "input_tokens", "output_tokens", "vocab"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a positive, finite number")


def generate(workload: Spec | Trace, run: int) -> Iterator[Job]:
    """Yield the jobs of one run; run 0 is for warming up.

    A spec has no end. A trace is the same in every run but run 0, whose token ids are drawn anew,
    or warming up would leave the measured prompts in a prefix cache.
    """
    if isinstance(workload, Spec):
        return _endless(workload, run)
    return iter(workload if run else map(_redrawn, workload))


def _endless(spec: Spec, run: int) -> Iterator[Job]:
    arrivals, models, prompts = _arrivals(spec), _models(spec), _prompts(spec, run)
    for index in count():
        yield Job(
            index=index,
            arrival=next(arrivals),
            model=next(models),
            prompt=next(prompts),
            output_tokens=spec.output_tokens,
        )


def _redrawn(job: Job) -> Job:
    if not job.input_tokens:
        return job
    below = 1 + max(token for token in job.prompt if isinstance(token, int))
    return replace(job, prompt=draw_prompt(stream(0, 3, job.index), below, job.input_tokens))


def load_prompts(path: Path, endpoint: str) -> tuple[Prompt, ...]:
    """Read a JSONL file of `{"prompt": text}` or `{"messages": [...]}`, made fit for `endpoint`.

    A text sent to the chat endpoint becomes one user message.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line (named) has another form.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from None
    prompts = tuple(
        _parse_line(line, endpoint, f"{path}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def popularity(models: int, alpha: float) -> np.ndarray:
    """Return the share of each of `models` models under a zipf assignment; alpha 0 is uniform."""
    weights = np.arange(1, models + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


def _parse_line(line: bytes, endpoint: str, where: str) -> Prompt:
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if bool(entry.prompt) == bool(entry.messages):
        raise ConfigError(f"{where}: expected either a prompt or messages, not empty")
    return fit(tuple(entry.messages or ()) or entry.prompt or "", endpoint, where)


def fit(prompt: Prompt, endpoint: str, where: str) -> Prompt:
    """Return a prompt as `endpoint` takes it: text sent to the chat endpoint is a user's message.

    Raises:
        ConfigError: messages for another endpoint, or token ids for this one; it names `where`.
    """
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},) if endpoint == "chat" else prompt
    if isinstance(prompt[0], dict) and endpoint != "chat":
        raise ConfigError(f"{where}: messages can only be sent to the chat endpoint")
    if isinstance(prompt[0], int) and endpoint == "chat":
        raise ConfigError(f"{where}: the chat endpoint takes no token ids")
    return prompt


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the random stream of `seed` that `key` names, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_prompt(rng: np.random.Generator, vocab: int, length: int) -> tuple[int, ...]:
    """Return `length` random token ids below `vocab`."""
    return tuple(rng.integers(vocab, size=length).tolist())


def _arrivals(spec: Spec) -> Iterator[float]:
    """Running sum of gamma gaps of mean 1/rate and coefficient of variation burstiness^-1/2."""
    rng = stream(spec.seed, 0)
    if spec.rate is None:
        gaps: Iterator[float] = (0.0 for _ in count())
    else:
        scale = 1 / (spec.rate * spec.burstiness)
        gaps = (rng.gamma(spec.burstiness, scale) for _ in count())
    return accumulate(gaps)


def _models(spec: Spec) -> Iterator[str]:
    if spec.assignment == "round-robin":
        return (spec.models[i % len(spec.models)] for i in count())
    alpha = spec.zipf_alpha if spec.assignment == "zipf" else 0.0
    return _drawn(spec.models, np.cumsum(popularity(len(spec.models), alpha)), stream(spec.seed, 1))


def _drawn(models: Sequence[str], edges: np.ndarray, rng: np.random.Generator) -> Iterator[str]:
    last = len(models) - 1
    # The sum of the shares may round to just below 1.
    return (models[min(int(edges.searchsorted(rng.random(), "right")), last)] for _ in count())


def _prompts(spec: Spec, run: int) -> Iterator[Prompt]:
    if spec.prompts:
        return (spec.prompts[i % len(spec.prompts)] for i in count())
    rng = stream(spec.seed, 2, run)
    return (draw_prompt(rng, spec.vocab, spec.input_tokens) for _ in count())
