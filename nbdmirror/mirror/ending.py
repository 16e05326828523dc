"""Ending: the last moments of a mirror that is ready: the source drained, the rest copied, the target flushed, handed over.

Rules:
1. Handing over comes with the source drained, after nothing was left and the target was flushed since: the disks are the same
   at that instant, and nobody writes before the exports have moved.
2. The guest is held for PATIENCE_SECONDS at a time at most. Where that is too short, because the target is slow, the guest goes
   on for LET_GO_SECONDS and the end begins anew. A target that did not answer at all meanwhile has failed, which is the error
   policy's business, or is out of reach; if it answers after all, it is flushed before the guest is held again.
3. Where there is something to wait for, a pause or a disk that failed, the guest goes on first.
4. A job that waits to be finalized holds the guest for `pending_seconds`. Then the guest goes on, marked; finalizing brings the
   disks into step once more. The job can no longer pause by then, so every failure ends it.
"""

from __future__ import annotations

import errno
import logging
import time
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.mirror import pace
from nbdmirror.mirror.trouble import CopyFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.sync_state import SyncState
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.convergence import Convergence
    from nbdmirror.mirror.flusher import Flusher
    from nbdmirror.mirror.progress import Progress
    from nbdmirror.mirror.transfer import Transfer
    from nbdmirror.mirror.trouble import Trouble

_log: Final = logging.getLogger(__name__)


class Ending:
    """The end of `job`; `on_failure` hears of a target that does not answer."""

    def __init__(
        self,
        job: Job,
        state: SyncState,
        transfer: Transfer,
        flusher: Flusher,
        convergence: Convergence,
        counters: Progress,
        trouble: Trouble,
        on_failure: Callable[[CopyFailed], None],
    ) -> None:
        self._job = job
        self._state = state
        self._transfer = transfer
        self._flusher = flusher
        self._convergence = convergence
        self._counters = counters
        self._trouble = trouble
        self._on_failure = on_failure
        # The target did not answer while the guest was held.
        self._was_silent = False

    async def reach(self, pending_seconds: float | None, hand_over: Callable[[], None]) -> None:
        """Come to the end, and call `hand_over` there. Raises Cancelled, CopyFailed, and what `hand_over` does."""
        while True:
            await self._transfer.rest()
            await self._convergence.shrink()
            if self._was_silent or self._flusher.unflushed > pace.SMALL:
                if not await self._flusher.flush():
                    continue
                self._was_silent = False  # and the flush in the drain has little to do
            try:
                async with self._convergence.guest_held(pace.PATIENCE_SECONDS) as hold:
                    if await self._settle():
                        self._trouble.is_final()
                        self._job.pend()
                        if await self._job.finalized(pending_seconds):
                            hand_over()
                            return
                        await hold.aclose()
                        break
            except TimeoutError:
                _log.info("job '%s': a write of the guest does not end; it is not waited for any longer", self._job.id)
            await self._job.nap(pace.LET_GO_SECONDS)
        await self._reach_again(hand_over)

    async def _reach_again(self, hand_over: Callable[[], None]) -> None:
        _log.warning("job '%s' was not finalized in time: the guest goes on, and is held again then", self._job.id)
        await self._job.finalized(None)
        await self._convergence.shrink()
        try:
            async with self._convergence.guest_held(pace.PATIENCE_SECONDS):
                if not await self._settle():
                    raise TimeoutError
                hand_over()
        except TimeoutError:
            seconds = f"{pace.PATIENCE_SECONDS:g}"
            raise DeviceError(errno.ETIMEDOUT, f"the disks could not be brought into step within {seconds} s") from None

    async def _settle(self) -> bool:
        """The source is drained: copy what is left and flush. False where that was given up, or failed."""
        deadline, before = time.monotonic() + pace.PATIENCE_SECONDS, self._counters.offset
        await self._transfer.sweep_held(deadline, 0)
        if not self._state.is_synced:
            if not self._transfer.is_to_rest() and self._counters.offset == before:
                self._give_up()
            return False
        try:
            is_flushed = await self._flusher.flush(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self._give_up()
            return False
        self._job.cancel_point()
        return is_flushed and not self._transfer.is_to_rest()

    def _give_up(self) -> None:
        self._was_silent = True
        context = f"no answer from the target for {pace.PATIENCE_SECONDS:g} s, with the guest held"
        self._on_failure(CopyFailed("write", DeviceError(errno.ETIMEDOUT, context)))
