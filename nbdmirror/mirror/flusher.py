"""Flusher: flushes the target, and takes off the record what that made durable.

Rules:
1. One flush at a time. What had settled before it began is retired by it; what was not flushed, because it failed or was given
   up, is dirty again before anybody hears of it.
2. A job with a live record also flushes beside its copying, every CHECKPOINT_BYTES or CHECKPOINT_SECONDS.
"""

from __future__ import annotations

import asyncio
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

    `on_failure` hears of a flush that failed.
    """

    def __init__(
        self,
        job: Job,
        state: SyncState,
        target: BlockDevice,
        record: Record | None,
        on_failure: Callable[[CopyFailed], None],
        *,
        is_wanted: bool,
    ) -> None:
        self._job = job
        self._state = state
        self._target = target
        self._record = record
        self._on_failure = on_failure
        self._is_wanted = is_wanted
        # The flush that goes on beside the copying, if there is one.
        self.tasks: set[asyncio.Task[None]] = set()
        # Bytes that have arrived since the last flush began.
        self.unflushed = 0
        self._began = 0.0

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
        except BaseException:
            self._state.target_lost()
            raise
        retired = self._state.flush_ends()
        if self._record is not None:
            self._record.retire(retired)

    # --- while copying ---------------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether a live record has something that only a flush takes off it."""
        return self.unflushed > 0 and self._record is not None and self._record.keep is Keep.LIVE

    def settled(self, length: int) -> None:
        """So many bytes have arrived: flush, where it is time to."""
        self.unflushed += length
        is_due = self.unflushed >= pace.CHECKPOINT_BYTES or time.monotonic() - self._began >= pace.CHECKPOINT_SECONDS
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
