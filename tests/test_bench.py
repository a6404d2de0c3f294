"""Timing of interleaved calls."""

from collections.abc import Callable

import pytest

from deformkit._testing import timing


class Clock:
    """A clock that only the timed calls advance, so that the test is exact."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_calls_take_turns(clock: Clock) -> None:
    timings = timing.alternate({"a": clock.call("a", 0.1), "b": clock.call("b", 0.2)}, seconds=0.5)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 5, "b": 5}
    assert clock.log[4:] == ["a", "b"] * 5
    assert timings["a"].median == pytest.approx(0.1) and timings["b"].spread == pytest.approx((0.2, 0.2))


def test_slow_calls_are_spread_over_the_rounds(clock: Clock) -> None:
    timings = timing.alternate({"fast": clock.call("f", 0.01), "slow": clock.call("s", 2.0)}, seconds=1.0, most=9)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"fast": 9, "slow": 3}
    assert "".join(clock.log[4:]) == "fffs" * 3


def test_a_slow_call_can_be_timed_once(clock: Clock) -> None:
    timings = timing.alternate({"fast": clock.call("f", 0.1), "slow": clock.call("s", 2.0)}, seconds=0.5, least=1)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"fast": 5, "slow": 1}


def test_short_calls_are_timed_together(clock: Clock) -> None:
    timings = timing.alternate({"short": clock.call("s", 1e-5)}, seconds=0.01)
    assert timings["short"].median == pytest.approx(1e-5)
    assert len(clock.log) == 2 + 10 * 100
