"""Sampling against definitions written out in float64 NumPy: what may be drawn, and how often."""

from collections.abc import Callable, Iterable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jslora.batch import SAMPLE_FLOATS, SAMPLERS
from jslora.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS
from jslora.sampling import Sampled, Slots, admit, new_slots
from jslora.step import sample, score

SLOTS, VOCAB, WIDE = 8, 300, 8
"""Slots, a vocabulary of more than one block of the inverse CDF, and the activations' width."""


def pack(count: int, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The sampling program's arrays; a row that is left out pads."""
    fields: dict[str, list] = {"seed": [], "slot": [], "position": [], "top_k": [], "hold_stop": [],
                               "stateful": []}  # fmt: skip
    neutral = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0,
               "frequency": 0.0}  # fmt: skip
    floats = np.array([[neutral[name]] * count for name in SAMPLE_FLOATS], np.float32)
    for b in range(count):
        row = rows[b] if b < len(rows) else {"slot": SLOTS}
        seed = row.get("seed", 0)
        fields["seed"] += [seed & 0xFFFFFFFF, seed >> 32]
        for name in ("slot", "position", "top_k", "hold_stop", "stateful"):
            fields[name].append(int(row.get(name, b if name == "slot" else 0)))
        for i, name in enumerate(SAMPLE_FLOATS):
            floats[i, b] = row.get(name, neutral[name])
    ints = np.concatenate([np.array(values, np.uint32) for values in fields.values()])
    return ints.view(np.int32), floats


@cache
def compiled(sampler: str) -> Callable[..., tuple[Slots, Sampled]]:
    return jax.jit(lambda *arguments: sample(sampler, *arguments))


def run(
    logits: np.ndarray, rows: list[dict], slots: Slots | None = None, sampler: str = "filter"
) -> tuple[Slots, Sampled]:
    """Sample rows whose logits are given: the activations pick rows of the head."""
    count, vocab = logits.shape
    ints, floats = pack(count, rows)
    slots = new_slots(SLOTS, vocab) if slots is None else slots
    h = np.eye(count, max(WIDE, count), dtype=np.float32)
    head = np.zeros((vocab, h.shape[1]), np.float32)
    head[:, :count] = logits.T
    slots, sampled = compiled(sampler)(h, head, slots, ints, floats)
    return slots, Sampled(np.asarray(sampled.ints), np.asarray(sampled.floats))


def give(
    slots: Slots, slot: int, prompt: Iterable[int] = (), generated: Iterable[int] = (),
    bias: Iterable[tuple[int, float]] = (), stops: Iterable[int] = (),
) -> Slots:  # fmt: skip
    """Give a slot to a sequence."""
    vocab = slots.counts.shape[1]
    known = [*prompt, *generated]
    tokens = np.zeros(64, np.int32)
    tokens[: len(known)] = known
    ids, values = np.full(MAX_LOGIT_BIAS, vocab, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
    for i, (token, value) in enumerate(bias):
        ids[i], values[i] = token, value
    held = np.full(2 * MAX_STOP_IDS, vocab, np.int32)
    held[: len([*stops])] = [*stops]
    return jax.jit(admit)(
        slots, np.int32(slot), tokens, np.int32(len([*prompt])), np.int32(len(known)), ids, values,
        held,
    )  # fmt: skip


def normal_logits(count: int = WIDE, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, vocab)).astype(np.float32) * 2


