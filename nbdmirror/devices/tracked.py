"""TrackedDevice: the filter node through which every user of a disk writes: observers see each write, guards may hold it.

Rules:
1. Observers hear `write_begins` before the disk below can change and `write_ends` after it no longer can, whether the
   write succeeded or not: the content of a failed write is unknown, so it counts.
2. An observer that joins hears `write_begins` for every write that is in flight; one that has left hears nothing more.
   So nobody misses a write that overlaps with its arrival.
3. While the device is drained no write is below it and none begins: writes wait here, of whichever connection, and those
   of connections that come later too. They go on to whatever disk is below when the drain ends.
4. Only writes are gated; reads and flushes pass.
5. A write that was begun is in flight until the disk below is done with it, even if the caller was cancelled: a thread or a
   remote server can't be called back.
6. A write has the guards that the device had when it began. One after the other, in the order in which they joined, they are
   asked before it goes below and told once it was done there; both within the bracket of rule 1, so observers know of a write
   that a guard holds, and a drain waits for it. Hence a guard must never wait for a drain.
7. A guard that fails a write before keeps it from the disk; one that fails it afterwards fails a write that was done. Either
   fails it for the client. A guard hears nothing of the end of a write that failed elsewhere: who needs that, observes as well.
8. A write that every guard lets pass is done at once, without `before` and `after`; it is a plain one, never FUA.
9. Before a flush goes below every guard has done its part of it.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from nbdmirror.devices.base import BlockDevice
from nbdmirror.protocol.constants import FUA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from nbdmirror.extents import ExtentList


class WriteObserver(Protocol):
    """Hears of every write, by `(offset, length)` in bytes."""

    def write_begins(self, offset: int, length: int) -> None:
        """The range is about to change."""

    def write_ends(self, offset: int, length: int) -> None:
        """The range, announced before, changes no more."""


class WriteKind(Enum):
    """Which of a device's methods writes."""

    PWRITE = "pwrite"
    ZERO = "zero"
    TRIM = "trim"


@dataclass(frozen=True, slots=True)
class Write:
    """One write, as guards see it. `data`, of a pwrite alone, is the caller's buffer: good until the write is answered."""

    kind: WriteKind
    offset: int
    length: int
    flags: int = 0
    data: bytes | bytearray | memoryview = b""

    @property
    def fua(self) -> bool:
        """Whether it has to be durable before it is answered."""
        return bool(self.flags & FUA)

    async def to(self, device: BlockDevice) -> None:
        """Carry it out there; raises DeviceError."""
        match self.kind:
            case WriteKind.PWRITE:
                await device.pwrite(self.data, self.offset, self.flags)
            case WriteKind.ZERO:
                await device.zero(self.offset, self.length, self.flags)
            case WriteKind.TRIM:
                await device.trim(self.offset, self.length, self.flags)


class WriteGuard(Protocol):
    """May hold writes back, fail them, and do what belongs to them before they are answered (rules 6 to 9)."""

    def passes(self, offset: int, length: int) -> bool:
        """Whether a plain write of the range needs nothing of this guard. Every write asks: be quick."""

    async def before(self, write: Write) -> None:
        """Return when the write may go below. Raises DeviceError."""

    async def after(self, write: Write) -> None:
        """The disk below has done it; it is answered when this returns. Raises DeviceError."""

    async def before_flush(self) -> None:
        """Do what has to be durable no later than what a flush makes durable below. Raises DeviceError."""


