"""Patience: how long a connection's server may be silent while it owes answers. libnbd knows no time limits.

Rules:
1. Patience is over when commands are in flight and for `limit` seconds nothing has moved in either direction: neither did the
   server send anything nor take what is being sent to it. Any progress counts for all commands.
2. A command that has the server wait for its disk (a flush, a zero, a trim, anything with FUA) may rightly take long: while
   one is in flight, the limit is SLOW_FACTOR times as long.
3. One timer, however many commands. It looks again when it fires, and stands still while nothing is in flight.
4. A program that was held up itself does not take its own delay for the server's: what has arrived is read first.
"""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

SLOW_FACTOR: Final = 10
# Seconds before looking again when something is there to be read.
_AGAIN: Final = 0.1


class Patience:
    """Calls `on_over` once patience is over. `begun` and `ended` tell of each command, `moved` of any progress."""

    def __init__(self, limit: float, fd: int, on_over: Callable[[], None]) -> None:
        self._limit = limit
        self._fd = fd
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._slow: set[object] = set()
        self._moved = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begun(self, command: object, *, is_slow: bool) -> None:
        """`command` is being sent."""
        if not self._in_flight:
            self._moved = self._loop.time()
        self._in_flight += 1
        if is_slow:
            self._slow.add(command)
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit, self._check)

    def ended(self, command: object) -> None:
        """`command` was answered."""
        self._in_flight -= 1
        self._slow.discard(command)

    def moved(self) -> None:
        """Something was sent or received."""
        self._moved = self._loop.time()

    def stop(self) -> None:
        """The connection has ended."""
        self._in_flight = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if not self._in_flight:
            return
        left = self._moved + self._limit * (SLOW_FACTOR if self._slow else 1) - self._loop.time()
        if left <= 0 and not self._has_arrived():
            self._on_over()
        else:
            self._timer = self._loop.call_later(max(left, _AGAIN), self._check)

    def _has_arrived(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))