def probabilities(
    logits: np.ndarray, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> np.ndarray:
    """What each token of one row is drawn with; zero for those the filters leave out."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p, kind="stable")
    if 0 < top_k < len(p):
        p = np.where(p >= p[order[top_k - 1]], p, 0)
    if top_p < 1:
        mass = np.cumsum(p[order])
        last = np.searchsorted(mass, top_p * mass[-1])
        p = np.where(p >= p[order[min(last, len(p) - 1)]], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


# Greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_greedy_is_the_likeliest_and_is_remembered(sampler: str) -> None:
    logits = normal_logits()
    slots, sampled = run(logits, [{"slot": 7 - b} for b in range(8)], sampler=sampler)
    np.testing.assert_array_equal(sampled.ints[:, 0], logits.argmax(axis=1))
    assert sampled.ints[:, 1].all()
    np.testing.assert_array_equal(np.asarray(slots.last_token), logits.argmax(axis=1)[::-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_of_equals_is_taken(sampler: str) -> None:
    logits = np.zeros((8, VOCAB), np.float32)
    logits[:, [17, 250]] = 1
    _, sampled = run(logits, [{}] * 8, sampler=sampler)
    assert (sampled.ints[:, 0] == 17).all()


# Draws -------------------------------------------------------------------------------------------

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
]


def draws(logits: np.ndarray, row: dict, n: int, sampler: str = "filter") -> np.ndarray:
    """`n` draws from one row of logits, each with a seed or position of its own."""
    found = []
    batch = np.repeat(logits[None], 128, axis=0)
    for first in range(0, n, 128):
        rows = [row | {"slot": SLOTS, "seed": b, "position": first} for b in range(128)]
        found.append(run(batch, rows, sampler=sampler)[1].ints[:, 0])
    return np.concatenate(found)


@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_draws_follow_the_distribution(row: dict) -> None:
    """Pearson's chi-squared over tokens expected at least five times; nothing else is drawn."""
    logits = normal_logits(1, seed=3)[0]
    p = probabilities(logits, **row)
    n = 4096
    counts = np.bincount(draws(logits, row, n), minlength=VOCAB)
    assert not counts[p == 0].any()
    often = p * n >= 5
    expected, seen = np.append(p[often], p[~often].sum()) * n, np.append(
        counts[often], counts[~often].sum()
    )  # fmt: skip
    expected, seen = expected[expected > 0], seen[expected > 0]
    freedom = max(1, len(expected) - 1)
    # The normal approximation of chi-squared at five standard deviations.
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize("row", [SETTINGS[0], SETTINGS[1]], ids=str)
def test_programs_that_do_less_draw_the_same(row: dict) -> None:
    logits = normal_logits(1, seed=4)[0]
    np.testing.assert_array_equal(
        draws(logits, row, 512, "draw"), draws(logits, row, 512, "filter")
    )


def kept(logits: np.ndarray, row: dict) -> set[int]:
    """Tokens that are drawn at all, in many draws that all kept tokens have a fair chance in."""
    return {*draws(logits, row, 2048).tolist()}


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=12, unique=True),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.9, 0.55, 0.3, 0.05]),
    st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
)
def test_exactly_the_tokens_the_filters_keep_are_drawn(
    tokens: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    """A dozen likely tokens whose chances are never within a hair of a filter's edge."""
    logits = np.full(VOCAB, -60, np.float32)
    logits[tokens] = np.log(np.array([32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 11]))
    row = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    p = probabilities(logits, **row)
    assert kept(logits, row) == {int(token) for token in np.flatnonzero(p > 1e-9)}


def test_equals_at_a_filters_edge_are_all_kept() -> None:
    logits = np.full(VOCAB, -60, np.float32)
    logits[[3, 9, 200, 299]] = [2, 1, 1, 1]
    for row in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": np.exp(-1) * 0.999}):
        assert kept(logits, {"temperature": 1.0} | row) == {3, 9, 200, 299}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-44])
def test_almost_no_temperature_is_greedy(temperature: float) -> None:
    logits = normal_logits() * 10
    _, sampled = run(logits, [{"temperature": temperature, "seed": b} for b in range(8)])
    np.testing.assert_array_equal(sampled.ints[:, 0], logits.argmax(axis=1))


