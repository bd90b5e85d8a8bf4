"""How well a model foretells a text, by the engine that serves it.

The text is cut into windows of as many tokens as are asked for; within a window every token but the
first is scored, after all that stand before it there. Two ways of keeping the weights are compared
token by token, so that what the text itself is like falls out of the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jslora.config import EngineConfig
from jslora.engine import Engine
from jslora.errors import ConfigError
from jslora.progress import Progress, silent
from jslora.request import SamplingParams

TEXT = Path(__file__).parent / "text.txt"
"""Stories, explanations, instructions, letters and a little code; written for this, and licensed as
the repository is."""

_SCORE = SamplingParams(max_tokens=0, prompt_logprobs=1)


@dataclass(frozen=True)
class Scores:
    """Of each scored token its logprob, and the token that the model thought likeliest."""

    logprobs: np.ndarray
    likeliest: np.ndarray

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logprobs.mean()))


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one way from another.

    Attributes:
        ratio: of the perplexities; above 1 is worse.
        error: standard error of the ratio, tokens being taken as independent.
        agreement: share of the tokens for which both think the same token likeliest.
    """

    ratio: float
    error: float
    agreement: float


def score(config: EngineConfig, text: str, window: int, progress: Progress = silent) -> Scores:
    """Score a text with the base model.

    Args:
        window: tokens that are seen together, the first of which is not scored.

    Raises:
        ConfigError: the model has no tokenizer, or the window is out of its range.
        ModelError: the model's files are wrong.
    """
    if window < 2:
        raise ConfigError(f"a window of {window} tokens; it must have at least 2")
    adapters = config.adapters.model_copy(update={"preload": "none", "pinned": []})
    with Engine(config.model_copy(update={"adapters": adapters}), progress) as engine:
        longest = engine.info.max_model_len
        if engine.tokenizer is None:
            raise ConfigError("perplexity is of a text, and this model has no tokenizer")
        if window > longest:
            raise ConfigError(f"a window of {window} tokens; the model's context is {longest}")
        tokens = engine.tokenizer.encode(text, add_special_tokens=False)
        windows = [tokens[first : first + window] for first in range(0, len(tokens), window)]
        answers = engine.generate([each for each in windows if len(each) > 1], _SCORE)
    scored = [token for answer in answers for token in answer.prompt_logprobs or () if token]
    return Scores(
        np.array([token.logprob for token in scored]),
        np.array([token.top[0][0] for token in scored]),
    )


def score_ways(
    config: EngineConfig, ways: Sequence[str], text: str, window: int, progress: Progress = silent
) -> dict[str, Scores]:
    """Scores of a text by value of `model.quantize`, one engine after the other."""
    found = {}
    for way in ways:
        model = config.model.model_copy(update={"quantize": way})
        found[way] = score(config.model_copy(update={"model": model}), text, window, progress)
    return found


def compare(one: Scores, other: Scores) -> Difference:
    """How the other differs from the one, on the same tokens."""
    worse = one.logprobs - other.logprobs
    ratio = float(np.exp(worse.mean()))
    error = ratio * float(worse.std() / np.sqrt(worse.size))
    return Difference(ratio, error, float((one.likeliest == other.likeliest).mean()))
