"""Copier: carries the steps of a plan out, between two block devices.

Rules:
1. The steps of a unit begin together after its source was read, and the unit is done when all of them are. The caller holds
   the unit's chunks, so nobody else touches them on the target meanwhile.
2. Data that turns out to be zeroes is sent as zeroes; zeroes go where the target is not known to read as zero already.
3. The zero map is told before data is sent and after zeroes have arrived.
4. No more is in flight than the way to the target can hold: what waits at its end falls out of the processor's cache, and
   keeps a server on this machine from the processor that everybody shares.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.extents import DATA, ZERO, ExtentList, zero_runs
from nbdmirror.mirror.plan import Copy, Geometry, Step, Unit, Zero
from nbdmirror.mirror.trouble import CopyFailed
from nbdmirror.protocol.constants import NO_HOLE
from nbdmirror.units import KiB, MiB, round_down

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.mirror.progress import Progress
    from nbdmirror.mirror.zero_map import ZeroMap

_log: Final = logging.getLogger(__name__)

# Looked for in data, so that zeroes that the source could not tell of do not travel: what file systems allocate by.
ZERO_GRAIN: Final = 4 * KiB
# A coarse look first: where 64 KiB begin with a byte that is set, its 4 KiB blocks are not looked at one by one.
_COARSE_GRAIN: Final = 64 * KiB
# 256 KiB to 1 MiB with 16 in flight is where libnbd is fastest; larger buffers fall out of the processor's cache.
DEFAULT_REQUEST_SIZE: Final = MiB
DEFAULT_REQUESTS: Final = 16
DEFAULT_BUFFER: Final = DEFAULT_REQUESTS * DEFAULT_REQUEST_SIZE
# In flight to a target that answers within this many seconds: enough for 10 Gbit/s. A copy to a server on the same machine took
# 0.75 of the time that it did with 16 MiB, and 0.9 of the CPU time.
_NEAR_BUFFER: Final = 4 * MiB
_NEAR_SECONDS: Final = 0.003
# So many writes find out; fewer, on a busy machine, might all have been late.
_NEAR_WRITES: Final = 8
# One zero request; no payload travels, but a server without real zeroing writes all of it before it answers.
MOST_ZERO: Final = 256 * MiB
# What a server may make us ask to learn of one chunk, and of a whole target, before it counts as data.
_STATUS_QUERIES: Final = 64
_SCAN_QUERIES: Final = 4096
_SCAN_LENGTH: Final = 4 * KiB * MiB - MiB


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy: the most data bytes per unit, how many units at a time, whether zeroes may become holes.

    `buffer` bounds the data of all units at a time, in bytes; a chunk that is larger is copied alone.
    """

    request_size: int = DEFAULT_REQUEST_SIZE
    requests: int = DEFAULT_REQUESTS
    buffer: int = DEFAULT_BUFFER
    unmap: bool = True
    use_extents: bool = True


