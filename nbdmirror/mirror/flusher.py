"""Flusher: flushes the target, and takes off the record what that made durable.

Rules:
1. One flush at a time. What had settled before it began is retired by it; what was not flushed, because it failed or was given
   up, is dirty again before anybody hears of it.
2. A job with a live record also flushes beside its copying, every CHECKPOINT_BYTES or CHECKPOINT_SECONDS. One whose target may
   be lost does so more seldom, every SAFEKEEP_BYTES or SAFEKEEP_SECONDS: what then has to be copied again is bounded.
"""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.mirror import pace
from nbdmirror.mirror.record import Keep
from nbdmirror.mirror.trouble import CopyFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.sync_state import SyncState
    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.record import Record

# How long a job that ends waits for a target that does not answer.
_LAST_SECONDS: Final = 2.0


class Flusher:
    """Flushes `target` for `job`; where that is not wanted, it only keeps account.

    `on_loss` is called where what was not flushed may be lost, `on_failure` hears of the flush that failed. `may_be_lost` says
    that the target can be, with all that it has not flushed.
    """

    def __init__(
        self,
        job: Job,
        state: SyncState,
        target: BlockDevice,
        record: Record | None,
        on_loss: Callable[[], None],
        on_failure: Callable[[CopyFailed], None],
        *,
        is_wanted: bool,
        may_be_lost: bool,
    ) -> None:
        self._job = job
        self._state = state
        self._target = target
        self._record = record
        self._on_loss = on_loss
        self._on_failure = on_failure
        self._is_wanted = is_wanted
        self._may_be_lost = may_be_lost
        # The flush that goes on beside the copying, if there is one.
        self.tasks: set[asyncio.Task[None]] = set()
        # Bytes that have arrived since the last flush began.
        self.unflushed = 0
        self._began = time.monotonic()

    async def flush(self, within: float | None = None) -> bool:
        """False where that failed. Raises Cancelled, and TimeoutError after `within` seconds."""
        async with asyncio.timeout(within):
            while self.tasks:
                await self._job.unless_cancelled(asyncio.wait(set(self.tasks)))
            try:
                await self._job.unless_cancelled(self._flush())
            except DeviceError as error:
                self._on_failure(CopyFailed("write", error))
                return False
        return True

    async def _flush(self) -> None:
        self.unflushed, self._began = 0, time.monotonic()
        self._state.flush_begins()
        try:
            if self._is_wanted:
                await self._target.flush()
            if not self._state.is_flushing:
                raise DeviceError(errno.ENOTCONN, f"{self._target.name}: part of what was to be flushed is lost")
        except BaseException:
            self._on_loss()
            raise
        retired = self._state.flush_ends()
        if self._record is not None:
            self._record.retire(retired)

    # --- while copying ---------------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether something has arrived that should be flushed some time."""
        return self.unflushed > 0 and (self._is_live or self._may_be_lost)

    @property
    def _is_live(self) -> bool:
        return self._record is not None and self._record.keep is Keep.LIVE

    @property
    def seconds(self) -> float:
        """How soon that is."""
        return pace.CHECKPOINT_SECONDS if self._is_live else pace.SAFEKEEP_SECONDS

    def settled(self, length: int) -> None:
        """So many bytes have arrived: flush, where it is time to."""
        self.unflushed += length
        bound = pace.CHECKPOINT_BYTES if self._is_live else pace.SAFEKEEP_BYTES
        is_due = self.unflushed >= bound or time.monotonic() - self._began >= self.seconds
        if is_due and self.is_behind and not self._state.is_flushing and not self.tasks:
            task = asyncio.get_running_loop().create_task(self._check_in())
            self.tasks.add(task)
            task.add_done_callback(self._landed)

    async def _check_in(self) -> None:
        try:
            await self._flush()
        except DeviceError as error:
            self._on_failure(CopyFailed("write", error))

    def _landed(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._job.wake()

    async def last(self) -> None:
        """For a job that ends without success: what has arrived need not be copied again, if the target still answers."""
        if self._record is not None and self._record.keep in (Keep.LIVE, Keep.ALWAYS) and self.unflushed:
            with suppress(DeviceError, TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self._flush()
