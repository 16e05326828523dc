"""AlignedDevice: any byte range over a disk that only takes whole blocks.

A guest that was told "any byte" when it connected goes on writing so after its export has moved to a disk with larger blocks.

Rules:
1. Whole blocks pass through untouched; the block at either end of a range that is not aligned is read, changed and written.
2. Those read-change-write cycles exclude each other and every other write meanwhile, or one would undo the other.
3. Trimming shrinks to whole blocks, and zeroing writes the ends.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdmirror.devices.base import BlockDevice
from nbdmirror.extents import ExtentList
from nbdmirror.protocol.constants import FUA
from nbdmirror.units import round_down, round_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class AlignedDevice(BlockDevice):
    """`below` with `limits.minimum` 1."""

    def __init__(self, below: BlockDevice) -> None:
        self.below = below
        self.name, self.size = below.name, below.size
        self.capabilities = below.capabilities
        self.limits = replace(below.limits, minimum=1)
        self._block = below.limits.minimum
        self._writers = 0
        self._no_writers = asyncio.Condition()
        self._cycle = asyncio.Lock()

    @classmethod
    def over(cls, device: BlockDevice) -> BlockDevice:
        """`device` itself where it takes any byte range."""
        return device if device.limits.minimum == 1 else cls(device)

    def _is_whole(self, offset: int, length: int) -> bool:
        return not (offset | length) % self._block

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See BlockDevice."""
        length = len(buffer)
        if self._is_whole(offset, length):
            await self.below.pread(buffer, offset)
            return
        start, end = round_down(offset, self._block), round_up(offset + length, self._block)
        whole = bytearray(end - start)
        await self.below.pread(whole, start)
        memoryview(buffer)[:] = memoryview(whole)[offset - start : offset - start + length]

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """See BlockDevice."""
        if self._is_whole(offset, len(data)):
            async with self._writing():
                await self.below.pwrite(data, offset, flags)
            return
        async with self._alone():
            await self._rewrite(memoryview(data), offset, flags)

    async def _rewrite(self, data: memoryview, offset: int, flags: int) -> None:
        """Read the blocks that the range touches, change, write. Only the ends need reading, but ranges are short."""
        start, end = round_down(offset, self._block), round_up(offset + len(data), self._block)
        whole = bytearray(end - start)
        await self.below.pread(whole, start)
        whole[offset - start : offset - start + len(data)] = data
        await self.below.pwrite(whole, start, flags)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        start, end = round_up(offset, self._block), round_down(offset + length, self._block)
        if start < end:
            async with self._writing():
                await self.below.zero(start, end - start, flags)
        rest = flags & FUA  # the others mean nothing to a write, and a server may refuse them there
        async with self._alone():
            if start >= end:
                await self._rewrite(memoryview(bytes(length)), offset, rest)
                return
            if start > offset:
                await self._rewrite(memoryview(bytes(start - offset)), offset, rest)
            if end < offset + length:
                await self._rewrite(memoryview(bytes(offset + length - end)), end, rest)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        start, end = round_up(offset, self._block), round_down(offset + length, self._block)
        if start < end:
            async with self._writing():
                await self.below.trim(start, end - start, flags)

    async def flush(self) -> None:
        """See BlockDevice."""
        await self.below.flush()

    async def cache(self, offset: int, length: int) -> None:
        """See BlockDevice."""
        start, end = round_down(offset, self._block), round_up(offset + length, self._block)
        await self.below.cache(start, end - start)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """See BlockDevice."""
        start, end = round_down(offset, self._block), round_up(offset + length, self._block)
        extents = ExtentList(offset, length)
        for extent in await self.below.extents(start, end - start):
            extents.add_until(min(extent.end, offset + length), extent.flags)
        return extents if len(extents) else ExtentList.all_data(offset, length)

    async def aclose(self) -> None:
        """See BlockDevice."""
        await self.below.aclose()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """Among other writes of whole blocks, not beside a cycle."""
        async with self._cycle:
            self._writers += 1
        try:
            yield
        finally:
            self._writers -= 1
            if not self._writers:
                async with self._no_writers:
                    self._no_writers.notify_all()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """While nothing else is written."""
        async with self._cycle:
            async with self._no_writers:
                await self._no_writers.wait_for(lambda: not self._writers)
            yield
