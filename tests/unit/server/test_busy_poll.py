"""The loop stays awake after answers that come fast upon each other, and only then."""

from __future__ import annotations

import asyncio
import time

import pytest

from nbdmirror.server import busy_poll
from nbdmirror.server.busy_poll import BusyPoll


@pytest.fixture
def poll(monkeypatch: pytest.MonkeyPatch) -> BusyPoll:
    monkeypatch.setattr(busy_poll, "_PATIENCE", 0.01)
    return BusyPoll()


async def test_a_client_that_takes_its_time_costs_nothing(poll: BusyPoll) -> None:
    for _ in range(3):
        poll.answered(poll._answered + 1.0)
        assert not poll._is_polling


async def test_a_client_that_is_fast_is_waited_for_but_not_for_ever(poll: BusyPoll) -> None:
    poll.answered(time.monotonic())
    assert not poll._is_polling, "nothing is known of the first"
    poll.answered(poll._answered)
    assert poll._is_polling
    started = time.monotonic()
    async with asyncio.timeout(10):
        while poll._is_polling:
            await asyncio.sleep(0)
    assert time.monotonic() - started >= 0.01


async def test_others_are_served_meanwhile(poll: BusyPoll) -> None:
    poll.answered(time.monotonic())
    poll.answered(poll._answered)
    turns = 0
    while poll._is_polling:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1
