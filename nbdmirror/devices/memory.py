"""MemoryDevice: a disk in memory, for tests and for trying things out.

Rules:
1. Nothing here ever blocks: the `*_now` methods always answer.
2. One byte per page of 4 KiB holds the page's block status. It is honest: a page that was written is data, whatever was
   written; one that was zeroed or trimmed whole is ZERO, and a HOLE unless NO_HOLE was asked for.
"""

from __future__ import annotations

import errno
import re
from typing import Final

from nbdmirror.devices.base import BlockDevice, Capabilities, Limits
from nbdmirror.errors import DeviceError, UsageError
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.protocol.constants import NO_HOLE
from nbdmirror.units import round_up

PAGE: Final = 4096
# One match per run of pages with one status, found at the speed of C.
_RUN: Final = re.compile(rb"(.)\1*", re.DOTALL)


class MemoryDevice(BlockDevice):
    """`size` bytes, all zeroes at first. `data` is the content, to look at and to compare with."""

    def __init__(self, size: int, *, name: str = "memory", read_only: bool = False) -> None:
        if size < 0:
            raise UsageError(f"a disk can't have {size} bytes")
        self.name = name
        self.size = size
        self.limits = Limits(minimum=1, preferred=PAGE)
        self.capabilities = Capabilities(read_only=read_only)
        self.data = bytearray(size)
        # Assigning to slices of a view can't change the size by mistake, as it can with a bytearray.
        self._view = memoryview(self.data)
        self._pages = bytearray([HOLE | ZERO]) * (round_up(size, PAGE) // PAGE)

    def pread_now(self, buffer: bytearray | memoryview, offset: int) -> bool:
        """Always answers."""
        length = len(buffer)
        buffer[:] = self._view[offset : offset + length]
        return True

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        """Always answers."""
        self._refuse_read_only()
        end = offset + len(data)
        self._view[offset:end] = data
        self._mark(offset // PAGE, -(-end // PAGE), DATA)
        return True

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer`."""
        self.pread_now(buffer, offset)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:  # noqa: ARG002
        """Write; FUA is no different here."""
        self.pwrite_now(data, offset)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes. A page that is only partly covered stays what it was, allocated if NO_HOLE."""
        self._refuse_read_only()
        end = offset + length
        self._view[offset:end] = bytes(length)
        first, last = self._whole_pages(offset, end)
        self._mark(first, last, ZERO if flags & NO_HOLE else HOLE | ZERO)
        if flags & NO_HOLE:
            for page in {offset // PAGE, (end - 1) // PAGE}:
                self._pages[page] &= ZERO

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:  # noqa: ARG002
        """Drop the pages that the range covers whole; the rest keeps its content."""
        self._refuse_read_only()
        first, last = self._whole_pages(offset, offset + length)
        if first < last:
            start, end = first * PAGE, min(last * PAGE, self.size)
            self._view[start:end] = bytes(end - start)
            self._mark(first, last, HOLE | ZERO)

    async def flush(self) -> None:
        """Nothing to do: what was written is where it will ever be."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        """The status of the pages, cut to the range."""
        end = offset + length
        extents = ExtentList(offset, length)
        first = offset // PAGE
        for run in _RUN.finditer(self._pages, first, -(-end // PAGE)):
            extents.add_until(min(run.end() * PAGE, end), self._pages[run.start()])
        return extents

    async def aclose(self) -> None:
        """Nothing to release: the content goes with the object."""

    def _refuse_read_only(self) -> None:
        if self.capabilities.read_only:
            raise DeviceError(errno.EPERM, f"{self.name} is read-only")

    def _whole_pages(self, offset: int, end: int) -> tuple[int, int]:
        """The pages `[first, last)` that lie inside the range; the disk's last page ends with the disk."""
        return -(-offset // PAGE), len(self._pages) if end == self.size else end // PAGE

    def _mark(self, first: int, last: int, status: int) -> None:
        if first < last:
            self._pages[first:last] = bytes([status]) * (last - first)
