"""What idle things are worth: less when older, more when dearer or likelier to be used again."""

import pytest

from jslora.memory.worth import Clock, Kind


def test_the_clock_never_falls() -> None:
    clock = Clock()
    for worth, now in ((2.0, 2.0), (1.0, 2.0), (3.0, 3.0)):
        clock.advance(worth)
        assert clock.now == now
    before = clock.now
    assert before < clock.tick() < clock.tick() < before + 1e-6


def test_the_first_measurement_replaces_the_guess_and_later_ones_move_it() -> None:
    kind = Kind(seconds=5.0)
    kind.took(1.0)
    assert kind.seconds == 1.0
    kind.took(2.0)
    assert 1.0 < kind.seconds < 2.0
    for _ in range(200):
        kind.took(2.0)
    assert kind.seconds == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_the_chance_of_reuse_follows_what_was_seen(share: float) -> None:
    kind = Kind(seconds=10.0)
    seen = 0.0
    for _ in range(5000):
        seen += share
        if seen >= 1:
            seen -= 1
            kind.reused()
        else:
            kind.evicted()
    assert kind.chance == pytest.approx(share, abs=0.02)
    assert kind.saved == pytest.approx(10 * kind.chance)