def test_a_draw_depends_on_seed_position_and_logits_alone() -> None:
    """Not on the row, the slot, the other rows, nor the size of the batch."""
    logits = normal_logits(1, seed=5)[0]
    row = {"temperature": 1.0, "top_p": 0.95, "seed": 2**63 + 11}
    alone = [
        run(logits[None], [row | {"position": position}])[1].ints[0, 0] for position in range(16)
    ]
    assert len({*alone}) > 4
    others = normal_logits(16, seed=6)
    for shift in (0, 5):
        batch, rows = others.copy(), [{"temperature": 0.7, "seed": b} for b in range(16)]
        for position in range(8):
            b = (position + shift) % 16
            batch[b], rows[b] = logits, row | {"position": position, "slot": (b * 3) % 8}
        found = run(batch, rows)[1].ints[:, 0]
        assert [found[(p + shift) % 16] for p in range(8)] == alone[:8]


def test_seeds_and_positions_draw_differently() -> None:
    logits = np.zeros((8, VOCAB), np.float32)
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 5]
    by_seed = run(logits, [{"temperature": 1.0, "seed": seed} for seed in seeds])[1].ints[:, 0]
    by_position = run(logits, [{"temperature": 1.0, "position": b} for b in range(8)])[1].ints[:, 0]
    assert len({*by_seed}) == 8 and len({*by_position}) == 8


def test_rounding_in_long_sums_draws_nothing_impossible() -> None:
    """At these positions the target falls into a gap that rounding leaves where nothing is."""
    vocab = 128256
    random = np.random.default_rng(7)
    logits = np.full((8, vocab), -1e4, np.float32)
    for b in range(8):
        blocks = [k for k in range(vocab // 256) if random.random() < 0.3]
        ids = np.concatenate([np.arange(k * 256, k * 256 + 4) for k in blocks])
        logits[b, ids] = random.normal(size=len(ids))
    rows = [{"temperature": 1.0} for _ in range(8)]
    rows[3] |= {"seed": 19, "position": 93469}
    for position, seed in ((54683, 6), (38877, 35)):
        rows[7] |= {"seed": seed, "position": position}
        token = run(logits, rows, sampler="draw")[1].ints[:, 0]
        assert (logits[np.arange(8), token] > -1e4).all()


# Penalties, bias, minimum length -----------------------------------------------------------------


def penalized(
    logits: np.ndarray, prompt: list[int], generated: list[int], repetition: float,
    presence: float, frequency: float,
) -> np.ndarray:  # fmt: skip
    """Repetition as Hugging Face has it, over prompt and answer; the others as OpenAI, over the
    answer."""
    result = logits.astype(np.float64)
    for token in {*prompt, *generated}:
        value = result[token]
        result[token] = value / repetition if value > 0 else value * repetition
    for token in generated:
        result[token] -= frequency
    for token in {*generated}:
        result[token] -= presence
    return result


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=10),
    st.lists(st.integers(0, 20), max_size=20),
    st.sampled_from([0.5, 1.0, 1.3, 5.0]),
    st.sampled_from([-1.0, 0.0, 0.7]),
    st.sampled_from([-0.5, 0.0, 0.3]),
    st.integers(0, 1000),
)
def test_penalties_are_as_defined(
    prompt: list[int], generated: list[int], repetition: float, presence: float, frequency: float,
    seed: int,
) -> None:  # fmt: skip
    logits = normal_logits(1, seed=seed)
    logits[0, 21:] -= 5
    slots = give(new_slots(SLOTS, VOCAB), 4, prompt, generated)
    row = {"slot": 4, "stateful": 1, "repetition": repetition, "presence": presence,
           "frequency": frequency}  # fmt: skip
    _, sampled = run(logits, [row], slots, "draw")
    wanted = penalized(logits[0], prompt, generated, repetition, presence, frequency)
    assert wanted[sampled.ints[0, 0]] > wanted.max() - 1e-5


