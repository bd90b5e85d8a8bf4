"""The engine against transformers and peft, for every architecture, alone and all in one batch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import small_engine
from goldens.cases import MODELS, ROOT, Case, cases

from jslora.engine import Engine
from jslora.request import SamplingParams

GREEDY = SamplingParams(
    temperature=0, max_tokens=16, ignore_eos=True, logprobs=20, prompt_logprobs=1
)


@pytest.fixture(scope="module", params=sorted(MODELS))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder = ROOT / request.param
    with small_engine(
        tmp_path_factory.mktemp("engine"), folder / "model",
        adapters={"roots": [str(folder / "adapters")], "preload": "all"},
    ) as engine:  # fmt: skip
        engine.golden = [case for case in cases() if case.model_dir == folder / "model"]
        yield engine


def name_of(case: Case) -> str | None:
    return Path(case.adapter_dir).name if case.adapter_dir else None


def test_logprobs_and_greedy_text_equal_the_reference(engine: Engine) -> None:
    assert len(engine.golden) == 7
    for case in engine.golden:
        answers = engine.generate(case.prompts, GREEDY, name_of(case))
        for i, answer in enumerate(answers):
            assert list(answer.tokens) == list(case.greedy[i]), case.name
            expected = dict(zip(case.first_ids[i], case.first_logprobs[i], strict=True))
            for token, logprob in answer.logprobs[0].top:
                assert abs(logprob - expected[token]) <= 2e-3, (case.name, token)
            chosen = [entry.logprob for entry in answer.logprobs]
            np.testing.assert_allclose(chosen, case.logprobs[i], atol=2e-3)
            scored = [entry.logprob for entry in answer.prompt_logprobs[1:]]
            np.testing.assert_allclose(scored, case.prompt_logprobs[i][-len(scored) :], atol=2e-3)


def test_all_adapters_in_one_batch_give_the_same_text(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    jobs = []
    for i in range(3):
        for case in engine.golden:
            job = engine._job(case.prompts[i], params, name_of(case))
            engine._submit(job, job.events.put)
            jobs.append((job, case, i))
    for job, case, i in jobs:
        assert list(job.collect().tokens) == list(case.greedy[i]), case.name
