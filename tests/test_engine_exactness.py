"""In float32 a request's tokens do not depend on its batch, its chunks, preemption or look-ahead.

The reference is each request alone; that the reference is right is the goldens' business and, for
drawn mixes of ranks, the NumPy oracle's.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
from engine_helpers import Ask, answers, assert_nothing_leaked, small_engine, tokens_of
from goldens.adapters import PARENTS, write_adapter
from goldens.cases import ADAPTERS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from short_answers import QUANTILE, expect_short_answers

from jslora.engine import Completion, Engine
from jslora.request import SamplingParams
from pallas_kernels.launch import Kernels

MODEL = ROOT / "llama3" / "model"
PRELOADED = {"roots": [str(ROOT / "llama3" / "adapters")], "preload": "all"}

GREEDY = SamplingParams(temperature=0, max_tokens=40)
SCORED = SamplingParams(temperature=0, max_tokens=40, logprobs=2, prompt_logprobs=1)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=100, min_p=0.01, seed=11, max_tokens=40)
PENALIZED = SamplingParams(
    temperature=1.1, seed=12, max_tokens=40, repetition_penalty=1.3, presence_penalty=0.4,
    frequency_penalty=0.3, logit_bias=((7, 1.5), (9, -4.0)), min_tokens=20, stop_token_ids=(3, 8),
)  # fmt: skip
LENGTHS = (1, 16, 30, 33, 64, 100, 17)


def _asks() -> list[Ask]:
    """Every adapter and the base, each greedy, scored, seeded and with penalties."""
    random = np.random.default_rng(5)
    pairs = itertools.product((GREEDY, SCORED, SEEDED, PENALIZED), (None, *ADAPTERS))
    return [
        Ask(random.integers(0, 256, LENGTHS[i % len(LENGTHS)]).tolist(), params, adapter)
        for i, (params, adapter) in enumerate(pairs)
    ]


ASKS = _asks()


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exactness")


@pytest.fixture(scope="module")
def engine(tmp: Path) -> Iterator[Engine]:
    with small_engine(tmp, MODEL, adapters=PRELOADED) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Completion]:
    """Each request by itself, and greedy steps checked to be no near-ties."""
    found = [answers(engine, [ask])[0] for ask in ASKS]
    for ask, answer in zip(ASKS, found, strict=True):
        if ask.params is SCORED:
            assert min(e.top[0][1] - e.top[1][1] for e in answer.logprobs) > 1e-4
    return found


def _assert_same(found: list[Completion], alone: list[Completion]) -> None:
    for ask, one, other in zip(ASKS, found, alone, strict=True):
        assert one.tokens == other.tokens, (ask.adapter, ask.params)
        assert one.finish_reason == other.finish_reason
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(_logprobs(one), _logprobs(other), atol=1e-4)


def _logprobs(answer: Completion) -> list[float]:
    scored = [*(answer.prompt_logprobs or ()), *answer.logprobs]
    return [entry.logprob for entry in scored if entry is not None]


def test_the_requests_differ_from_each_other(alone: list[Completion]) -> None:
    assert len({answer.tokens for answer in alone}) == len(ASKS)
    assert sum(answer.finish_reason == "stop" for answer in alone) >= 1


def test_batched_is_as_alone(engine: Engine, alone: list[Completion]) -> None:
    _assert_same(answers(engine, ASKS), alone)
    assert engine.stats().preemptions == 0


def test_without_lookahead_is_the_same(tmp: Path, alone: list[Completion]) -> None:
    with small_engine(tmp, MODEL, adapters=PRELOADED, scheduler={"lookahead": False}) as engine:
        _assert_same(answers(engine, ASKS), alone)
        assert_nothing_leaked(engine)


@pytest.mark.parametrize("pool", [{}, {"pages": 40}])
def test_the_kernels_for_gpus_are_the_same(
    tmp: Path, alone: list[Completion], pool: dict[str, int]
) -> None:
    """Interpreted inside the step, with and without preemption."""
    with small_engine(
        tmp, MODEL, adapters=PRELOADED, kernels="pallas", pool=pool, scheduler={"reserve": QUANTILE}
    ) as engine:
        engine.core.run_on_engine(lambda: expect_short_answers(engine.core.scheduler))
        assert engine.core.runner.catalog.kernels == Kernels("pallas", "pallas", "cpu")
        _assert_same(answers(engine, ASKS), alone)
        assert_nothing_leaked(engine)


@pytest.fixture(scope="module")
def tight(tmp: Path) -> Iterator[Engine]:
    """Half the tokens a step, and far fewer pages than its eight rows want."""
    with small_engine(
        tmp, MODEL, adapters=PRELOADED, pool={"pages": 40},
        scheduler={"max_step_tokens": 16, "reserve": QUANTILE},
    ) as engine:  # fmt: skip
        engine.core.run_on_engine(lambda: expect_short_answers(engine.core.scheduler))
        yield engine


def test_other_chunks_are_the_same(tight: Engine, alone: list[Completion]) -> None:
    before = tight.stats().preemptions
    _assert_same([answers(tight, [ask])[0] for ask in ASKS], alone)
    assert tight.stats().preemptions == before


def test_preempted_is_as_alone(tight: Engine, alone: list[Completion]) -> None:
    before = tight.stats()
    _assert_same(answers(tight, ASKS), alone)
    after = tight.stats()
    assert after.preemptions > before.preemptions
    assert after.adapter_evictions > before.adapter_evictions
    # What is computed again is not counted again.
    assert after.prompt_tokens - before.prompt_tokens == sum(len(ask.prompt) for ask in ASKS)
    generated = sum(len(answer.tokens) for answer in alone)
    assert after.generated_tokens - before.generated_tokens == generated
    assert_nothing_leaked(tight)


def test_the_greedy_and_the_full_program_agree(engine: Engine) -> None:
    prompt = list(range(40, 60))
    full = SamplingParams(temperature=0, max_tokens=30, logprobs=0)
    plain = SamplingParams(temperature=0, max_tokens=30)
    pairs = [Ask(prompt, p, name) for name in (None, "r5") for p in (plain, full)]
    found = tokens_of(engine, pairs)
    assert found[0] == found[1] != found[2] == found[3]
    # Alone, the plain one runs the greedy program at every step.
    assert tokens_of(engine, pairs[:1]) == found[:1]


def test_a_seed_draws_the_same_whatever_its_slot_and_others_differ(engine: Engine) -> None:
    def ask(seed: int) -> Ask:
        return Ask([1, 2, 3], SamplingParams(temperature=1.0, seed=seed, max_tokens=30))

    found = tokens_of(engine, [ask(1), ask(-1), ask(1), ask(3), ask(2**64 - 1)])
    assert found[0] == found[2] and found[1] == found[4]
    assert len({*found}) == 3


# Drawn mixes of ranks ---------------------------------------------------------------------------

# Widths that share few factors, so that rows of A and B straddle pages in every way.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}


def _write_model(folder: Path) -> None:
    random = np.random.default_rng(17)
    H, F, V, KD = 48, 80, 96, 24

    def matrix(out: int, wide: int) -> np.ndarray:
        return (random.standard_normal((out, wide)) * 1.5 / np.sqrt(wide)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(V, H), "lm_head.weight": matrix(V, H)}
    tensors["model.norm.weight"] = np.ones(H, np.float32)
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + 0.1 * random.standard_normal(H).astype("f4")
        shapes = {
            "q_proj": (H, H), "k_proj": (KD, H), "v_proj": (KD, H), "o_proj": (H, H),
            "gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F),
        }  # fmt: skip
        for module, shape in shapes.items():
            tensors[f"{name}.{PARENTS[module]}.{module}.weight"] = matrix(*shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def odd(tmp: Path) -> Iterator[Engine]:
    """An engine of a random model; its adapters' pages are scarce enough to be scattered."""
    _write_model(tmp / "odd")
    with small_engine(tmp, tmp / "odd", pool={"pages": 192, "page_size": 8}) as engine:
        yield engine


