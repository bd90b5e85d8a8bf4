"""How far two adapters of one base answer differently: their texts, and numbers at every token.

Both sides answer each prompt greedily. Then what the left side wrote is given to both as a prompt,
so that both are asked for the next token after the same text at every place of it; a text would
part for good at the first difference. One engine serves both sides, so nothing else differs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jslora.config import EngineConfig, Storage, parse
from jslora.engine import Completion, Engine
from jslora.errors import ConfigError
from jslora.model.config import ModelConfig
from jslora.progress import Progress, silent
from jslora.request import MAX_LOGPROBS, SamplingParams, TokenLogprob
from jslora.tokenizer import Tokenizer

Prompt = str | tuple[int, ...] | tuple[dict[str, Any], ...]
"""A text, token ids, or the messages of a conversation."""

BASE = "base"
_LENGTHS = 512  # lengths are multiples of it, so that programs are found again
_LEAST = 1e-9  # probability, of all tokens that are not told of


class Side(NamedTuple):
    """What is compared: an adapter's folder kept in a storage, or the base, with no folder."""

    folder: Path | None
    storage: str = "full"

    @classmethod
    def parse(cls, text: str) -> "Side":
        """Read "base", "FOLDER" or "FOLDER:STORAGE".

        Raises:
            ConfigError: the folder does not exist.
        """
        if text == BASE:
            return cls(None)
        path, _, storage = text.rpartition(":")
        if storage not in get_args(Storage) or not path:
            path, storage = text, "full"
        if not path or not Path(path).is_dir():
            raise ConfigError(f"{path!r} is neither {BASE!r} nor an adapter's folder")
        return cls(Path(path).resolve(), storage)


@dataclass(frozen=True, slots=True)
class Place:
    """One token that the left side wrote, as both see it.

    Attributes:
        agrees: whether both hold the same token for the likeliest.
        off: |Δ log-probability| of the token.
        kl: divergence of the right side from the left, in nats, of the distribution over the tokens
            told of by both (`MAX_LOGPROBS` each) and all others as one: at most the whole one's.
    """

    agrees: bool
    off: float
    kl: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt: both texts, and a place for each token of the left one."""

    left: str
    right: str
    same: bool
    places: tuple[Place, ...]


def tokenized(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of texts and of conversations, whose last answers are left out.

    Raises:
        InvalidRequest: the model has no chat template, or it cannot render a conversation.
    """
    return [_ids(tokenizer, prompt) for prompt in prompts]


def room(model: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """A length for `model.max_model_len` that holds each of the prompts and its answer.

    Raises:
        ConfigError: there is none, or `max_tokens` is less than 1.
    """
    needed = max(map(len, prompts)) + max_tokens
    if max_tokens < 1 or needed > model.max_positions:
        raise ConfigError(
            f"the longest prompt has {needed - max_tokens} tokens and its answer may have "
            f"{max_tokens}; at least 1 and together at most {model.max_positions} are possible"
        )
    return min(model.max_positions, -(-needed // _LENGTHS) * _LENGTHS)


def comparison_config(
    folder: Path, dtype: str, left: Side, right: Side, max_model_len: int, cache_dir: Path
) -> EngineConfig:
    """A configuration for comparing these two, that lets their folders be read and no others.

    Args:
        folder: the model's.
    """
    sides = _names(left, right)
    return parse(
        {
            "cache_dir": str(cache_dir),
            "model": {
                "source": str(folder),
                "dtype": dtype,
                "served_name": BASE,
                "max_model_len": max_model_len,
            },
            "adapters": {
                "roots": sorted(
                    {str(side.folder.parent) for side in sides.values() if side.folder}
                ),
                "preload": "none",
                "storage_of": {name: side.storage for name, side in sides.items() if side.folder},
                "host_cache_bytes": "1GiB",
            },
            "scheduler": {"max_running": 8, "max_step_tokens": 64},
        }
    )


def compare(
    engine: Engine,
    left: Side,
    right: Side,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    progress: Progress = silent,
) -> list[Answer]:
    """Compare on prompts, given as token ids.

    Args:
        engine: of `comparison_config`.
        progress: told of stage "compare" after each prompt.

    Raises:
        AdapterRejected: an adapter does not bind to the model.
        InvalidRequest: a prompt is too long.
    """
    names = []
    for name, side in _names(left, right).items():
        if side.folder:
            engine.load_adapter(name, str(side.folder), replace=True)
        names.append(name if side.folder else None)
    answers = []
    for done, prompt in enumerate(prompts, start=1):
        answers.append(_compare(engine, names[0], names[1], prompt, max_tokens))
        progress("compare", done, len(prompts), "")
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures over all places of all prompts; those of no place are None."""
    places = [place for answer in answers for place in answer.places]
    offs, kls = [place.off for place in places], [place.kl for place in places]
    count = len(places)
    return {
        "prompts": len(answers),
        "same_texts": sum(answer.same for answer in answers),
        "tokens": count,
        "agreement": sum(place.agrees for place in places) / count if count else None,
        "logprob_off_max": max(offs, default=None),
        "logprob_off_mean": math.fsum(offs) / count if count else None,
        "kl_max": max(kls, default=None),
        "kl_mean": math.fsum(kls) / count if count else None,
    }


def _names(left: Side, right: Side) -> dict[str, Side]:
    return {"left": left, "right": right}


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    messages = [part for part in prompt if isinstance(part, dict)]
    if not messages:
        return [part for part in prompt if isinstance(part, int)]
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    return tokenizer.apply_chat_template(messages)


def _compare(
    engine: Engine, left: str | None, right: str | None, prompt: Sequence[int], max_tokens: int
) -> Answer:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    (one,) = engine.generate([prompt], params, adapter=left)
    (other,) = engine.generate([prompt], params, adapter=right)
    text = [*prompt, *one.tokens]
    seen, too = (_scored(engine, name, text)[len(prompt) :] for name in (left, right))
    places = tuple(_place(a, b) for a, b in zip(seen, too, strict=True))
    return Answer(_text(one), _text(other), one.tokens == other.tokens, places)


def _scored(engine: Engine, adapter: str | None, text: list[int]) -> list[TokenLogprob]:
    params = SamplingParams(max_tokens=0, prompt_logprobs=MAX_LOGPROBS)
    (scored,) = engine.generate([text], params, adapter=adapter)
    assert scored.prompt_logprobs and len(scored.prompt_logprobs) == len(text)
    first, *rest = scored.prompt_logprobs
    assert first is None and None not in rest, "a prompt's logprobs begin with its second token"
    return [first, *rest]  # type: ignore[list-item]


def _place(left: TokenLogprob, right: TokenLogprob) -> Place:
    return Place(
        agrees=left.top[0][0] == right.top[0][0],
        off=abs(left.logprob - right.logprob),
        kl=divergence(_known(left), _known(right)),
    )


def _known(told: TokenLogprob) -> dict[int, float]:
    return dict(told.top) | {told.token: told.logprob}


def divergence(left: Mapping[int, float], right: Mapping[int, float]) -> float:
    """KL(left ‖ right) in nats over the tokens that both know of, and all others as one."""
    shared = left.keys() & right.keys()
    total = math.fsum(math.exp(left[t]) * (left[t] - right[t]) for t in shared)
    p, q = (max(_LEAST, 1 - math.fsum(math.exp(side[t]) for t in shared)) for side in (left, right))
    return max(0.0, total + p * math.log(p / q))


def _text(completion: Completion) -> str:
    return completion.text or " ".join(map(str, completion.tokens))
