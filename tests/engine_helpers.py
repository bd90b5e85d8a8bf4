"""Small engines for tests: any golden or random model in float32, ledger checked at every step."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from goldens.adapters import PARENTS
from goldens.cases import ROOT, Case
from short_answers import QUANTILE, expect_short_answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jslora.engine import Adapter, Completion, Engine
from jslora.errors import JsloraError
from jslora.request import SamplingParams

LLAMA3 = ROOT / "llama3"
CONFIG = json.loads((LLAMA3 / "model" / "config.json").read_text())
PROMPT = [5, 6, 7, 8, 9]
EVERYTHING = sorted(PARENTS)
GOLDEN = SamplingParams(
    temperature=0, max_tokens=16, ignore_eos=True, logprobs=20, prompt_logprobs=1
)
TOLERANCE = 2e-3
"""Between log-probabilities in float32 and the goldens'."""


def greedy(max_tokens: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **settings)


def small_engine(tmp: Path, model: Path | None, /, **sections: Any) -> Engine:
    """An engine over a golden model's folder, with adapters below `tmp`.

    Engines whose `tmp` lie side by side share compiled programs.
    """
    return Engine(small_config(tmp, model, **sections), check_ledger=True)


def small_config(tmp: Path, model: Path | None, /, **sections: Any) -> dict[str, Any]:
    """The configuration of a small engine."""
    config: dict[str, Any] = {
        "cache_dir": str(tmp.parent / "engine-cache"),
        "model": {"source": str(model), "dtype": "float32"} | sections.pop("model", {}),
        "pool": {"pages": 256} | sections.pop("pool", {}),
        "adapters": {"roots": [str(tmp)], "preload": "none", "max_rank": 64}
        | sections.pop("adapters", {}),
        "scheduler": {"max_running": 8, "max_step_tokens": 32} | sections.pop("scheduler", {}),
    }
    return config | sections


@contextmanager
def tight_engine(tmp: Path, **sections: Any) -> Iterator[Engine]:
    """31 pages, for KV and at most three wide adapters; no prefix cache takes any."""
    tight = {
        "pool": {"pages": 32, "prefix_cache": False},
        "scheduler": {"max_step_tokens": 16, "reserve": QUANTILE},
    }
    with small_engine(tmp, LLAMA3 / "model", **(tight | sections)) as engine:
        engine.core.run_on_engine(lambda: expect_short_answers(engine.core.scheduler))
        yield engine


@dataclass(frozen=True)
class Ask:
    """One request to an engine."""

    prompt: Sequence[int]
    params: SamplingParams
    adapter: Adapter | None = None


class Asked:
    """Requests that entered an engine together, between two steps, so that batches repeat."""

    def __init__(self, engine: Engine, asks: Sequence[Ask]) -> None:
        self._engine = engine
        self._jobs = [
            engine._job(ask.prompt, ask.params, engine._resolve(ask.adapter)) for ask in asks
        ]
        self.ids = [job.request.id for job in self._jobs]
        engine.core.run_on_engine(self._submit)

    def _submit(self) -> None:
        for job in self._jobs:
            self._engine._submit(job, job.events.put)

    def outcomes(self) -> list[Completion | JsloraError]:
        """What became of each, in order."""
        found: list[Completion | JsloraError] = []
        for job in self._jobs:
            try:
                found.append(job.collect())
            except JsloraError as error:
                found.append(error)
        self._engine._forget(self._jobs)
        return found


def answers(engine: Engine, asks: Sequence[Ask]) -> list[Completion]:
    """Answer requests in one batch; the first error is raised."""
    found: list[Completion] = []
    for outcome in Asked(engine, asks).outcomes():
        if isinstance(outcome, JsloraError):
            raise outcome
        found.append(outcome)
    return found


def assert_golden(answer: Completion, case: Case, i: int) -> None:
    """What an engine answered to a golden prompt, with `GOLDEN`, is what PEFT does in float32."""
    assert list(answer.tokens) == case.greedy[i], case.name
    expected = dict(zip(case.first_ids[i].tolist(), case.first_logprobs[i].tolist(), strict=True))
    for token, logprob in answer.logprobs[0].top:
        assert abs(logprob - expected[token]) <= TOLERANCE, (case.name, token)
    chosen = [entry.logprob for entry in answer.logprobs]
    np.testing.assert_allclose(chosen, case.logprobs[i], rtol=0, atol=TOLERANCE)
    assert answer.prompt_logprobs is not None
    scored = [entry.logprob for entry in answer.prompt_logprobs[1:] if entry]
    np.testing.assert_allclose(scored, case.prompt_logprobs[i], rtol=0, atol=TOLERANCE)


def tokens_of(engine: Engine, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
    """The tokens of `answers`."""
    return [answer.tokens for answer in answers(engine, asks)]


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {true}"
        time.sleep(0.002)


def assert_nothing_leaked(engine: Engine) -> None:
    """Once an engine is idle, every page is free, an idle adapter's, or the prefix cache's."""
    wait_until(lambda: engine.core.scheduler.idle)
    engine.core.run_on_engine(engine.core.scheduler.check)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_kv, stats.ledger_errors) == (0, 0, 0, 0)
    assert stats.pages_free + stats.pages_adapters + stats.pages_cached == stats.pages_total


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the 256 bytes, id by id."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(b if b in printable else next(others)): b for b in range(256)}
    assert vocabulary.keys() == set(letters)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
