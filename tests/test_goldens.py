"""The engine against transformers and peft, for every architecture, alone and all in one batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_helpers import GOLDEN, assert_golden, small_engine
from goldens.cases import MODELS, ROOT, Case, cases

from jslora.engine import Engine
from jslora.request import SamplingParams


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
        answers = engine.generate(case.prompts, GOLDEN, name_of(case))
        for i, answer in enumerate(answers):
            assert_golden(answer, case, i)


def test_all_adapters_in_one_batch_give_the_same_text(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    jobs = []
    for i in range(3):
        for case in engine.golden:
            job = engine._job(case.prompts[i], params, engine._resolve(name_of(case)))
            engine._submit(job, job.events.put)
            jobs.append((job, case, i))
    for job, case, i in jobs:
        assert list(job.collect().tokens) == list(case.greedy[i]), case.name