def test_counts_grow_with_every_token_drawn() -> None:
    """A presence penalty larger than any gap: no token comes twice, and the count is the slot's."""
    logits = normal_logits(2, seed=8)
    slots = give(new_slots(SLOTS, VOCAB), 2, prompt=[int(logits[0].argmax())])
    rows = [{"slot": 2, "stateful": 1, "presence": 100.0}, {"slot": 5}]
    order = np.argsort(-logits[0], kind="stable")
    for step in range(5):
        slots, sampled = run(logits, rows, slots, "draw")
        assert sampled.ints[0, 0] == order[step]
        assert sampled.ints[1, 0] == logits[1].argmax()


def test_a_sequence_that_comes_back_has_its_counts_again() -> None:
    logits = normal_logits(1, seed=9)
    row = {"slot": 3, "stateful": 1, "frequency": 0.4, "repetition": 1.1}
    slots = give(new_slots(SLOTS, VOCAB), 3, prompt=[5, 6])
    tokens = []
    for _ in range(12):
        slots, sampled = run(logits, [row], slots, "draw")
        tokens.append(int(sampled.ints[0, 0]))
    assert len({*tokens}) < len(tokens)
    for step in (1, 7):
        again = give(slots, 0, prompt=[5, 6], generated=tokens[:step])
        _, sampled = run(logits, [row | {"slot": 0}], again, "draw")
        assert sampled.ints[0, 0] == tokens[step]


def test_what_a_slot_held_before_does_not_count() -> None:
    logits = normal_logits(1, seed=10)
    best = int(logits[0].argmax())
    before = give(
        new_slots(SLOTS, VOCAB), 1, [best], [best] * 9, bias=[(best, -50.0)], stops=[best]
    )
    row = {"slot": 1, "stateful": 1, "frequency": 1.0, "repetition": 2.0, "hold_stop": 1}
    _, sampled = run(logits, [row], before, "draw")
    assert sampled.ints[0, 0] != best
    _, sampled = run(logits, [row], give(before, 1, [], []), "draw")
    assert sampled.ints[0, 0] == best
    _, sampled = run(logits, [row | {"stateful": 0, "hold_stop": 0}], before, "draw")
    assert sampled.ints[0, 0] == best, "the slot is not looked at"


def test_logit_bias_is_added() -> None:
    logits = normal_logits(2, seed=11)
    order = np.argsort(-logits[0])
    bias = [(int(order[0]), -100.0), (int(order[5]), 100.0), (VOCAB - 1, 1.0)]
    slots = give(new_slots(SLOTS, VOCAB), 0, bias=bias)
    _, sampled = run(logits, [{"slot": 0, "stateful": 1}, {"slot": 1}], slots, "draw")
    assert sampled.ints[:2, 0].tolist() == [order[5], logits[1].argmax()]
    slots = give(new_slots(SLOTS, VOCAB), 0, bias=[(i, -100.0) for i in range(VOCAB - 1)])
    assert run(logits, [{"slot": 0, "stateful": 1}], slots, "draw")[1].ints[0, 0] == VOCAB - 1


def test_stops_are_held_until_the_minimum_is_reached() -> None:
    logits = normal_logits(1, seed=12)
    order = np.argsort(-logits[0])
    slots = give(new_slots(SLOTS, VOCAB), 6, stops=order[:32])
    row = {"slot": 6, "stateful": 1}
    for settings_ in ({}, {"temperature": 1e-3, "seed": 1}, {"temperature": 1.0, "top_k": 1}):
        held = run(logits, [row | settings_ | {"hold_stop": 1}], slots)[1]
        assert held.ints[0, 0] == order[32]
        assert run(logits, [row | settings_], slots)[1].ints[0, 0] == order[0]


# Logprobs ----------------------------------------------------------------------------------------


