"""The guards that make a bitmap's marks durable in time: each is a WriteGuard (devices.tracked) of the bitmap's disk.

    mode     guard           a write waits for                      a flush waits for
    lazy     none            nothing                                nothing
    barrier  BarrierGuard    its bits durable, if it has FUA        the bits of all writes answered before
    intent   IntentGuard     its regions durable on record          nothing

Rules:
1. A mark is set before its guard is asked (devices.tracked, rules 1 and 6), so what a guard makes durable has it.
2. Barrier: the bits first, then the disk. So at no time is anything that a client was promised durable on the disk and not in
   the bitmap, not even while the flush is under way.
3. Intent: see `regions`. A write that could not be put on record fails, and the disk has nothing of it.
4. Writes that are first to their regions at the same time share one commit.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from nbdmirror.bitmap.image import Sync
from nbdmirror.bitmap.regions import Regions
from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from nbdmirror.bitmap.store import BitmapStore

# A region stays on record for one to two of these after its last write. A checkpoint costs a sync of the bits at most.
CHECKPOINT_SECONDS: Final = 10.0


class Announced(Protocol):
    """What a guard needs to know of a write."""

    @property
    def offset(self) -> int:
        """Bytes."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def fua(self) -> bool:
        """Whether it is durable when it is answered."""


class BarrierGuard:
    """What clients make durable on the disk is durable in the bitmap before."""

    def __init__(self, store: BitmapStore) -> None:
        self._store = store

    def passes(self, offset: int, length: int) -> bool:  # noqa: ARG002
        """See WriteGuard: a plain write promises nothing."""
        return True

    async def before(self, write: Announced) -> None:
        """See WriteGuard."""
        if write.fua and self._store.bitmap.recording:
            await self._store.sync()

    async def after(self, write: Announced) -> None:
        """See WriteGuard."""

    async def before_flush(self) -> None:
        """See WriteGuard."""
        if not self._store.bitmap.inconsistent:
            await self._store.sync()

    async def settle(self) -> None:
        """Make everything about the bitmap durable; raises DeviceError."""
        await self._store.settle()

    async def aclose(self) -> None:
        """Nothing to end."""


class IntentGuard:
    """No write reaches the disk before its regions are durably on record. `in_flight` tells the writes that are under way."""

    def __init__(self, store: BitmapStore, in_flight: Callable[[], Collection[tuple[int, int]]]) -> None:
        self._store = store
        self._bitmap = store.bitmap
        self.regions = Regions(store.head.size, store.head.region_size)
        self._region_passes = self.regions.passes
        self._in_flight = in_flight
        self._lock = asyncio.Lock()
        self._end = asyncio.Event()
        self._checkpoints = asyncio.get_running_loop().create_task(self._checkpoint_at_times())

    def passes(self, offset: int, length: int) -> bool:
        """See WriteGuard: one test, but for the first write to a region since the last checkpoint."""
        return self._region_passes(offset, length) or not self._bitmap.recording

    async def before(self, write: Announced) -> None:
        """See WriteGuard."""
        if self._bitmap.recording:
            await self._put_on_record(write.offset, write.length)

    async def after(self, write: Announced) -> None:
        """See WriteGuard."""

    async def before_flush(self) -> None:
        """See WriteGuard: the record is ahead of the disk already."""

    async def settle(self) -> None:
        """Make everything about the bitmap durable, and put on record what is in flight just now; raises DeviceError."""
        for offset, length in list(self._in_flight()) if self._bitmap.recording else ():
            await self._put_on_record(offset, length)
        await self._store.settle()

    async def _put_on_record(self, offset: int, length: int) -> None:
        while not (self.regions.passes(offset, length) or self._end.is_set()):
            self.regions.want(offset, length)
            async with self._lock:
                if not (self.regions.passes(offset, length) or self._end.is_set()):
                    await self._commit()

    async def _commit(self) -> None:
        piece = self.regions.commit_begins()
        if piece is None:
            return
        try:
            await self._store.write_regions(*piece)
        except BaseException:
            self.regions.commit_fails()
            raise
        self.regions.commit_ends()

    async def checkpoint(self) -> None:
        """Take the regions off the record that have been idle since the last checkpoint; raises DeviceError."""
        idle = self.regions.idle(self._in_flight())
        if idle.any():
            await self._store.sync()
            self.regions.withdraw(idle)
            async with self._lock:
                await self._commit()
        self.regions.next_epoch()

    async def _checkpoint_at_times(self) -> None:
        while not self._end.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECKPOINT_SECONDS):
                    await self._end.wait()
                    return
            with suppress(DeviceError):  # logged; the regions stay on record, and the next checkpoint tries again
                await self.checkpoint()

    async def aclose(self) -> None:
        """Let go of the file, when nothing is under way there. Writes that began before go on without it."""
        self._end.set()
        await self._checkpoints
        async with self._lock:
            pass


Guard = BarrierGuard | IntentGuard


def guard_of(store: BitmapStore, sync_mode: Sync, in_flight: Callable[[], Collection[tuple[int, int]]]) -> Guard | None:
    """The guard that keeps the promise of a mode."""
    match sync_mode:
        case Sync.LAZY:
            return None
        case Sync.BARRIER:
            return BarrierGuard(store)
        case Sync.INTENT:
            return IntentGuard(store, in_flight)
