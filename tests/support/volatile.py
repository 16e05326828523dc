"""A file and a disk whose caches forget: what a power cut leaves of them is any of what they may have written back by then.

Every call that a thread would do waits until the test lets it be done, or fails it. A page has a history of versions since the
last that is known to be durable; of each page any of them may survive, whatever the others do. A write-back that has failed
leaves pages that the kernel takes for clean, and does not write again unless they change.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from nbdmirror.bitmap.image import PAGE
from nbdmirror.devices.base import BlockDevice, Capabilities, Limits
from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FUA
from tests.support.fakes import Held

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


class VolatileFile:
    """A Backing for a BitmapStore, of whole pages."""

    def __init__(self, content: bytes, chance: random.Random) -> None:
        self.path = Path("volatile")
        self._chance = chance
        self._cache = bytearray(content)
        self.content = memoryview(self._cache)
        self._versions = [[content[at : at + PAGE]] for at in range(0, len(content), PAGE)]
        self._dirty: set[int] = set()
        self._order = asyncio.Lock()
        self.distrusted = False
        self.is_gone = False
        self.calls: list[Held] = []
        self._late: dict[Held, tuple[int, bytes]] = {}

    def look(self) -> None:
        """Take note of what has changed: from now on that may be on the disk."""
        for page, versions in enumerate(self._versions):
            now = bytes(self.content[page * PAGE : (page + 1) * PAGE])
            if now != versions[-1]:
                versions.append(now)
                self._dirty.add(page)

    async def _hold(self, name: str, offset: int, length: int) -> Held:
        held = Held(name, offset, length)
        self.calls.append(held)
        return held

    def _write(self, offset: int, data: bytes) -> None:
        self.look()
        self.content[offset : offset + len(data)] = data
        self.look()

    # --- Backing -----------------------------------------------------------------------------------------------------

    async def write_through(self, offset: int, data: bytes) -> None:
        await asyncio.shield(asyncio.ensure_future(self._write_through(offset, data)))

    async def _write_through(self, offset: int, data: bytes) -> None:
        async with self._order:
            if self.is_gone:
                raise asyncio.CancelledError
            held = await self._hold("write_through", offset, len(data))
            early = self._chance.random() < 0.5
            if early:
                self._write(offset, data)
            else:
                self._late[held] = offset, data
            pages = range(offset // PAGE, -(-(offset + len(data)) // PAGE))
            try:
                await held.wait()
            except OSError:
                self._late.pop(held, None)
                self._dirty -= set(pages)
                raise
            if not early:
                self._write(*self._late.pop(held))
            for page in pages:
                del self._versions[page][:-1]
                self._dirty.discard(page)

    async def sync(self, offset: int, length: int) -> None:
        self.look()
        pages = range(offset // PAGE, -(-(offset + length) // PAGE))
        if self.distrusted:
            self._dirty |= set(pages)
        first = {page: len(self._versions[page]) - 1 for page in pages}
        before = {page: self._versions[page][0] for page in pages}
        held = await self._hold("sync", offset, length)
        try:
            await held.wait()
        except OSError:
            self._dirty -= set(pages)
            raise
        self.look()
        for page in pages:
            if page in self._dirty and before[page] is self._versions[page][0]:
                which = self._chance.randint(first[page], len(self._versions[page]) - 1)
                del self._versions[page][:which]
                if len(self._versions[page]) == 1:
                    self._dirty.discard(page)
        self.distrusted = False

    def distrust(self) -> None:
        self.distrusted = True

    def remove(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    # --- the end -----------------------------------------------------------------------------------------------------

    def after_kill(self) -> VolatileFile:
        """The same file for the next process: the calls under way are done in part, the page cache is as it was."""
        for offset, data in self._late.values():
            if self._chance.random() < 0.5:
                self._write(offset, data)
        self.look()
        heir = VolatileFile(bytes(self._cache), self._chance)
        heir._versions, heir._dirty = self._versions, self._dirty
        return heir

    def after_power_cut(self) -> VolatileFile:
        """What is left of it: of every page any version that may have been written back."""
        self.look()
        return VolatileFile(b"".join(self._chance.choice(versions) for versions in self._versions), self._chance)


def broken() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


# What has become durable on a StepDisk when the flush, or the write with FUA, is done that was called in this context.
MADE_DURABLE: ContextVar[Callable[[], None]] = ContextVar("MADE_DURABLE", default=lambda: None)


class StepDisk(BlockDevice):
    """A disk without content. `reached` are the writes, `(offset, length)`, that it has ever been told to do."""

    def __init__(self, size: int, chance: random.Random) -> None:
        self.name, self.size = "disk", size
        self.limits, self.capabilities = Limits(), Capabilities()
        self._chance = chance
        self.reached: list[tuple[int, int]] = []
        self.calls: list[Held] = []

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        if self._chance.random() < 0.5:
            return False
        self.reached.append((offset, len(data)))
        return True

    async def _hold(self, name: str, offset: int, length: int, flags: int = 0) -> None:
        held = Held(name, offset, length, flags)
        self.calls.append(held)
        await held.wait()
        if name == "flush" or flags & FUA:
            MADE_DURABLE.get()()

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        raise NotImplementedError

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        await self.zero(offset, len(data), flags)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.reached.append((offset, length))
        await self._hold("write", offset, length, flags)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        await self.zero(offset, length, flags)

    async def flush(self) -> None:
        await self._hold("flush", 0, 0)

    async def aclose(self) -> None:
        pass


def failed_disk() -> DeviceError:
    return DeviceError(errno.EIO, "disk")
