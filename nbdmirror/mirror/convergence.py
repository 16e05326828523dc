"""Convergence: bringing what is left down to nothing while the guest writes on.

Rules:
1. A guest that rewrites faster than passes get shorter is held back in turns of HOLD_SECONDS, but only where that can succeed
   soon, which the first turn shows: what the guest takes of the processors is free for copying then. A slow target never
   slows a guest for long.
2. Whoever holds the guest back can be cancelled, and gives up in time: a source that does not finish its writes, or a target
   that does not answer, holds nobody for ever.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from nbdmirror.mirror import pace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdmirror.bitmap.sync_state import SyncState
    from nbdmirror.devices.tracked import TrackedDevice
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.progress import Progress
    from nbdmirror.mirror.transfer import Transfer


class Convergence:
    """The passes of `job` over `source`."""

    def __init__(self, job: Job, source: TrackedDevice, state: SyncState, transfer: Transfer, counters: Progress) -> None:
        self._job = job
        self._source = source
        self._state = state
        self._transfer = transfer
        self._counters = counters
        # Whether the last pass left about as much as it found: so it will go on while the guest writes like this.
        self.is_stuck = False

    async def catch_up(self) -> None:
        """Copy, pass after pass, until there is a moment at which nothing is left."""
        left = self._state.remaining_bytes
        while True:
            if not await self._transfer.sweep(left):
                await self._job.nap(pace.RELEASE_SECONDS)  # all that is dirty is being written just now
            if self._state.is_synced:
                self.is_stuck = False
                return
            was_left, left = left, self._state.remaining_bytes
            self.is_stuck = left > was_left * pace.SHRINKING
            if self.is_stuck and not self._job.speed and await self._close_in():
                self.is_stuck = False
                return

    async def _close_in(self) -> bool:
        """Hold the guest's writes for short turns. True once nothing is left, False if the turns get nowhere."""
        left = self._state.remaining_bytes
        for turn in range(pace.CLOSE_IN_TURNS):
            started, before = time.monotonic(), self._counters.offset
            try:
                async with self.guest_held(pace.PATIENCE_SECONDS):
                    await self._transfer.sweep_held(time.monotonic() + pace.HOLD_SECONDS, grace=pace.HOLD_SECONDS)
                    if self._state.is_synced:
                        return True
            except TimeoutError:
                return False
            if self._transfer.is_to_rest():
                return False
            rate = (self._counters.offset - before) / (time.monotonic() - started)
            if self._state.remaining_bytes > rate * pace.CLOSE_IN_SECONDS:
                return False
            await self._job.nap(pace.RELEASE_SECONDS)
            if turn % pace.CLOSE_IN_CHECK == pace.CLOSE_IN_CHECK - 1:
                was_left, left = left, self._state.remaining_bytes
                if left > was_left * pace.CLOSING_IN:
                    return False
        return False

    async def shrink(self) -> None:
        """Before draining: passes for as long as they make what is left smaller, so that the drain is short."""
        left = self._state.remaining_bytes
        while left > pace.SMALL:
            await self._transfer.sweep(left)
            was_left, left = left, self._state.remaining_bytes
            if left > was_left * pace.SHRINKING:
                return

    @asynccontextmanager
    async def guest_held(self, within: float) -> AsyncIterator[AsyncExitStack]:
        """Inside, until the stack is closed, the source is drained. Raises Cancelled, and TimeoutError where writes that are in
        flight do not end within so many seconds."""
        async with AsyncExitStack() as hold:
            await self._job.unless_cancelled(hold.enter_async_context(self._source.drained()), within)
            yield hold
