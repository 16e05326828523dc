"""Budget: how many bytes the large requests of all connections together may hold.

Rules:
1. A READ or WRITE of more than LARGE bytes takes its length out of the budget before its buffer is made, and gives it back
   when the payload is on the disk or the reply on its way. Where the budget is spent it waits, in order of asking; it is not
   refused. One that is larger than all of the budget gets it once nobody else has any.
2. Smaller requests never wait here: each connection has room for its own (`session.MAX_BYTES_IN_FLIGHT`). So connections hold
   that much each at the worst, and BYTES more in all.
3. A peer can only harm itself: while somebody waits, a holder whose client takes and sends less than PACE bytes in PATIENCE
   seconds, and who does not wait for the disk, is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from nbdmirror.units import MiB

LARGE: Final = MiB
# One of the largest requests, or two of QEMU's largest.
BYTES: Final = 64 * MiB
PATIENCE: Final = 10.0
PACE: Final = MiB


class Holder(Protocol):
    """Who asks: a connection."""

    def moved(self) -> int | None:
        """How many bytes the client has sent and taken so far; None while the server works for it."""

    def drop(self, reason: str) -> None:
        """Hang up, and release what is held."""


class Budget:
    """One for all connections of a listener."""

    def __init__(self, total: int = BYTES, patience: float = PATIENCE) -> None:
        self._total = total
        self._patience = patience
        self._held: dict[Holder, int] = {}
        self._spent = 0
        self._waiting: deque[tuple[Holder, int, asyncio.Future[None]]] = deque()
        self._seen: dict[Holder, int | None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def acquire(self, holder: Holder, amount: int) -> asyncio.Future[None] | None:
        """`amount` bytes are the holder's: at once where this is None, else when the future is done."""
        if not self._waiting and self._fits(amount):
            self._grant(holder, amount)
            return None
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((holder, amount, turn))
        if self._timer is None:
            self._watch()
        return turn

    def release(self, holder: Holder, amount: int) -> None:
        """`amount` bytes that the holder had are not needed any more."""
        self._held[holder] -= amount
        if not self._held[holder]:
            del self._held[holder]
        self._spent -= amount
        self._pass_on()

    @property
    def spent(self) -> int:
        """Bytes that are held."""
        return self._spent

    def _fits(self, amount: int) -> bool:
        return not self._spent or self._spent + amount <= self._total

    def _grant(self, holder: Holder, amount: int) -> None:
        self._held[holder] = self._held.get(holder, 0) + amount
        self._spent += amount

    def _pass_on(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            holder, amount, turn = self._waiting.popleft()
            if not turn.cancelled():  # as everything is when the loop ends
                self._grant(holder, amount)
                turn.set_result(None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        self._seen = {holder: holder.moved() for holder in self._held}
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._look)

    def _look(self) -> None:
        slow = [holder for holder, seen in self._seen.items() if holder in self._held and _is_slow(seen, holder.moved())]
        self._watch()
        for holder in slow:
            holder.drop(f"it took and sent less than {PACE >> 20} MiB in {self._patience:.0f} s while others waited for memory")


def _is_slow(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now - before < PACE
