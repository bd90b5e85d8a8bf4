"""Arrays and steps come out as they went in, whatever was sent before, and small where little
changed; what no encoder would send is refused."""

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as some

from jslora.calls import AdmitCall, StepCall
from jslora.distributed import messages
from jslora.distributed.deltas import Decoder, Delta, Encoder

TYPES = st.sampled_from([np.dtype(name) for name in ("<i4", "<u4", "<f4", "|b1", "|u1")])
SHAPES = some.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
ARRAYS = TYPES.flatmap(lambda dtype: some.arrays(dtype, SHAPES))
NAMES = st.sampled_from("ab")


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal in shape, type and every bit: NaN is NaN, and 0 is not -0."""
    described = (one.shape, one.dtype.str) == (other.shape, other.dtype.str)
    return described and one.tobytes() == other.tobytes()


@given(st.lists(st.tuples(NAMES, ARRAYS), max_size=8), st.data())
def test_arrays_come_out_as_they_went_in(sent: list[tuple[str, np.ndarray]], data) -> None:
    encoder, decoder = Encoder(), Decoder()
    for name, array in sent:
        for _ in range(2):
            delta = msgspec.msgpack.decode(
                msgspec.msgpack.encode(encoder.encode(name, array)), type=Delta
            )
            assert same(decoder.decode(delta), array)
            if array.size:  # the next is like it but for one number, which may be NaN
                array = array.copy()
                index = data.draw(st.integers(0, array.size - 1))
                array.reshape(-1)[index] = data.draw(some.from_dtype(array.dtype))


def test_a_few_changed_numbers_are_a_few_bytes() -> None:
    encoder, first = Encoder(), np.arange(10_000, dtype=np.int32)
    encoder.encode("packed", first)
    second = first.copy()
    second[[5, 77]] = -1
    delta = encoder.encode("packed", second)
    assert delta.where is not None and len(delta.where) + len(delta.numbers) == 16
    all_other = encoder.encode("packed", second + 1)
    assert all_other.where is None and len(all_other.numbers) == second.nbytes


def test_zero_and_minus_zero_are_different_numbers() -> None:
    encoder, decoder = Encoder(), Decoder()
    for array in (np.zeros(100, np.float32), np.copysign(np.zeros(100, np.float32), -1)):
        assert same(decoder.decode(encoder.encode("floats", array)), array)


WORDS = np.zeros(4, np.uint32).tobytes()


@pytest.mark.parametrize(
    "delta",
    [
        Delta("a", (4,), "<i4", WORDS, WORDS),  # changes of nothing
        Delta("b", (4,), "<i4", np.array([4], "<u4").tobytes(), WORDS[:4]),  # beyond the end
        Delta("b", (4,), "<i4", WORDS[:8], WORDS[:4]),
        Delta("b", (5,), "<i4", None, WORDS),
        Delta("b", (-1, -4), "<i4", None, WORDS[:12]),
        Delta("b", (2**40,), "<i4", None, WORDS),
        Delta("b", (4,), "|O8", None, WORDS),
        Delta("b", (1,), "<i4", None, b"123"),
    ],
)
def test_what_no_encoder_sends_is_refused(delta: Delta) -> None:
    decoder = Decoder()
    known = np.arange(4, dtype=np.int32)
    decoder.decode(Encoder().encode("b", known))
    with pytest.raises(ValueError):
        decoder.decode(delta)


def ints(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return some.arrays(np.dtype("<i4"), shape)


def floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return some.arrays(np.dtype("<f4"), shape)


ADMITTED = st.builds(
    AdmitCall, slot=ints(), tokens=ints(16), prompt=ints(), total=ints(), bias_ids=ints(3),
    bias_values=floats(3), stop_ids=ints(2),
)  # fmt: skip
CALLS = st.builds(
    StepCall, bucket=st.integers(0, 9), packed=ints(40),
    work=st.none() | st.tuples(ints(2, 3), floats(2, 3), ints()),
    sampler=st.sampled_from(["greedy", "draw"]), ints=ints(8), floats=floats(6, 2),
    admitted=st.lists(ADMITTED, max_size=2).map(tuple),
    scores=st.lists(st.tuples(ints(4), ints(4)), max_size=2).map(tuple),
)  # fmt: skip


def leaves(call: StepCall) -> list[np.ndarray]:
    flat = [call.packed, call.ints, call.floats, *(call.work or ())]
    return [
        *flat,
        *(a for admit in call.admitted for a in admit),
        *(a for s in call.scores for a in s),
    ]


@given(st.lists(CALLS, max_size=4))
def test_steps_come_out_as_they_went_in(calls: list[StepCall]) -> None:
    encoder, decoder = Encoder(), Decoder()
    for call in calls:
        order = messages.decode_order(messages.encode_step(call, encoder))
        assert isinstance(order, messages.Step)
        found = messages.decode_step(order, decoder)
        assert (found.bucket, found.sampler) == (call.bucket, call.sampler)
        assert (found.work is None) == (call.work is None)
        counts = [(len(c.work or ()), len(c.admitted), len(c.scores)) for c in (found, call)]
        assert counts[0] == counts[1]
        assert all(same(*pair) for pair in zip(leaves(found), leaves(call), strict=True))


@given(st.tuples(*[st.integers(-3, 3)] * 3))
def test_a_step_with_other_parts_than_it_says_is_refused(parts: tuple[int, int, int]) -> None:
    encoder, zero = Encoder(), np.zeros(2, np.int32)
    arrays = [encoder.encode(name, zero) for name in ("packed", "ints", "floats")]
    order = messages.Step(0, "greedy", parts, arrays)
    if parts in ((-1, 0, 0), (0, 0, 0)):
        assert messages.decode_step(order, Decoder()).scores == ()
    else:
        with pytest.raises(ValueError, match="parts"):
            messages.decode_step(order, Decoder())


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    for decode in (messages.decode_order, messages.decode_answer):
        with pytest.raises(msgspec.DecodeError):
            decode(data)
