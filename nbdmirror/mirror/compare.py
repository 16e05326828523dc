"""Comparing two disks byte for byte, asking for block status first so that common holes are not read.

Rules:
1. What both promise to read as zero is equal; everything else is read from both and compared.
2. Disks of different sizes differ from the end of the shorter one on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.units import GiB, MiB, round_down

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdmirror.devices.base import BlockDevice

_PIECE: Final = MiB
_IN_FLIGHT: Final = 16
_STATUS: Final = GiB


@dataclass(slots=True)
class Comparison:
    """What was found, in bytes: the first offset that differs (None: none), how many differ, how many were compared."""

    first: int | None = None
    differing: int = 0
    compared: int = 0

    def add(self, offset: int, differing: int) -> None:
        """`differing` bytes differ, the first of them at `offset`."""
        self.first = offset if self.first is None else min(self.first, offset)
        self.differing += differing


async def compare(a: BlockDevice, b: BlockDevice) -> Comparison:
    """Compare two disks; raises DeviceError where one can't be read."""
    result = Comparison()
    size = min(a.size, b.size)
    if a.size != b.size:
        result.add(size, max(a.size, b.size) - size)
    tasks: set[asyncio.Task[None]] = set()
    try:
        async for offset, length in _pieces(a, b, size):
            tasks.add(asyncio.ensure_future(_compare_piece(a, b, offset, length, result)))
            if len(tasks) >= _IN_FLIGHT:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task.done()]:
                    task.result()
                    tasks.discard(task)
        if tasks:
            await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # nothing may be left to complain of itself later
        raise
    result.compared = size
    return result


async def _pieces(a: BlockDevice, b: BlockDevice, size: int) -> AsyncIterator[tuple[int, int]]:
    """The ranges that have to be read, at most _PIECE bytes each."""
    at = 0
    while at < size:
        length = min(_STATUS, size - at)
        of_a, of_b = await asyncio.gather(a.extents(at, length), b.extents(at, length))
        end = at + min(of_a.length, of_b.length)
        zeroes = sorted((extent.offset, extent.end) for extent in of_a if extent.is_zero)
        others = [(extent.offset, extent.end) for extent in of_b if extent.is_zero]
        for start, stop in _common(zeroes, others):
            for piece in _cut(at, min(start, end)):
                yield piece
            at = max(at, min(stop, end))
        for piece in _cut(at, end):
            yield piece
        at = end


def _common(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where two sorted lists of ranges overlap."""
    common, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, stop = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < stop:
            common.append((start, stop))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common


def _cut(start: int, end: int) -> list[tuple[int, int]]:
    pieces = []
    while start < end:
        stop = min(round_down(start, _PIECE) + _PIECE, end)
        pieces.append((start, stop - start))
        start = stop
    return pieces


async def _compare_piece(a: BlockDevice, b: BlockDevice, offset: int, length: int, result: Comparison) -> None:
    left, right = await asyncio.gather(read_range(a, offset, length), read_range(b, offset, length))
    if left == right:
        return
    unlike = (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(length, "big")
    result.add(offset + length - len(unlike.lstrip(b"\0")), length - unlike.count(0))


async def read_range(device: BlockDevice, offset: int, length: int) -> bytearray:
    """A range that need not be aligned to the disk's blocks."""
    block = device.limits.minimum
    start = round_down(offset, block)
    data = bytearray(min(-(-(offset + length) // block) * block, device.size) - start)
    if not device.pread_now(data, start):
        await device.pread(data, start)
    return data if len(data) == length else data[offset - start : offset - start + length]
