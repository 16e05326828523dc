"""TrackedDevice: the filter node through which every user of a disk writes, so that observers see each write.

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
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from nbdmirror.devices.base import BlockDevice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Coroutine

    from nbdmirror.extents import ExtentList


class WriteObserver(Protocol):
    """Hears of every write, by `(offset, length)` in bytes."""

    def write_begins(self, offset: int, length: int) -> None:
        """The range is about to change."""

    def write_ends(self, offset: int, length: int) -> None:
        """The range, announced before, changes no more."""


class TrackedDevice(BlockDevice):
    """A filter over `below`, which can be exchanged while the device is drained."""

    def __init__(self, below: BlockDevice) -> None:
        self._observers: tuple[WriteObserver, ...] = ()
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

    # --- observers -------------------------------------------------------------------------------------------------

    def observe(self, observer: WriteObserver) -> None:
        """Let `observer` hear of every write from now on, those in flight included."""
        self._observers = (*self._observers, observer)
        for offset, length in self._in_flight.values():
            observer.write_begins(offset, length)

    def forget(self, observer: WriteObserver) -> None:
        """`observer` hears nothing more."""
        self._observers = tuple(other for other in self._observers if other is not observer)

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
        token = await self._begin(offset, len(data))
        await self._bracketed(token, self.below.pwrite(data, offset, flags))

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        token = await self._begin(offset, length)
        await self._bracketed(token, self.below.zero(offset, length, flags))

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        token = await self._begin(offset, length)
        await self._bracketed(token, self.below.trim(offset, length, flags))

    async def _begin(self, offset: int, length: int) -> int:
        while self._drains:
            await self._open_gate.wait()
        token = next(self._tokens)
        self._in_flight[token] = (offset, length)
        self._idle.clear()
        for observer in self._observers:
            observer.write_begins(offset, length)
        return token

    async def _bracketed(self, token: int, write: Coroutine[None, None, None]) -> None:
        """Carry a write out. Who waits for it may be cancelled; the write, and its end, may not (rule 5)."""
        task = asyncio.ensure_future(write)
        task.add_done_callback(lambda done: self._end(token, done))
        await asyncio.shield(task)

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
