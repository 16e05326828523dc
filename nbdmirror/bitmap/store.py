"""BitmapStore: a bitmap whose bits are those of its file. Who loads it, keeps it and lets go of it does so by these rules.

1. The bits in memory are the mapped file itself, so a mark is in the page cache before the disk changes, and outlives this
   process whenever it dies.
2. Before the disk may be written the file says durably that it is in use, by which mode and since which boot of the host.
   What it said before is only given up when the bits that this stands for are durable.
3. An inconsistent bitmap's file is not touched, so it stays inconsistent for whoever comes next, until it is cleared.
4. `sync` returns when every mark made before it was called is durable. Callers that come while one is under way share the
   next one, and none at all is made where nothing was marked. After a failure the file says `unsure` until one succeeds.
5. The state is written by `write_through` alone, one call after the other: nothing of it is being written back when it changes,
   so what the disk takes is never half of it. A change that nobody waits for is written soon.
6. The orderly end: the bits durable, then no region on record, then the state with the checksum of the bits.
7. A failure is a DeviceError, with ENOSPC where there is no room and EIO for anything else.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from bitarray import bitarray

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.image import REGIONS_OFFSET, STATE_OFFSET, Head, State, Sync, Worth, check_content
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.bitmap.regions import recorded_ranges
from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log: Final = logging.getLogger(__name__)
_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class Backing(Protocol):
    """The file below, as MappedFile has it. Any method may raise OSError."""

    path: Path
    content: memoryview

    async def write_through(self, offset: int, data: bytes) -> None:
        """Durable when it returns."""

    async def sync(self, offset: int, length: int) -> None:
        """Make durable what this range of `content` has when this is called."""

    def distrust(self) -> None:
        """What was written back before may be lost: let the next sync write everything."""

    def remove(self) -> None:
        """Take its name away, durably."""

    def close(self) -> None:
        """Let go of it."""


class OnInconsistent(Enum):
    """What becomes of a bitmap in which changes may be missing."""

    FAIL = "fail"
    ALL_DIRTY = "all-dirty"
    FLUSHED = "flushed"


def recovered(head: Head, state: State, content: memoryview, boot_id: bytes, policy: OnInconsistent) -> NamedBitmap:
    """The bitmap in the file `content`, its bits in place; raises ImageError where that is damaged.

    What its bits lack after a crash is marked, or it is inconsistent.
    """
    check_content(head, state, content)
    bits = bits_in(head, content)
    worth, inconsistent = state.worth(boot_id), False
    if worth is Worth.REGIONS:
        for offset, length in recorded_ranges(content[REGIONS_OFFSET : head.bits_offset], head.size, head.region_size):
            bits.add(offset, length)
    elif worth > Worth.REGIONS and policy is OnInconsistent.ALL_DIRTY:
        bits.fill()
    elif worth > Worth.REGIONS:
        inconsistent = worth is Worth.NOTHING or policy is OnInconsistent.FAIL
    return NamedBitmap(head.name, bits, recording=state.recording, persistent=True, inconsistent=inconsistent)


def bits_in(head: Head, content: memoryview) -> DirtyBitmap:
    """The bits in a file, in place."""
    place = content[head.bits_offset : head.bits_offset + head.bits_length]
    return DirtyBitmap(head.size, head.granularity, bitarray(buffer=place, endian="little"))


class BitmapStore:
    """Keeps `bitmap`, which `recovered` has made from this file, durable as `sync_mode` says. `start` it first."""

    def __init__(
        self, file: Backing, head: Head, state: State, bitmap: NamedBitmap, *, sync_mode: Sync, boot_id: bytes
    ) -> None:
        self.file = file
        self.head = head
        self.bitmap = bitmap
        self._state = state
        self._sync_mode = sync_mode
        self._boot_id = boot_id
        self._lock = asyncio.Lock()
        self._started = False
        self._trouble = ""
        self._putting: asyncio.Task[None] | None = None
        bitmap.on_change = self._changed

    async def start(self) -> None:
        """Take the file into use, unless it is inconsistent (rules 2 and 3); raises DeviceError."""
        if self.bitmap.inconsistent:
            return
        with self._failing():
            await self._sync_bits()
            self._use()
            await self._put_state()
            await self.write_regions(0, bytes(self.head.regions_length))

    def _use(self) -> None:
        generation, recording = self._state.generation + 1, self._state.recording
        self._state = State(generation, in_use=True, recording=recording, sync=self._sync_mode, boot_id=self._boot_id)
        self._started = True

    def _changed(self) -> None:
        """It was cleared, or is to record or not. `settle` waits until the file has that."""
        if self.bitmap.inconsistent:
            return
        was_started = self._started
        if not was_started:
            self._use()
        if not was_started or self._state.recording != self.bitmap.recording:
            self._put_soon(replace(self._state, recording=self.bitmap.recording))

    def _put_soon(self, state: State) -> None:
        self._state = state
        if self._putting is None or self._putting.done():
            self._putting = asyncio.ensure_future(self._put_quietly())

    async def _put_quietly(self) -> None:
        with suppress(DeviceError):  # logged
            await self._put_state()

    # --- durability ------------------------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Make every mark set so far durable; raises DeviceError."""
        async with self._lock:
            if self.bitmap.bits.grown:
                with self._failing():
                    await self._sync_bits()

    async def settle(self) -> None:
        """Make everything about the bitmap durable, whether it records included; raises DeviceError."""
        await self.sync()
        if not self.bitmap.inconsistent:
            await self._put_state()

    async def _put_state(self) -> None:
        with self._failing():
            put = None
            while put is not self._state:  # it may change while it is being written
                put = self._state
                await self.file.write_through(STATE_OFFSET, put.encode())

    async def write_regions(self, offset: int, content: bytes) -> None:
        """Put a part of the region map into the file, durably; raises DeviceError."""
        with self._failing():
            await self.file.write_through(REGIONS_OFFSET + offset, content)

    async def _sync_bits(self) -> None:
        bits = self.bitmap.bits
        bits.grown = False
        try:
            await self.file.sync(self.head.bits_offset, self.head.bits_length)
        except BaseException as error:
            bits.grown = True
            if isinstance(error, OSError):
                self.file.distrust()
                if not self._state.unsure:
                    self._put_soon(replace(self._state, unsure=True))
            raise
        if self._started and self._state.unsure:
            self._put_soon(replace(self._state, unsure=False))

    async def close(self) -> None:
        """The orderly end: nothing marks it any more. Raises DeviceError, and the file stays in use."""
        if self.bitmap.inconsistent:
            return
        try:
            with self._failing():
                await self._sync_bits()
        finally:
            if self._putting is not None:
                await self._putting
        await self.write_regions(0, bytes(self.head.regions_length))
        place = self.file.content[self.head.bits_offset : self.head.bits_offset + self.head.bits_length]
        self._state = replace(self._state, in_use=False, bits_crc=zlib.crc32(place))
        await self._put_state()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(error) from None
        if not self._state.unsure:
            self._trouble = ""

    def failure(self, error: OSError) -> DeviceError:
        """As the disk's users hear of it (rule 7); the log has the first of a row."""
        number = errno.ENOSPC if error.errno in _NO_ROOM else errno.EIO
        failure = DeviceError(number, f"cannot record in {self}")
        if str(failure) != self._trouble:
            self._trouble = str(failure)
            _log.error("%s", failure)
        return failure

    def __str__(self) -> str:
        return f"bitmap '{self.bitmap.name}' in '{self.file.path}'"
