"""The budget of large requests: who gets it when, and who loses it."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.server.budget import PACE, Budget


class Client:
    """A holder that has moved `each` bytes more whenever it is looked at."""

    def __init__(self, each: int = 0) -> None:
        self.each = each
        self.count = 0
        self.dropped = asyncio.Event()
        self.reason = ""

    def moved(self) -> int | None:
        self.count += self.each
        return self.count

    def drop(self, reason: str) -> None:
        self.reason = reason
        self.dropped.set()


class Busy(Client):
    """One for whom the server works."""

    def moved(self) -> int | None:
        return None


async def test_what_fits_is_granted_at_once() -> None:
    budget, client = Budget(100), Client()
    assert budget.acquire(client, 60) is None
    assert budget.acquire(client, 40) is None
    assert budget.spent == 100


async def test_who_waits_is_served_in_order_even_where_a_later_one_would_fit() -> None:
    budget, one, two, three = Budget(100), Client(), Client(), Client()
    assert budget.acquire(one, 80) is None
    second, third = budget.acquire(two, 50), budget.acquire(three, 10)
    assert second is not None
    assert third is not None
    budget.release(one, 20)
    assert not second.done()
    assert not third.done()
    budget.release(one, 10)
    await asyncio.gather(second)
    assert not third.done()
    budget.release(one, 50)
    await third
    assert budget.spent == 60


async def test_more_than_all_is_granted_alone() -> None:
    budget, one, two = Budget(100), Client(), Client()
    assert budget.acquire(one, 1) is None
    turn = budget.acquire(two, 1000)
    assert turn is not None
    budget.release(one, 1)
    await turn
    assert budget.acquire(one, 1) is not None


async def test_who_was_cancelled_while_waiting_gets_nothing() -> None:
    budget, one, two, three = Budget(100), Client(), Client(), Client()
    assert budget.acquire(one, 100) is None
    second, third = budget.acquire(two, 100), budget.acquire(three, 100)
    assert second is not None
    assert third is not None
    second.cancel()
    budget.release(one, 100)
    await third
    assert budget.spent == 100


@pytest.mark.parametrize("each", [0, PACE // 4])
async def test_who_holds_it_and_hardly_moves_while_others_wait_is_dropped(each: int) -> None:
    budget, idle, busy, quick, waiting = Budget(100, patience=0.01), Client(each), Busy(), Client(PACE), Client()
    assert budget.acquire(idle, 50) is None
    assert budget.acquire(busy, 25) is None
    assert budget.acquire(quick, 25) is None
    turn = budget.acquire(waiting, 10)
    await asyncio.wait_for(idle.dropped.wait(), 10)
    assert "while others waited" in idle.reason
    assert not busy.dropped.is_set()
    assert not quick.dropped.is_set()
    assert turn is not None
    budget.release(idle, 50)
    await turn


async def test_nobody_is_dropped_while_nobody_waits() -> None:
    budget, one, two = Budget(100, patience=0.0), Client(), Client()
    assert budget.acquire(one, 100) is None
    turn = budget.acquire(two, 10)
    assert turn is not None
    budget.release(one, 100)
    await turn
    for _ in range(10):
        await asyncio.sleep(0)
    assert not two.dropped.is_set()
    assert not one.dropped.is_set()
