"""Rates over the last seconds, and what they say of the time that is left."""

from __future__ import annotations

import pytest

from nbdmirror.mirror.rates import WINDOW_SECONDS, Rates


def test_nothing_is_said_before_there_is_something_to_say() -> None:
    rates = Rates()
    assert rates.statistics(100.0, 0, 1000) == {}
    assert rates.statistics(100.9, 500, 1000) == {}


def test_idle_guest() -> None:
    rates = Rates()
    rates.note(0.0, 0, 1000)
    assert rates.statistics(2.0, 200, 1000) == {"x-copy-rate": 100, "x-dirty-rate": 0, "x-eta": 8.0}


def test_guest_that_makes_more_work() -> None:
    rates = Rates()
    rates.note(0.0, 0, 1000)
    assert rates.statistics(4.0, 400, 1200) == {"x-copy-rate": 100, "x-dirty-rate": 50, "x-eta": 16.0}


def test_guest_that_is_faster_than_the_copying_has_no_end() -> None:
    rates = Rates()
    rates.note(0.0, 0, 1000)
    assert rates.statistics(4.0, 400, 1800) == {"x-copy-rate": 100, "x-dirty-rate": 200}


def test_only_the_last_seconds_count() -> None:
    rates = Rates()
    done, now = 0, 0.0
    while now < 100:
        rates.note(now, done, 10**6)
        now += 0.1
        done += 10
    for _ in range(int(WINDOW_SECONDS * 10) + 20):  # ten times as fast now
        now += 0.1
        done += 100
        rates.note(now, done, 10**6)
    assert rates.statistics(now, done, 10**6)["x-copy-rate"] == pytest.approx(1000, rel=0.02)
    assert len(rates._samples) <= WINDOW_SECONDS / 0.5 + 2