adapters = st.lists(
    st.tuples(
        st.integers(1, 64),
        st.sets(st.sampled_from(sorted(PARENTS)), min_size=1),
        st.integers(0, 2**31),
    ),
    min_size=1,
    max_size=5,
)
rows = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=10
)
_folders = itertools.count()


@given(adapters, rows)
@settings(max_examples=15, deadline=None)
def test_any_mix_of_ranks_equals_the_oracle(
    odd: Engine, tmp: Path, adapters: list[tuple[int, set[str], int]], rows: list[tuple]
) -> None:
    names = []
    for rank, targets, seed in adapters:
        names.append(f"drawn-{next(_folders)}")
        write_adapter(tmp / names[-1], CONFIG, sorted(targets), rank, seed, 0.5, "float32")
        odd.load_adapter(names[-1])
    try:
        _compare_with_oracle(odd, tmp, names, rows)
    finally:
        for name in names:
            odd.unload_adapter(name)
    assert_nothing_leaked(odd)


def _compare_with_oracle(odd: Engine, tmp: Path, names: list[str], rows: list[tuple]) -> None:
    random = np.random.default_rng(len(rows))
    asks = [
        Ask(
            random.integers(0, 96, length).tolist(),
            SamplingParams(temperature=0, max_tokens=steps, logprobs=20, prompt_logprobs=0),
            [None, *names][which % (len(names) + 1)],
        )
        for which, length, steps in rows
    ]
    weights = oracle.load_tensors(tmp / "odd" / "model.safetensors")
    for ask, answer in zip(asks, answers(odd, asks), strict=True):
        adapter = oracle.load_adapter(tmp / ask.adapter) if ask.adapter else None
        everything = [*ask.prompt, *answer.tokens]
        logits = oracle.forward(weights, CONFIG, everything[:-1], adapter)
        expected = oracle.log_softmax(logits)
        assert answer.prompt_logprobs is not None
        for at, entry in enumerate([*answer.prompt_logprobs[1:], *answer.logprobs]):
            assert abs(entry.logprob - expected[at, everything[at + 1]]) <= 2e-3
        for entry, row in zip(answer.logprobs, expected[len(ask.prompt) - 1 :], strict=True):
            assert row[entry.token] >= row.max() - 1e-4
            for token, logprob in entry.top:
                assert abs(logprob - row[token]) <= 2e-3