class Copier:
    """Brings ranges of `target` into step with `source`."""

    def __init__(
        self, source: BlockDevice, target: BlockDevice, zero_map: ZeroMap, progress: Progress, options: CopyOptions
    ) -> None:
        self.source = source
        self.target = target
        self._zero_map = zero_map
        self.progress = progress
        self.options = options
        self._zero_flags = 0 if options.unmap else NO_HOLE
        self._buffers: list[bytearray] = []
        # Of the writes so far, in seconds: others may have waited for their turn.
        self._quickest = math.inf
        self._writes = 0

    @property
    def buffer(self) -> int:
        """How much data units may hold at a time, in bytes (rule 4)."""
        if self._quickest > _NEAR_SECONDS and self._writes >= _NEAR_WRITES:
            return self.options.buffer
        return min(self.options.buffer, max(_NEAR_BUFFER, 2 * self.options.request_size))

    def note_write(self, seconds: float) -> None:
        """A write of data has taken so long."""
        self._quickest = min(self._quickest, seconds)
        self._writes += 1

    def geometry(self, granularity: int) -> Geometry:
        """The bounds of a plan for these two disks."""
        unit = max(round_down(min(self.options.request_size, self.options.buffer), granularity), granularity)
        alignment = max(self.target.limits.minimum, self.source.limits.minimum)
        return Geometry(granularity, unit, max(round_down(MOST_ZERO, granularity), granularity), alignment, self.source.size)

    async def status(self, offset: int, length: int, at_least: int) -> ExtentList:
        """The source's extents from `offset` on: at least `at_least` bytes of them, at most `length`."""
        extents = ExtentList(offset, length)
        try:
            for _ in range(_STATUS_QUERIES if self.options.use_extents else 0):
                at = offset + extents.length
                for extent in await self.source.extents(at, offset + length - at):
                    extents.add(extent.length, extent.flags)
                if extents.length >= at_least:
                    return extents
        except DeviceError as error:  # status is advice: what fails to tell is copied
            _log.debug("'%s' does not tell its extents: %s", self.source.name, error)
        extents.add_until(offset + (at_least if extents.length else length), DATA)
        return extents

    async def carry_out(self, unit: Unit) -> None:
        """Bring one unit into step. Raises CopyFailed; what of it has arrived is unknown then."""
        known_zero = self._zero_map.reads_zero(unit.offset, unit.length)
        copies = [step for step in unit.steps if isinstance(step, Copy)]
        if not copies:
            await _all(self._zero(step.offset, step.length, known_zero=known_zero) for step in unit.steps)
            return
        start, end = copies[0].offset, copies[-1].offset + copies[-1].length
        buffer = self._take_buffer(end - start)
        try:
            view = memoryview(buffer)[: end - start]
            await self._read(view, start)
            await self._send(unit, buffer, start, known_zero=known_zero)
        finally:
            self._buffers.append(buffer)

    async def send(self, data: memoryview, offset: int) -> None:
        """Write what the caller holds, whole blocks of the target. Raises CopyFailed."""
        self._zero_map.clear(offset, len(data))
        await _all((self._write(data, offset),))

    async def _send(self, unit: Unit, buffer: bytearray, start: int, *, known_zero: bool) -> None:
        view = memoryview(buffer)
        steps = self._refined(unit, buffer, start)
        if any(isinstance(step, Copy) for step in steps):
            self._zero_map.clear(unit.offset, unit.length)
        work = [
            self._write(view[step.offset - start : step.offset - start + step.length], step.offset)
            if isinstance(step, Copy)
            else self._zero(step.offset, step.length, known_zero=known_zero)
            for step in steps
        ]
        await _all(work)

    async def _read(self, view: memoryview, offset: int) -> None:
        try:
            if not self.source.pread_now(view, offset):
                await self.source.pread(view, offset)
        except DeviceError as error:
            raise CopyFailed("read", error) from error
        self.progress.read += len(view)

    def _refined(self, unit: Unit, buffer: bytearray, start: int) -> list[Step]:
        """The steps with the zeroes that were found in the data, neighbours of a kind joined."""
        grain = max(ZERO_GRAIN, self.target.limits.minimum)
        steps: list[Step] = []
        for step in unit.steps:
            if isinstance(step, Zero):
                _append(steps, step)
                continue
            for first, last, zero in _data_runs(buffer, step.offset - start, step.length, grain):
                _append(steps, Zero(start + first, last - first) if zero else Copy(start + first, last - first))
        return steps

    async def _write(self, data: memoryview, offset: int) -> None:
        started = time.monotonic()
        await self.target.pwrite(data, offset)
        self.note_write(time.monotonic() - started)
        self.progress.sent += len(data)

    async def _zero(self, offset: int, length: int, *, known_zero: bool) -> None:
        if known_zero:
            self.progress.skipped += length
            return
        epoch = self._zero_map.epoch
        await self.target.zero(offset, length, self._zero_flags)
        self._zero_map.set_zero(offset, length, epoch)
        self.progress.zeroed += length

    def _take_buffer(self, length: int) -> bytearray:
        """A buffer of at least `length` bytes; there are as many as units in flight."""
        buffer = self._buffers.pop() if self._buffers else bytearray(self.options.request_size)
        return buffer if len(buffer) >= length else bytearray(length)

    async def learn_zeroes(self) -> None:
        """Ask the target which parts of it read as zeroes; a target with very many extents is believed to have none."""
        if not self.target.capabilities.extents:
            return
        at, epoch = 0, self._zero_map.epoch
        for _ in range(_SCAN_QUERIES):
            if at >= self.source.size:
                return
            length = min(_SCAN_LENGTH, self.source.size - at)
            for extent in await self.target.extents(at, length):
                if extent.flags & ZERO:
                    self._zero_map.set_zero(extent.offset, extent.length, epoch)
                at = extent.end


async def _all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Wait until every request of a unit has ended, also where one fails: only then may its buffer be used again."""
    jobs = list(work)
    try:
        if len(jobs) == 1:
            await jobs[0]
            return
        for result in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
    except DeviceError as error:
        raise CopyFailed("write", error) from error


def _append(steps: list[Step], step: Step) -> None:
    last = steps[-1] if steps else None
    if type(last) is type(step) and last is not None and last.offset + last.length == step.offset:
        steps[-1] = type(step)(last.offset, last.length + step.length)
    else:
        steps.append(step)


def _data_runs(buffer: bytearray, start: int, length: int, grain: int) -> list[tuple[int, int, bool]]:
    """`zero_runs` of a part of the buffer, by `grain`; only where a coarse look sees that it could matter."""
    for at in range(start, start + length, _COARSE_GRAIN):
        if not buffer[at]:
            return zero_runs(buffer, length, grain, start)
    return [(start, start + length, False)]