class TrackedDevice(BlockDevice):
    """A filter over `below`, which can be exchanged while the device is drained."""

    def __init__(self, below: BlockDevice) -> None:
        self._observers: tuple[WriteObserver, ...] = ()
        self._guards: tuple[WriteGuard, ...] = ()
        self._in_flight: dict[int, tuple[int, int]] = {}
        self._tokens = itertools.count()
        self._drains = 0
        self._open_gate = asyncio.Event()
        self._open_gate.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._set_below(below)

    def _set_below(self, below: BlockDevice) -> None:
        self.below = below
        self.name, self.size = below.name, below.size
        self.limits, self.capabilities = below.limits, below.capabilities
        self.pread_now = below.pread_now  # type: ignore[method-assign]  # one call less in the hot path

    def replace_below(self, below: BlockDevice) -> None:
        """Put another disk of at least the same size below. Only while drained: no write may straddle the change."""
        assert self._drains, "the disk below can only be exchanged while drained"
        assert not self._in_flight, "a write is in flight"
        assert below.size >= self.size, "the other disk is smaller"
        size = self.size
        self._set_below(below)
        self.size = size

    # --- observers and guards --------------------------------------------------------------------------------------

    def observe(self, observer: WriteObserver) -> None:
        """Let `observer` hear of every write from now on, those in flight included."""
        self._observers = (*self._observers, observer)
        for offset, length in self._in_flight.values():
            observer.write_begins(offset, length)

    def forget(self, observer: WriteObserver) -> None:
        """`observer` hears nothing more."""
        self._observers = tuple(other for other in self._observers if other is not observer)

    def guard(self, guard: WriteGuard) -> None:
        """Let `guard` hold the writes that begin from now on. Those in flight are beyond it: drain first if that matters."""
        self._guards = (*self._guards, guard)

    def unguard(self, guard: WriteGuard) -> None:
        """Writes that begin from now on pass `guard` by; it has to finish what it began with those in flight."""
        self._guards = tuple(other for other in self._guards if other is not guard)

    # --- draining --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many writes the disk below is not done with, those included that nobody waits for any more."""
        return len(self._in_flight)

    def writes_in_flight(self) -> Collection[tuple[int, int]]:
        """`(offset, length)` of each of those writes."""
        return self._in_flight.values()

    @property
    def is_drained(self) -> bool:
        """Whether writes are being held."""
        return self._drains > 0

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Inside, no write is in flight and none begins. May be nested."""
        self._drains += 1
        self._open_gate.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._drains -= 1
            if not self._drains:
                self._open_gate.set()

    # --- writes ----------------------------------------------------------------------------------------------------

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        """See BlockDevice. Nothing else runs between begin and end, so this write is never in flight."""
        if self._drains:
            return False
        observers = self._observers
        length = len(data)
        for guard in self._guards:
            if not guard.passes(offset, length):
                return False
        for observer in observers:
            observer.write_begins(offset, length)
        try:
            return self.below.pwrite_now(data, offset)
        finally:
            for observer in observers:
                observer.write_ends(offset, length)

    def abandoned(self, offset: int, length: int) -> None:
        """See BlockDevice. Observers hear of it as of a write that failed: what was meant to be there is not known."""
        for observer in self._observers:
            observer.write_begins(offset, length)
            observer.write_ends(offset, length)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """See BlockDevice."""
        await self._bracketed(Write(WriteKind.PWRITE, offset, len(data), flags, data))

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        await self._bracketed(Write(WriteKind.ZERO, offset, length, flags))

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        await self._bracketed(Write(WriteKind.TRIM, offset, length, flags))

    async def _bracketed(self, write: Write) -> None:
        """Carry a write out. Who waits for it may be cancelled; the write, and its end, may not (rule 5)."""
        while self._drains:
            await self._open_gate.wait()
        token = next(self._tokens)
        self._in_flight[token] = (write.offset, write.length)
        self._idle.clear()
        for observer in self._observers:
            observer.write_begins(write.offset, write.length)
        task = asyncio.ensure_future(self._guarded(write, self._guards))
        task.add_done_callback(lambda done: self._end(token, done))
        await asyncio.shield(task)

    async def _guarded(self, write: Write, guards: tuple[WriteGuard, ...]) -> None:
        for guard in guards:
            await guard.before(write)
        await write.to(self.below)
        for guard in guards:
            await guard.after(write)

    def _end(self, token: int, done: asyncio.Task[None]) -> None:
        if not done.cancelled():
            done.exception()  # seen, even when nobody waits any more
        offset, length = self._in_flight.pop(token)
        for observer in self._observers:
            observer.write_ends(offset, length)
        if not self._in_flight:
            self._idle.set()

    # --- the rest passes -------------------------------------------------------------------------------------------

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See BlockDevice."""
        await self.below.pread(buffer, offset)

    async def flush(self) -> None:
        """See BlockDevice."""
        for guard in self._guards:
            await guard.before_flush()
        await self.below.flush()

    async def cache(self, offset: int, length: int) -> None:
        """See BlockDevice."""
        await self.below.cache(offset, length)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """See BlockDevice."""
        return await self.below.extents(offset, length)

    async def aclose(self) -> None:
        """Close the disk below."""
        await self.below.aclose()
