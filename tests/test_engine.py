"""The engine from its public side: memory and compilation, refusals, sampling, callers."""

import asyncio
import itertools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from engine_helpers import (
    CONFIG,
    EVERYTHING,
    LLAMA3,
    PROMPT,
    Ask,
    answers,
    assert_nothing_leaked,
    greedy,
    small_engine,
    tokens_of,
    wait_until,
    write_tokenizer,
)
from goldens.adapters import write_adapter
from goldens.cases import ADAPTERS
from safetensors.numpy import load_file

from jslora.batch import Bucket
from jslora.device import Device
from jslora.engine import Completion, Engine
from jslora.errors import (
    AdapterRejected,
    InvalidRequest,
    UnknownModel,
)
from jslora.request import MAX_LOGPROBS, SamplingParams, TokenLogprob
from pallas_kernels.launch import Kernels

pytest_plugins = ["engine_fixtures"]


# Compiled once, memory in place -----------------------------------------------------------------


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what XLA compiles, or takes from its cache, meanwhile."""
    found: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_after_start(engine: Engine, tight: Engine, tmp: Path) -> None:
    with compilations() as control:
        jax.jit(lambda x: x * 3 - 1)(jnp.ones(3)).block_until_ready()
    assert control
    everything = SamplingParams(
        temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2, seed=3,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((3, 1.0),), min_tokens=2,
        stop_token_ids=(1, 2), logprobs=MAX_LOGPROBS, prompt_logprobs=3, max_tokens=20,
    )  # fmt: skip
    params = [greedy(), everything, greedy(20, logprobs=0), SamplingParams(max_tokens=1)]
    params += [SamplingParams(max_tokens=0, prompt_logprobs=2)]
    with compilations() as found:
        for length in (1, 7, 16, 31, 32, 33, 90, 240):
            asks = [
                Ask(list(range(length)), p, name)
                for p, name in itertools.product(params, (None, *ADAPTERS))
                if length + p.max_tokens <= 256
            ]
            answers(engine, asks if length < 34 else asks[::3])
        for name in ("wide-0", "wide-1", "wide-2", "wide-3"):
            tight.load_adapter(name)
            answers(tight, [Ask(PROMPT, greedy(), name), Ask([1] * 40, everything)])
        tight.load_adapter("wide-0", "r5", replace=True)
        tight.unload_adapter("wide-1")
        answers(tight, [Ask([9] * 30, greedy(60), "wide-0") for _ in range(8)])
    assert found == []
    assert tight.stats().preemptions > 0 and tight.stats().adapter_evictions > 0


def test_a_step_that_cannot_run_is_found_before_serving(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where kernels are loaded when they first run."""

    def fail(self: Device, bucket: Bucket, *_: Any) -> Any:
        raise RuntimeError(f"no kernel image for {bucket.tokens} tokens")

    monkeypatch.setattr(Device, "_run", fail)
    with pytest.raises(RuntimeError, match="no kernel image for 8 tokens"):
        small_engine(tmp, LLAMA3 / "model")


@pytest.mark.parametrize("whole_step", [False, True])
def test_the_pool_is_aliased_by_every_program_that_takes_it(
    tmp: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, whole_step: bool
) -> None:
    """With one program a layer, as on a CPU, and with one a step, as on a GPU.

    Adapters come to this one in many chunks.
    """
    monkeypatch.setattr(Kernels, "one_program", property(lambda self: whole_step))
    monkeypatch.setattr("jslora.programs.UPLOAD_BYTES", 3 * 2048 * 4)
    with small_engine(
        tmp, LLAMA3 / "model", pool={"pages": 4096}, adapters={"preload": "all"},
        scheduler={"max_step_tokens": 16},
    ) as big:  # fmt: skip
        runner = big.core.runner
        assert runner.upload_rows == 3
        pool, takers = runner.devices.pages, set()
        for key, job in runner.catalog.jobs().items():
            name, arguments = job.name, job.arguments
            memory = runner.devices._executables[key].memory_analysis()
            given = jax.tree.leaves([arguments[i] for i in job.donated])
            assert memory.alias_size_in_bytes >= sum(
                leaf.size * leaf.dtype.itemsize for leaf in given
            )
            if any(leaf.shape == pool.shape for leaf in jax.tree.leaves(arguments)):
                takers.add(name.split()[0])
                assert any(leaf.shape == pool.shape for leaf in given), name
                assert memory.temp_size_in_bytes < pool.nbytes / 16, name
                assert memory.output_size_in_bytes < pool.nbytes * 17 / 16, name
        assert takers == {"step" if whole_step else "layer", "write"}
        asks = [Ask([3, i] * 9, greedy(20), name) for i, name in enumerate((None, *ADAPTERS))]
        assert tokens_of(big, asks) == tokens_of(engine, asks)


