"""News that are put together in bulk are what the constructor makes."""

from waiting_sequences import make_sequence

from jslora.request import TokenEvent
from jslora.schedule.events import token_events


def test_a_token_of_each() -> None:
    sequences = [make_sequence(order) for order in range(3)]
    events = token_events(sequences, [7, 8, 9])
    assert events == [
        TokenEvent(id=sequence.request.id, tokens=(token,))
        for sequence, token in zip(sequences, [7, 8, 9], strict=True)
    ]
    assert all(type(event) is TokenEvent and not event.last for event in events)
    assert token_events([], []) == []
