"""The rate limit: in the long run never more than asked for, and no less than what is there to send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.mirror.throttle import BURST_SECONDS, Throttle

SPEED = 1000


def send(throttle: Throttle, length: int, now: float) -> float:
    """Send as soon as that may be; returns how long it took."""
    delay = throttle.delay(now)
    throttle.charge(length, now + delay)
    return delay


def test_no_limit_is_no_delay() -> None:
    throttle = Throttle()
    assert [send(throttle, 10**12, 5.0) for _ in range(3)] == [0.0] * 3


def test_request_waits_until_those_before_it_are_paid() -> None:
    throttle = Throttle(SPEED)
    assert send(throttle, 1000, 100.0) == 0.0
    assert send(throttle, 1000, 100.0) == pytest.approx(1 - BURST_SECONDS)
    assert send(throttle, 1, 100.0) == pytest.approx(2 - BURST_SECONDS)


def test_idle_time_saves_up_one_burst_and_no_more() -> None:
    throttle = Throttle(SPEED)
    send(throttle, 1, 0.0)
    assert send(throttle, 1000, 10_000.0) == 0.0
    assert send(throttle, 1, 10_000.0) == pytest.approx(1 - BURST_SECONDS)


def test_what_was_charged_at_the_old_limit_is_forgotten() -> None:
    throttle = Throttle(1)
    send(throttle, 10**6, 0.0)
    throttle.set_speed(SPEED, 1.0)
    assert send(throttle, 1000, 1.0) == 0.0
    assert send(throttle, 1000, 1.0) == pytest.approx(1.0)
    throttle.set_speed(0, 1.0)
    assert send(throttle, 10**9, 1.0) == 0.0


requests = st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), min_size=1, max_size=60)


@given(requests)
def test_long_term_rate_is_kept(pattern: list[tuple[int, float]]) -> None:
    """Requests are sent one after another, each after its delay and some idle time."""
    throttle = Throttle(SPEED)
    now, sent, largest = 1000.0, 0, 0
    started = now
    for length, idle in pattern:
        now += idle
        now += send(throttle, length, now)
        sent, largest = sent + length, max(largest, length)
        assert sent <= SPEED * (now - started + BURST_SECONDS) + largest + 1e-3


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_limit_is_used_up(lengths: list[int]) -> None:
    """Without idle time nothing is slower than the limit asks for."""
    throttle = Throttle(SPEED)
    now = 1000.0
    for length in lengths:
        now += send(throttle, length, now)
    assert now - 1000.0 <= sum(lengths) / SPEED + 1e-6