# Requests that are refused ----------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_both_numbers(tight: Engine, tmp: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"250 prompt tokens and max_tokens 7 make 257.* 256"):
        tight.generate([[1] * 250], greedy(7))
    write_adapter(tmp / "fat", CONFIG, EVERYTHING, 32, 0, 0.3, "float32")
    tight.load_adapter("fat")
    with pytest.raises(InvalidRequest, match=r"need 16 pages beside .* 18; the pool has 31"):
        tight.generate([[1] * 200], greedy(56), "fat")
    assert len(tight.generate([[1] * 200], greedy(8), "fat")[0].tokens) == 8
    shutil.rmtree(tmp / "fat")


def test_an_unknown_adapter_is_never_the_base(engine: Engine) -> None:
    with pytest.raises(UnknownModel, match="sql"):
        engine.generate([PROMPT], greedy(), "sql")
    base = engine.generate([PROMPT], greedy(), "base")
    assert base == engine.generate([PROMPT], greedy())


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((256, 1.0),)}, "logit_bias"),
        ({"logit_bias": tuple((i % 256, 1.0) for i in range(301))}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple(range(17))}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ("x",)}, "stop"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    engine: Engine, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.generate([PROMPT], SamplingParams(**settings))
    assert refused.value.param == param


@pytest.mark.parametrize("prompt", [[], [256], [-1], ["1"], [1.5], [None], "text"])
def test_prompts_that_are_no_tokens_are_refused(engine: Engine, prompt: Any) -> None:
    before = engine.stats()
    with pytest.raises(InvalidRequest) as refused:
        engine.generate([prompt], greedy())
    assert refused.value.param == "prompt"
    assert engine.stats().recoveries == before.recoveries


def test_numpy_prompts_are_prompts(engine: Engine) -> None:
    expected = engine.generate(PROMPT, greedy())
    assert engine.generate(np.array(PROMPT), greedy())[0].tokens == expected[0].tokens
    assert engine.generate([], greedy()) == []


# Sampling ---------------------------------------------------------------------------------------

END = 176
"""The sixth greedy token after the golden prompt."""