def check_logprobs(ints: np.ndarray, floats: np.ndarray, logits: np.ndarray, token: int) -> None:
    """`ints` is [token, rank, likeliest …], `floats` their logprobs."""
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    assert ints[0] == token and ints[1] == 1 + (logits > logits[token]).sum()
    likeliest = np.argsort(-logits, kind="stable")[:MAX_LOGPROBS]
    n = len(likeliest)
    assert ints[2 : 2 + n].tolist() == likeliest.tolist()
    np.testing.assert_allclose(floats[0], exact[token], atol=1e-5)
    np.testing.assert_allclose(floats[1 : 1 + n], exact[likeliest], atol=1e-5)
    assert (floats[1 + n :] == -np.inf).all(), "there are no more tokens"


@pytest.mark.parametrize("vocab", [VOCAB, 7])
def test_logprobs_are_of_the_models_own_distribution(vocab: int) -> None:
    """Whatever temperature, penalties and bias do."""
    logits = normal_logits(vocab=vocab, seed=13)
    slots = give(new_slots(SLOTS, vocab), 0, [1], [2], bias=[(3, 50.0)])
    rows = [{"temperature": 3.0, "seed": b, "presence": 1.0, "stateful": b == 0} for b in range(8)]
    _, sampled = run(logits, rows, slots, "draw")
    for b in range(8):
        token = int(sampled.ints[b, 0])
        ints = np.delete(sampled.ints[b], 1)
        check_logprobs(ints, sampled.floats[b], logits[b], token)
    assert sampled.ints[0, 0] == 3


def test_scores_are_the_logprobs_of_given_tokens() -> None:
    logits = normal_logits(seed=14)
    index, target = np.array([3, 3, 0, 7], np.int32), np.array([0, 299, 5, 17], np.int32)
    sampled = score(jnp.eye(8), jnp.asarray(logits.T), index, target)
    for i, (b, token) in enumerate(zip(index, target, strict=True)):
        check_logprobs(np.asarray(sampled.ints[i]), np.asarray(sampled.floats[i]), logits[b], token)


# What is not finite, and padding -----------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_logits_that_are_not_finite_are_flagged_alone(sampler: str, value: float) -> None:
    logits = normal_logits()
    rows = [{"temperature": 0.0 if sampler == "greedy" else 1.0, "seed": 5}] * 8
    rows = [row | {"slot": b} for b, row in enumerate(rows)]
    _, clean = run(logits, rows, sampler=sampler)
    assert clean.ints[:, 1].all()
    # The head's product would spread a bad logit, so each comes from a bad activation.
    ints, floats = pack(8, rows)
    h = np.eye(8, dtype=np.float32)
    h[2, 7], h[5] = value, value
    slots, sampled = compiled(sampler)(h, logits.T.copy(), new_slots(SLOTS, VOCAB), ints, floats)
    assert np.asarray(sampled.ints)[:, 1].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    good = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(np.asarray(sampled.ints)[good], clean.ints[good])
    np.testing.assert_array_equal(np.asarray(slots.last_token)[good], clean.ints[good, 0])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_logit_that_is_not_finite_is_enough(sampler: str, value: float) -> None:
    """Weights of one token alone: every row meets them, where its activation is not zero."""
    h = np.ones((1, WIDE), np.float32)
    head = np.random.default_rng(0).normal(size=(VOCAB, WIDE)).astype(np.float32)
    head[123, 3] = value
    ints, floats = pack(1, [{"temperature": 0.5}])
    _, sampled = compiled(sampler)(h, head, new_slots(SLOTS, VOCAB), ints, floats)
    assert np.asarray(sampled.ints)[0, 1] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_padding_rows_change_no_slot(sampler: str) -> None:
    slots = give(new_slots(SLOTS, VOCAB), 7, [1, 2], [3], [(4, 1.0)], [5])
    slots = slots._replace(last_token=jnp.arange(100, 100 + SLOTS, dtype=jnp.int32))
    after, _ = run(normal_logits(), [{"slot": 3}], slots, sampler)
    for name, before in slots._asdict().items():
        rows = np.array([slot for slot in range(SLOTS) if slot != 3])
        np.testing.assert_array_equal(
            np.asarray(getattr(after, name))[rows], np.asarray(before)[rows], name
        )