@pytest.fixture(scope="module")
def text(tmp: Path) -> Iterator[Engine]:
    """The golden model with an end token and a tokenizer of bytes."""
    folder = tmp / "text"
    shutil.copytree(LLAMA3 / "model", folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": END}))
    write_tokenizer(folder)
    with small_engine(tmp, folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def golden() -> tuple[list[int], list[int]]:
    """(prompt, the model's 16 greedy tokens): + ~ / B Q, the end token, and others."""
    tensors = load_file(LLAMA3 / "golden.safetensors")
    prompt, tokens = tensors["prompt.0"].tolist(), tensors["base/greedy"][0].tolist()
    assert tokens[:6] == [*b"+~/BQ", END]
    return prompt, tokens


def one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Completion:
    return engine.generate(list(prompt), params)[0]


def test_the_end_token_ends_and_is_left_out(text: Engine, golden: tuple) -> None:
    prompt, tokens = golden
    found = one(text, prompt, greedy(16))
    assert (found.text, found.tokens) == ("+~/BQ", tuple(tokens[:5]))
    assert (found.finish_reason, found.stop_reason) == ("stop", None)
    ignored = one(text, prompt, greedy(16, ignore_eos=True))
    assert (ignored.tokens, ignored.finish_reason) == (tuple(tokens), "length")


def test_the_end_token_is_no_stop_reason_without_a_tokenizer_either(
    text: Engine, golden: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "tokenizer", None)
    prompt, tokens = golden
    found = one(text, prompt, greedy(16))
    assert (found.text, found.tokens, found.finish_reason) == ("", tuple(tokens[:5]), "stop")
    assert found.stop_reason is None
    assert one(text, prompt, greedy(16, stop_token_ids=(47,))).stop_reason == 47


def test_stop_token_ids(text: Engine, golden: tuple) -> None:
    prompt, tokens = golden
    found = one(text, prompt, greedy(16, stop_token_ids=(5, 66)))
    assert (found.text, found.tokens) == ("+~/", tuple(tokens[:3]))
    assert (found.finish_reason, found.stop_reason) == ("stop", 66)


def test_stop_strings(text: Engine, golden: tuple) -> None:
    prompt, tokens = golden
    params = greedy(16, stop=("never", "/BQ"), ignore_eos=True, logprobs=0)
    found = one(text, prompt, params)
    assert (found.text, found.tokens, len(found.logprobs)) == ("+~", tuple(tokens[:5]), 5)
    assert (found.finish_reason, found.stop_reason) == ("stop", "/BQ")
    chunks = list(text.stream(list(prompt), params))
    assert "".join(chunk.text for chunk in chunks) == "+~"
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert_nothing_leaked(text)


def test_min_tokens_hold_the_end_back(text: Engine, golden: tuple) -> None:
    prompt, tokens = golden
    found = one(text, prompt, greedy(16, min_tokens=8, stop_token_ids=(66,)))
    assert len(found.tokens) >= 8
    assert not {END, 66} & {*found.tokens[:8]}
    assert list(found.tokens[:3]) == tokens[:3] and found.tokens[3] != tokens[3]


def test_one_token_and_none(text: Engine, golden: tuple) -> None:
    prompt, tokens = golden
    assert one(text, prompt, greedy(1)).tokens == (tokens[0],)
    none = one(text, prompt, greedy(0))
    assert (none.tokens, none.finish_reason, none.prompt_logprobs) == ((), "length", None)


def _logits(tokens: Sequence[int], adapter: str | None = None) -> np.ndarray:
    """The oracle's logits after each token."""
    weights = oracle.load_tensors(LLAMA3 / "model" / "model.safetensors")
    factors = oracle.load_adapter(LLAMA3 / "adapters" / adapter) if adapter else None
    return oracle.forward(weights, CONFIG, tokens, factors)


def _assert_entry(entry: TokenLogprob, row: np.ndarray, token: int, count: int) -> None:
    assert entry.token == token
    assert abs(entry.logprob - row[token]) < 1e-4
    assert entry.rank == 1 + int((row > row[token]).sum())
    likeliest = np.argsort(-row)[:count]
    assert [t for t, _ in entry.top] == likeliest.tolist()
    np.testing.assert_allclose([value for _, value in entry.top], row[likeliest], atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "r8-rslora"])
def test_logprobs_of_prompt_and_answer_are_the_models_own(
    engine: Engine, adapter: str | None
) -> None:
    prompt = [(7 * i) % 256 for i in range(70)]
    params = SamplingParams(temperature=1.5, seed=4, max_tokens=8, logprobs=4, prompt_logprobs=2)
    found = engine.generate(prompt, params, adapter)[0]
    rows = oracle.log_softmax(_logits([*prompt, *found.tokens], adapter))
    assert found.prompt_logprobs is not None and found.prompt_logprobs[0] is None
    for i, entry in enumerate(found.prompt_logprobs[1:]):
        _assert_entry(entry, rows[i], prompt[i + 1], 2)
    for i, entry in enumerate(found.logprobs):
        _assert_entry(entry, rows[len(prompt) - 1 + i], found.tokens[i], 4)


def test_scoring_a_prompt_generates_nothing(engine: Engine) -> None:
    prompt = [(11 * i) % 256 for i in range(45)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    found = engine.generate([prompt, prompt[:1]], params, "r5")
    rows = oracle.log_softmax(_logits(prompt, "r5"))
    assert found[0].tokens == () and found[0].finish_reason == "length"
    for i, entry in enumerate(found[0].prompt_logprobs[1:]):
        _assert_entry(entry, rows[i], prompt[i + 1], 1)
    assert found[1].prompt_logprobs == (None,)


def test_seeds_make_choices(engine: Engine) -> None:
    def draw(seed: int | None) -> tuple[int, ...]:
        return one(engine, PROMPT, SamplingParams(seed=seed, max_tokens=20)).tokens

    choices = [draw(seed) for seed in range(5)]
    assert len({*choices}) == 5
    assert choices == [draw(seed) for seed in range(5)]
    assert draw(None) != draw(None)


def test_penalties_and_bias_are_as_defined(engine: Engine) -> None:
    """Repetition as Hugging Face has it (prompt and answer), the others as OpenAI (answer)."""
    prompt = [(3 * i) % 40 for i in range(40)]
    params = greedy(
        40, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.5,
        logit_bias=((100, 2.0), (101, -100.0)),
    )  # fmt: skip
    tokens = one(engine, prompt, params).tokens
    logits = _logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    for i, row in enumerate(logits):
        seen = list({*prompt, *tokens[:i]})
        row[seen] = np.where(row[seen] > 0, row[seen] / 1.4, row[seen] * 1.4)
        counts = np.bincount(tokens[:i], minlength=256)
        row = row - 0.5 * counts - 0.7 * (counts > 0)
        row[[100, 101]] += [2.0, -100.0]
        assert row[tokens[i]] > row.max() - 1e-4
    assert tokens != one(engine, prompt, greedy(40)).tokens


# Callers ----------------------------------------------------------------------------------------


def test_texts_and_streams_say_the_same(text: Engine) -> None:
    params = greedy(20, ignore_eos=True, logprobs=1)
    whole = text.generate(["Hello", "Good morning"], params)
    for prompt, expected in zip(("Hello", "Good morning"), whole, strict=True):
        assert expected.prompt == tuple(prompt.encode())
        chunks = list(text.stream(prompt, params))
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert sum((chunk.tokens for chunk in chunks), ()) == expected.tokens
        assert chunks[-1].finish_reason == "length"


def test_the_async_twins_are_equal(text: Engine) -> None:
    params = greedy(20, logprobs=1, prompt_logprobs=0)
    prompts = ["Hello", list(b"Good morning")]

    async def both() -> tuple[list[Completion], list[str]]:
        generated = await text.generate_async(prompts, params)
        streamed = [
            "".join([chunk.text async for chunk in text.stream_async(prompt, params)])
            for prompt in prompts
        ]
        return generated, streamed

    generated, streamed = asyncio.run(both())
    assert generated == text.generate(prompts, params)
    assert streamed == [answer.text for answer in generated]


def test_async_errors_are_the_same_errors(engine: Engine) -> None:
    async def wrong() -> None:
        await engine.generate_async([PROMPT, PROMPT], greedy(), "sql")

    with pytest.raises(UnknownModel, match="sql"):
        asyncio.run(wrong())

    async def load() -> str:
        with pytest.raises(AdapterRejected):
            await engine.load_adapter_async("nowhere")
        return (await engine.load_adapter_async("again", "r1")).name

    assert asyncio.run(load()) == "again"
    engine.unload_adapter("again")


def test_one_bad_prompt_fails_the_call_and_stops_the_others(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="300"):
        engine.generate([PROMPT, [300], PROMPT], greedy(200))
    assert_nothing_leaked(engine)


def test_closing_a_stream_frees_its_pages(engine: Engine) -> None:
    stream = engine.stream([1] * 100, greedy(150))
    next(stream)
    assert engine.stats().pages_kv > 0
    stream.close()
    wait_until(lambda: engine.stats().pages_kv == 0)
    assert_nothing_leaked(engine)


def test_cancelling_aborts(engine: Engine) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(engine.generate_async([[1] * 100], greedy(150)))
        while engine.stats().running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert_nothing_leaked(engine)


def test_a_loop_that_is_gone_disturbs_nobody(engine: Engine) -> None:
    """Nobody closed the stream, and its event loop takes no more calls."""
    recoveries = engine.stats().recoveries
    expected = engine.generate(PROMPT, greedy())
    loop = asyncio.new_event_loop()
    stream = engine.stream_async(PROMPT, greedy(200))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert engine.generate(PROMPT, greedy()) == expected
    wait_until(lambda: engine.stats().running == 0)
    assert engine.stats().recoveries == recoveries
    with pytest.raises(StopIteration):
        stream.aclose().send(None)


def test_many_threads(engine: Engine) -> None:
    names = [None, *ADAPTERS]
    params = SamplingParams(seed=1, max_tokens=10)
    expected = {name: engine.generate([[4, 5], [6]], params, name) for name in names}
    wrong: list[object] = []

    def client(first: int) -> None:
        for i in range(5):
            name = names[(first + i) % len(names)]
            try:
                if engine.generate([[4, 5], [6]], params, name) != expected[name]:
                    wrong.append(name)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert_nothing_leaked(engine)
